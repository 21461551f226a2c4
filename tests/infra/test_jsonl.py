"""A JSONL file that grows: what survives a kill, a full disk and a second process."""

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanollava.infra.io import InputError
from nanollava.infra.jsonl import JsonlFile

ROW = {"id": 1, "text": "ä\u2028 } \u0085"}
LINE = (json.dumps(ROW, ensure_ascii=False) + "\n").encode()


class Rows(JsonlFile):
    shape = {"id": int}

    def __init__(self, path):
        super().__init__(path)
        self.rows = []

    def index(self, row):
        self.rows.append(row)


def read(path) -> list[dict]:
    reader = Rows(path)
    reader.load()
    return reader.rows


@contextmanager
def full_disk(monkeypatch):
    """Inside, nothing can be written, and an error must say so."""

    def raise_disk_full(file):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", raise_disk_full)
        with pytest.raises(InputError, match="cannot write .*rows: No space left"):
            yield


@pytest.mark.parametrize("cut", range(len(LINE) + 1))
def test_last_line_of_a_killed_run_is_cut_off_or_completed(tmp_path, cut):
    path = tmp_path / "rows"
    path.write_bytes(LINE + LINE[:cut])
    expected = [ROW] * (2 if cut >= len(LINE) - 1 else 1)
    assert read(path) == expected and path.read_bytes() == LINE + LINE[:cut]
    with Rows(path) as file:
        file.append({"id": 2})
        assert file.rows == [*expected, {"id": 2}]
    assert path.read_bytes() == LINE * len(expected) + b'{"id": 2}\n'


@pytest.mark.parametrize("content", [b" ", b"\0"])
def test_space_that_a_killed_run_reserved_is_cut_off(tmp_path, content):
    (tmp_path / "rows").write_bytes(LINE + content * 1000)
    with Rows(tmp_path / "rows") as file:
        assert file.rows == [ROW]
    assert (tmp_path / "rows").read_bytes() == LINE


@pytest.mark.parametrize("number", range(3))
def test_killed_run_loses_no_row_that_it_has_reported(tmp_path, number):
    program = f"""if True:
        from tests.infra.test_jsonl import Rows
        with Rows({str(tmp_path / "rows")!r}) as file:
            for number in range(10**6):
                file.append({{"id": number, "text": "x" * 1000}})
                print(number, flush=True)"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parents[2])
    reported = [int(process.stdout.readline()) for _ in range(20 * number + 1)][-1]
    with pytest.raises(InputError, match="in use"):
        with Rows(tmp_path / "rows"):
            pass
    process.send_signal(signal.SIGKILL)
    reported = max([reported, *map(int, process.stdout.read().split())])
    process.wait()
    with Rows(tmp_path / "rows") as file:
        ids = [row["id"] for row in file.rows]
        assert ids == list(range(len(ids))) and len(ids) > reported


@pytest.mark.parametrize("content, message", [
    (b'{"id": 1}\n{\n{"id": 2}\n', "line 2 is not JSON"),
    (b'{"id": 1}{"id": 2}\n', "line 1 is not JSON"),
    (b'\n{"id": "x"}\n', "line 2: id must be an integer"),
    (b'{"id": 1, "text": "\xff"}\n', "line 1 is not UTF-8"),
    # not the rows of a killed run, but some other file
    (b'[{"id": 1}]', "last line: "), (b'{"other": 1}', "last line: "),
    (b'{"id": "x"}', "last line: "), (b"[" * 100_000, "last line is not JSON"),
    (b'{"other": [1, 2', "last line is not JSON"), (b'PK\3\4\0', "last line is not JSON"),
    (b"[]\n", "line 1: "), (b"3\n", "line 1: "), (b"{}\n", "line 1: it has no 'id'")])
def test_damaged_line_is_named_and_nothing_is_changed(tmp_path, content, message):
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(InputError, match=f"rows, {message}"):
        Rows(tmp_path / "rows").__enter__()
    assert (tmp_path / "rows").read_bytes() == content


def test_lone_surrogate_is_kept(tmp_path):
    with Rows(tmp_path / "rows") as file:
        file.append({"id": 1, "text": "\ud83d"})
    assert read(tmp_path / "rows")[0]["text"] == "\ud83d"


def test_second_writer_is_refused(tmp_path):
    with Rows(tmp_path / "rows"), pytest.raises(InputError, match="in use"):
        with Rows(tmp_path / "rows"):
            pass


def test_append_returns_after_the_rows_are_on_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((tmp_path / "rows").read_bytes()))
    with Rows(tmp_path / "rows") as file:
        file.append(ROW, ROW)
    assert synced[-1] == LINE * 2 and not synced[0].strip()


def test_full_disk_is_found_before_any_work(tmp_path, monkeypatch):
    (tmp_path / "rows").write_bytes(LINE)
    with full_disk(monkeypatch):
        Rows(tmp_path / "rows").__enter__()
    assert (tmp_path / "rows").read_bytes() == LINE


def test_disk_that_fills_up_leaves_complete_lines(tmp_path, monkeypatch):
    with Rows(tmp_path / "rows") as file:
        file.append({"id": 1})
        with full_disk(monkeypatch):
            file.append({"id": 2})
        file.append({"id": 3})
    assert [row["id"] for row in read(tmp_path / "rows")] == [1, 3]


def test_row_in_flight_when_the_file_closes_is_kept(tmp_path):
    with Rows(tmp_path / "rows") as file:
        file.append({"id": 1})
    file.append({"id": 2})
    assert len(read(tmp_path / "rows")) == 2


def test_threads_do_not_mix_their_lines(tmp_path):
    with Rows(tmp_path / "rows") as file:
        threads = [threading.Thread(target=file.append, args=[{"id": number, "text": "x" * 1000}])
                   for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(row["id"] for row in read(tmp_path / "rows")) == list(range(40))


def test_empty_file_is_removed(tmp_path):
    assert read(tmp_path / "none") == []
    with Rows(tmp_path / "rows"):
        pass
    assert list(tmp_path.iterdir()) == []
