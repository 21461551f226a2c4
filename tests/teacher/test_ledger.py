"""The ledger: its lines, and those of older versions. test_jsonl.py has kills and full disks."""

import json

import pytest

from nanollava.infra.io import InputError
from nanollava.teacher.ledger import Answer, Ledger, dollars, guess_tokens


def answer(text="A cat."):
    return Answer(text, prompt_tokens=5, completion_tokens=2, complete=True)


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


GOOD = {"key": "a", "text": "b", "prompt_tokens": 1, "completion_tokens": 1, "complete": True}


@pytest.mark.parametrize("change, message", [
    ({"key": 1}, "line 1: key must be a string"),
    ({"text": None}, "line 1: text must be a string, not null"),
    ({"prompt_tokens": "1"}, "line 1: prompt_tokens must be"),
    ({"complete": "yes"}, "line 1: complete must be"),
    ({"complete": None}, "the answer a does not say whether it is complete")])
def test_line_that_is_not_an_answer_is_named(tmp_path, change, message):
    (tmp_path / "ledger").write_text(json.dumps(GOOD | change) + "\n")
    with pytest.raises(InputError, match=f"ledger(, |: ){message}"):
        Ledger(tmp_path / "ledger").load()


def test_digits_and_symbols_count_as_tokens():
    assert guess_tokens("A gray cat sleeps.") == 5
    assert guess_tokens("[0.125, 0.5]") == 1 + 5 + 1 + 3 + 1


def test_price_is_per_million_tokens():
    assert dollars(2_000_000, 500_000, (30.0, 60.0)) == 90.0
