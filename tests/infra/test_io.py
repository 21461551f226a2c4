import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanollava.infra import io
from nanollava.infra.io import (
    InputError,
    atomic_folder,
    atomic_write,
    check_writable,
    lock_file,
    locked_folder,
    path_inside,
    read_json,
    read_json_item,
    read_json_list,
    read_jsonl,
    scan_json_list,
    shape_error,
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


@pytest.mark.parametrize("owner, age, removed", [
    ("{dead}@{host}", 0, True), ("{ours}@{host}", 0, True), ("{parent}@{host}", 0, False),
    ("{dead}@other", 0, False), ("{dead}@other", 2, True), ("{dead}", 0, False),
    ("{dead}", 2, True), ("123456789012", 2, False)])  # the last: a download, which continues
def test_parts_of_killed_runs_are_removed_by_the_next_write(tmp_path, owner, age, removed):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    owner = owner.format(dead=killed.pid, ours=os.getpid(), parent=os.getppid(), host=io.HOST)
    file, folder = tmp_path / f".a[1].json.{owner}.part", tmp_path / f".b.{owner}.part"
    file.write_text("half")
    (folder / "images").mkdir(parents=True)
    for path in (file, folder):
        os.utime(path, (time.time() - age * 86_400,) * 2)
    write_json(tmp_path / "a[1].json", 1)
    with atomic_folder(tmp_path / "b"):
        pass
    assert file.exists() == folder.exists() == (not removed)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with a file, links to it and to nothing, a FIFO."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/file").write_text("old")
    Path("link").symlink_to("folder/file")
    Path("dangling").symlink_to("folder/new")
    Path("loop").symlink_to("loop")
    os.mkfifo("fifo")
    Path("read-only").mkdir(mode=0o500)
    return tmp_path


@pytest.mark.parametrize("path, written", [
    ("a", "a"), ("new/deep/a", "new/deep/a"), ("link", "folder/file"), ("dangling", "folder/new"),
    ("folder/../a", "a"), ("a\n\udcff", "a\n\udcff"), ("x" * 180, "x" * 180)])
def test_file_is_written_where_the_links_lead(places, path, written):
    check_writable(path)
    before = sorted(places.rglob("*"))
    check_writable(path)
    assert sorted(places.rglob("*")) == before
    is_link = Path(path).is_symlink()
    write_json(path, "new")
    assert read_json(written) == "new" and Path(path).is_symlink() == is_link


@pytest.mark.parametrize("path, reason", [
    (".", "is not a file"), ("", "is not a file"), ("/", "is not a file"), ("..", "is not a file"),
    ("folder", "is not a file"), ("fifo", "is not a file"), ("loop", "is not a file"),
    ("/dev/null", "is not a file"), ("folder/file/a", "file/a: "), ("x" * 300, "too long"),
    ("/proc/none/a", "/proc/none/a: "), ("read-only/a", "Permission denied"),
])
def test_place_that_is_no_file_is_refused_before_and_while_writing(places, path, reason):
    if path == "read-only/a" and os.getuid() == 0:
        pytest.skip("root may write everywhere")
    kind = Path(path).lstat().st_mode if os.path.lexists(path) else None
    for write in (check_writable, lambda path: write_json(path, "new")):
        with pytest.raises(InputError, match=f"cannot write .*{reason}"):
            write(path)
    assert kind == (Path(path).lstat().st_mode if os.path.lexists(path) else None)


@pytest.mark.parametrize("path, good", [
    ("folder", True), ("new/deep", True), (".", True), ("folder/file", False), ("fifo", False),
    ("/dev/null", False), ("/proc/none", False), ("loop", False)])
def test_folder_is_writable_or_refused(places, path, good):
    with contextlib.nullcontext() if good else pytest.raises(InputError, match="cannot write"):
        check_writable(path, is_folder=True)


def test_folder_is_written_where_a_link_leads(places):
    Path("world").symlink_to("folder/world")
    with atomic_folder("world") as temp:
        (temp / "a").write_text("new")
    assert Path("world").is_symlink() and Path("folder/world/a").read_text() == "new"
    with pytest.raises(InputError, match="exists already"):
        with atomic_folder("world"):
            pass


def test_name_is_on_the_disk_before_a_write_returns(tmp_path, monkeypatch):
    events = []
    for name in ("replace", "rename", "fsync"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *arguments, real=real, name=name:
                            events.append(name) or real(*arguments))
    write_json(tmp_path / "a", 1)
    assert events == ["fsync", "replace", "fsync"]


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
    "", "{}", "[", "[1", "[1, 2", "[1, {]", "[1 x]", "[1x]", "[\xff]", '["\xff"]', "[" * 10**5,
    f"[{'1' * 5000}]"])
