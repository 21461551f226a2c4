import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanollava.infra import io
from nanollava.infra.io import (InputError, atomic_folder, atomic_write, check_writable, lock_file,
                                locked_folder, path_inside)
from nanollava.infra.json_io import read_json, write_json


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
