import json
import os

import pytest

from nanollava.infra import json_io
from nanollava.infra.io import InputError
from nanollava.infra.json_io import (read_json, read_json_item, read_json_list, read_jsonl,
                                     scan_json_list, write_json)


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
    monkeypatch.setattr(json_io, "CHUNK", chunk)
    items = [12.5, -1e-30, {"a": ["é日", "],", "\\\""]}, "", True, [], 7]
    path = tmp_path / "a.json"
    text = json.dumps(items, ensure_ascii=False, indent=chunk % 4)
    text = text.replace("\n", "\n" + 30 * " ")
    path.write_text("\ufeff \n" + text, "utf-8")
    scanned = list(scan_json_list(path))
    assert [item for item, _, _ in scanned] == items
    assert [read_json_item(path, start, end) for _, start, end in scanned] == items


@pytest.mark.parametrize("text", [
    "", "{}", "[", "[1", "[1, 2", "[1, 2,]", "[,1]", "[1,,2]", "[1 2]", "[,]", "[1, {]", "[1 x]",
    "[1x]", "[\xff]", '["\xff"]', "[" * 10**5, f"[{'1' * 5000}]"])
def test_file_that_is_not_a_json_list_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="a.json is not (a JSON list|JSON: .*)$"):
        list(read_json_list(tmp_path / "a.json"))


def test_wrong_item_is_found_without_reading_on(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[{'a': 1}," + "1," * 10**5)
    monkeypatch.setattr(json_io, "CHUNK", 100)
    calls, decode = [], json_io.decode_item
    with monkeypatch.context() as patch:
        patch.setattr(json_io, "decode_item", lambda *item: calls.append(1) or decode(*item))
        with pytest.raises(InputError, match="in the item at byte 1"):
            list(read_json_list(path))
    assert len(calls) == 2  # the first one is of no text


@pytest.mark.parametrize("rest", ["[2]", "]", ",", " \n x"])
def test_text_after_a_json_list_is_refused(tmp_path, rest):
    (tmp_path / "a.json").write_text("[1]\n \n")
    assert list(read_json_list(tmp_path / "a.json")) == [1]
    (tmp_path / "a.json").write_text("[1]" + rest)
    with pytest.raises(InputError, match="a.json has text after its list, which ends at byte 2"):
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
    ("[1]", "line 2: it must be an object, not a list of 1"),
    ('{"id": 1}', "line 2: it has no 'text'"),
    ('{"id": "1", "text": "a"}', "line 2: id must be an integer, not '1'"),
    ('{"id": 1, "text": "\xff"}', "line 2 is not UTF-8"),
])
def test_bad_jsonl_row_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": 0, "text": "a"}\n' + line.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        list(read_jsonl(path, {"id": int, "text": str}))


def test_jsonl_lines_end_at_newlines_alone(tmp_path):
    path, rows = tmp_path / "a.jsonl", [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    text = "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(("\ufeff" + text).encode())
    assert list(read_jsonl(path, {"text": str})) == rows


def test_unfinished_last_line_of_a_growing_file_is_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    for text, rows in [('1\n{"a', [1]), ("1\n2", [1, 2]), ("1\n\xc3", [1])]:
        path.write_bytes(text.encode("latin-1"))
        assert list(read_jsonl(path, growing=True)) == rows
    path.write_text('{"a\n1\n')
    with pytest.raises(InputError, match="line 1 is not JSON"):
        list(read_jsonl(path, growing=True))


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("read", [
    read_json, lambda path: list(read_json_list(path)), lambda path: list(read_jsonl(path)),
    lambda path: read_json_item(path, 0, 1)])
def test_folders_fifos_and_devices_are_refused_without_reading_them(tmp_path, make, read):
    make(tmp_path / "a.json")
    with pytest.raises(InputError, match="a.json is not a file: a folder, FIFO or device"):
        read(tmp_path / "a.json")