def test_file_that_is_not_a_json_list_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="a.json is not (a JSON list|JSON: .*)$"):
        list(read_json_list(tmp_path / "a.json"))


def test_wrong_item_is_found_without_reading_on(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[{'a': 1}," + "1," * 10**5)
    monkeypatch.setattr(io, "CHUNK", 100)
    calls, decode = [], io.decode_item
    with monkeypatch.context() as patch:
        patch.setattr(io, "decode_item", lambda *item: calls.append(1) or decode(*item))
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


SHAPE = {"id": int | str, "n?": range(1, 5), "x?": (0.0, 1.0), "box?": [float, float],
         "rows?": [{"name": str}], "by_name?": {str: bool}}


@pytest.mark.parametrize("value, error", [
    ({"id": 1}, None), ({"id": "1", "n": 4, "x": 1, "box": [1, 2.5], "more": None}, None),
    ({"id": 1, "n": None, "rows": [], "by_name": {}}, None),
    (3, "it must be an object, not 3"), ({}, "it has no 'id'"),
    ({"id": True}, "id must be an integer or a string, not true"),
    ({"id": 1.0}, "id must be an integer or a string, not 1.0"),
    ({"id": 1, "n": 5}, "n must be an integer from 1 to 4, not 5"),
    ({"id": 1, "x": float("nan")}, "x must be a number from 0 to 1, not nan"),
    ({"id": 1, "box": [1, 2, 3]}, "box must be a list of 2, not a list of 3"),
    ({"id": 1, "box": [1, 10**400]}, "box[1] must be a finite number, not 1" + 59 * "0" + "..."),
    ({"id": 1, "rows": [{"name": "a"}, {}]}, "rows[1] has no 'name'"),
    ({"id": 1, "by_name": {"a\n": 0}}, "by_name.'a\\n' must be true or false, not 0"),
])
def test_value_is_checked_against_its_shape(value, error):
    assert shape_error(value, SHAPE) == error


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("read", [
    read_json, lambda path: list(read_json_list(path)), lambda path: list(read_jsonl(path)),
    lambda path: read_json_item(path, 0, 1)])
def test_folders_fifos_and_devices_are_refused_without_reading_them(tmp_path, make, read):
    make(tmp_path / "a.json")
    with pytest.raises(InputError, match="a.json is not a file: a folder, FIFO or device"):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("name, path", [
    ("a.png", "a.png"), ("a/b.png", "a/b.png"), ("a/../b.png", "b.png"), ("./..a.png", "..a.png"),
    ("../a.png", None), ("a/../../b.png", None), ("/a.png", None), ("//a.png", None), ("..", None)])
def test_name_in_data_stays_inside_its_folder(tmp_path, name, path):
    if path:
        assert path_inside(tmp_path, name) == str(tmp_path / path)
        return
    with pytest.raises(InputError, match="is outside of .*: name files by their path in it"):
        path_inside(tmp_path, name)


def test_locked_file_is_refused_until_it_is_closed(tmp_path):
    pytest.importorskip("fcntl")
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        lock_file(first, "the ledger")
        with pytest.raises(InputError, match="the ledger is in use by another run"):
            lock_file(second, "the ledger")
        first.close()
        lock_file(second, "the ledger")


def test_folder_is_locked_until_its_run_ends_or_is_killed(tmp_path):
    pytest.importorskip("fcntl")
    program = f"""if True:
        import pathlib, time
        from nanollava.infra.io import locked_folder
        with locked_folder(pathlib.Path({str(tmp_path / "out")!r})):
            print(flush=True)
            time.sleep(60)"""
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE,
                           cwd=Path(__file__).parents[2])
    run.stdout.readline()
    with pytest.raises(InputError, match="out is in use by another run"):
        with locked_folder(tmp_path / "out"):
            pass
    run.kill()
    run.wait()
    assert os.listdir(tmp_path / "out") == [".lock"]
    with pytest.raises(RuntimeError):
        with locked_folder(tmp_path / "out"):
            raise RuntimeError  # before anything is written
    assert os.listdir(tmp_path) == []
    with locked_folder(tmp_path / "out"):
        (tmp_path / "out" / "a").touch()
    assert os.listdir(tmp_path / "out") == ["a"]
