"""The ledger: what survives a kill, a full disk and a second process."""

import json
import threading
from contextlib import contextmanager

import pytest

from nanollava.infra.io import InputError
from nanollava.teacher import ledger as ledger_module
from nanollava.teacher.jobs import in_parallel
from nanollava.teacher.ledger import Answer, Ledger, dollars, guess_tokens


def answer(text="A cat."):
    return Answer(text, prompt_tokens=5, completion_tokens=2, complete=True)


@contextmanager
def full_disk(monkeypatch):
    """Inside, nothing can be written; the ledger must say so."""

    def raise_disk_full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module.os, "fsync", raise_disk_full)
        with pytest.raises(InputError, match="cannot write .*ledger: No space left"):
            yield


def test_answers_to_a_key_are_kept_in_order(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        for text in ("one", "two"):
            ledger.add("key", answer(text), rejected=None)
    with Ledger(tmp_path / "ledger") as ledger:
        assert [row["text"] for row in ledger["key"]] == ["one", "two"]
        assert ledger["other"] == []
        assert (ledger.prompt_tokens, ledger.completion_tokens, ledger.total_tokens) == (10, 4, 14)


def test_line_has_key_answer_and_extra_fields(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("key", answer("ä"), kind="detail")
    line = (tmp_path / "ledger").read_text(encoding="utf-8")
    assert line == ('{"key": "key", "text": "ä", "prompt_tokens": 5, "completion_tokens": 2, '
                    '"complete": true, "kind": "detail"}\n')


@pytest.mark.parametrize("complete", [True, False])
def test_ledger_of_an_older_version_opens(tmp_path, complete):
    row = {"key": "key", "text": "A cat.", "prompt_tokens": 5, "completion_tokens": 2,
           "whole": complete, "kind": "detail", "model": "gpt-4", "rejected": None}
    (tmp_path / "ledger").write_text(json.dumps(row) + "\n")
    with Ledger(tmp_path / "ledger") as ledger:
        assert ledger["key"][0]["complete"] is complete
    assert json.loads((tmp_path / "ledger").read_text()) == row  # no paid line is rewritten


def test_unfinished_last_line_is_cut_off(tmp_path):
    path = tmp_path / "ledger"
    with Ledger(path) as ledger:
        ledger.add("key", answer("ä"))
    finished = path.read_bytes()
    for cut in range(1, len(finished)):
        path.write_bytes(finished + finished[:cut])
        with Ledger(path) as ledger:
            ledger.add("next", answer())
        lines = path.read_bytes().splitlines(keepends=True)
        assert lines[0] == finished and len(lines) == 2 and json.loads(lines[1])["key"] == "next"


def test_load_does_not_change_the_disk(tmp_path):
    Ledger(tmp_path / "none").load()
    with Ledger(tmp_path / "ledger") as writer:
        writer.add("key", answer())
        with open(tmp_path / "ledger", "ab") as file:
            file.write(b'{"half')
        before = (tmp_path / "ledger").read_bytes()
        reader = Ledger(tmp_path / "ledger")
        reader.load()
        assert len(reader["key"]) == 1 and (tmp_path / "ledger").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["ledger"]


@pytest.mark.parametrize("line", [
    '{"key": 1}', "[]", "3", "{", '{"key": "a", "text": "b", "prompt_tokens": 1, '
    '"completion_tokens": 1}', '{"key": "a", "text": null, "prompt_tokens": 1, '
    '"completion_tokens": 1, "complete": true}'])
def test_line_that_is_not_an_answer_is_named(tmp_path, line):
    (tmp_path / "ledger").write_text(line + "\n")
    with pytest.raises(InputError, match="ledger, line 1 is not an answer"):
        Ledger(tmp_path / "ledger").load()


def test_second_writer_is_refused(tmp_path):
    with Ledger(tmp_path / "ledger"), pytest.raises(InputError, match="in use"):
        with Ledger(tmp_path / "ledger"):
            pass


def test_add_returns_after_the_line_is_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(ledger_module.os, "fsync",
                        lambda file: synced.append((tmp_path / "ledger").read_text()))
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("key", answer())
    assert '"key": "key"' in synced[-1] and '"key": "key"' not in synced[0]


def test_full_disk_is_found_before_any_request(tmp_path, monkeypatch):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("key", answer())
    with full_disk(monkeypatch):
        Ledger(tmp_path / "ledger").__enter__()
    with Ledger(tmp_path / "ledger") as ledger:
        assert len(ledger["key"]) == 1


def test_disk_that_fills_up_leaves_finished_lines(tmp_path, monkeypatch):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("one", answer())
        with full_disk(monkeypatch):
            ledger.add("two", answer())
        ledger.add("three", answer())
    with Ledger(tmp_path / "ledger") as ledger:
        assert list(ledger.answers) == ["one", "three"]


def test_answer_in_flight_when_the_ledger_closes_is_kept(tmp_path):
    with Ledger(tmp_path / "ledger") as ledger:
        ledger.add("one", answer())
    ledger.add("two", answer())
    with Ledger(tmp_path / "ledger") as ledger:
        assert ledger["two"]


def test_threads_do_not_mix_their_lines(tmp_path):
    def add(number):
        ledger.add(str(number), answer("x" * 1000))

    with Ledger(tmp_path / "ledger") as ledger:
        list(in_parallel(add, range(40), 8, threading.Event()))
    keys = [json.loads(line)["key"] for line in open(tmp_path / "ledger")]
    assert sorted(map(int, keys)) == list(range(40))


def test_empty_ledger_leaves_no_file(tmp_path):
    with Ledger(tmp_path / "ledger"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_digits_and_symbols_count_as_tokens():
    assert guess_tokens("A gray cat sleeps.") == 5
    assert guess_tokens("[0.125, 0.5]") == 1 + 5 + 1 + 3 + 1


def test_price_is_per_million_tokens():
    assert dollars(2_000_000, 500_000, (30.0, 60.0)) == 90.0
