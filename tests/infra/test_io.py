import json

import pytest

from nanollava.infra import io
from nanollava.infra.io import (
    InputError,
    atomic_folder,
    atomic_write,
    lock_file,
    read_json,
    read_json_item,
    read_json_list,
    read_jsonl,
    scan_json_list,
    write_json,
)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": "é"})
    assert read_json(path) == {"x": "é"}
    with pytest.raises(RuntimeError):
        with atomic_write(path) as temp:
            temp.write_text("half")
            raise RuntimeError
    assert read_json(path) == {"x": "é"}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_unwritable_path_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write .*file"):
        write_json(tmp_path / "file" / "a.json", 1)


def test_failed_folder_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError):
        with atomic_folder(tmp_path / "out") as temp:
            (temp / "a").write_text("half")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(tmp_path / "out") as temp:
        (temp / "a").write_text("done")
    assert (tmp_path / "out" / "a").read_text() == "done" and len(list(tmp_path.iterdir())) == 1


def test_existing_folder_is_kept(tmp_path):
    with pytest.raises(InputError, match="exists already"):
        with atomic_folder(tmp_path):
            pass


def test_lone_surrogate_is_written_as_question_mark(tmp_path):
    write_json(tmp_path / "a.json", "\ud83d")
    assert read_json(tmp_path / "a.json") == "?"


def test_list_items_are_read_one_by_one(tmp_path):
    items = [{"a": [1, "],"]}, 2, "three"]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text("\ufeff" + json.dumps(items, indent=indent), "utf-8")
        assert list(read_json_list(tmp_path / "a.json")) == items
    (tmp_path / "a.json").write_text("[1, 2, oops]")
    reader = read_json_list(tmp_path / "a.json")
    assert [next(reader), next(reader)] == [1, 2]
    with pytest.raises(InputError, match="a.json is not JSON"):
        next(reader)


@pytest.mark.parametrize("chunk", range(6, 24))
def test_chunks_of_any_size_give_the_same_items(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(io, "CHUNK", chunk)
    items = [12.5, -1e-30, {"a": ["é日", "],", "\\\""]}, "", True, [], 7]
    path = tmp_path / "a.json"
    text = json.dumps(items, ensure_ascii=False, indent=chunk % 4)
    path.write_text("\ufeff \n" + text, "utf-8")
    scanned = list(scan_json_list(path))
    assert [item for item, _, _ in scanned] == items
    assert [read_json_item(path, start, end) for _, start, end in scanned] == items


@pytest.mark.parametrize("text", [
    "", "{}", "[", "[1", "[1, 2", "[1, {]", "[1 x]", "[1x]", "[\xff]", '["\xff"]'])
def test_file_that_is_not_a_json_list_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="a.json is not (a JSON list|JSON: .*)$"):
        list(read_json_list(tmp_path / "a.json"))


def test_list_items_are_found_again_by_their_place_in_the_file(tmp_path):
    path = tmp_path / "a.json"
    items = [{"a": "ü\u2028"}, "日本", 3]
    path.write_text("\ufeff" + json.dumps(items, ensure_ascii=False), "utf-8")
    scanned = list(scan_json_list(path))
    assert [item for item, _, _ in scanned] == items
    assert [read_json_item(path, start, end) for _, start, end in scanned] == items
    path.write_text("[]")
    with pytest.raises(InputError, match="a.json has changed since it was opened"):
        read_json_item(path, *scanned[0][1:])


@pytest.mark.parametrize("line, message", [
    ("{", "line 2 is not JSON"),
    ("[1]", "line 2 lacks id, text"),
    ('{"id": 1}', "line 2 lacks text"),
])
def test_bad_jsonl_row_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 0, "text": "a"}\n' + line)
    with pytest.raises(InputError, match=message):
        read_jsonl(path, ("id", "text"))
    path.write_text('{"id": 0, "text": "a"}\n')
    assert read_jsonl(path, ("id", "text")) == [{"id": 0, "text": "a"}]


def test_locked_file_is_refused_until_it_is_closed(tmp_path):
    pytest.importorskip("fcntl")
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        lock_file(first, "the ledger")
        with pytest.raises(InputError, match="the ledger is in use by another run"):
            lock_file(second, "the ledger")
        first.close()
        lock_file(second, "the ledger")
