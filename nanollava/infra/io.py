"""Files that appear whole or not at all, locks, and paths that come from data. And InputError, an
error that the user can fix."""

import contextlib
import fcntl
import glob
import os
import platform
import re
import shutil
import time
from pathlib import Path

LOCK = ".lock"  # in a folder that a run writes to
HOST = platform.node()[:32]
PART_OWNER = re.compile(r"\.(\d{1,8})(?:@(.*))?\.part$")  # process, machine
INPUTS = set()  # the `file_id` of each file that was read
CHUNK = 2**20  # bytes of a large file that are read at a time


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: what it is, what to do."""


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path in the folder of `path`, to be written; then rename it to `path`.

    A reader sees the old file or the new one, never half of it, even after a crash. A link keeps
    its place: the file that it leads to is written.
    Raises InputError if the file cannot be written, or is none: a folder, a device, a FIFO.
    """
    path = link_target(path)
    temp = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.touch()
        mode = temp.stat().st_mode
        yield temp
        temp.chmod(mode)  # safetensors creates files that only their owner can read
        with open(temp, "rb") as file:
            os.fsync(file.fileno())  # the content must be on the disk before the name is
        os.replace(temp, path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


@contextlib.contextmanager
def atomic_folder(folder: str | Path):
    """Yield a temporary folder next to `folder`, to be filled; then rename it to `folder`.

    Raises InputError if the folder exists already or cannot be written.
    """
    if os.path.exists(folder):
        raise InputError(f"{folder} exists already; remove it or choose another --out")
    folder = Path(os.path.realpath(folder))
    temp = temporary_path(folder)
    try:
        temp.mkdir(parents=True)
        yield temp
        temp.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def link_target(path: str | Path) -> Path:
    """The file that a path leads to, whether it exists or not.

    Raises InputError if it is no file: a rename would replace a device, /dev/stdout for example.
    """
    path, target = Path(path), os.path.realpath(path)
    if not os.path.isfile(path) and (os.path.exists(path) or os.path.islink(target)):
        raise InputError(f"cannot write {path}: it is not a file")
    return Path(target)


def check_writable(path: str | Path, is_folder: bool = False) -> None:
    """Raise InputError if a file cannot be written to `path`, or a file into a folder `path`.

    Creates the temporary file of `atomic_write`, in the nearest folder that exists, and removes it.
    """
    target = Path(os.path.realpath(path), "config.json") if is_folder else link_target(path)
    try:
        folder = next(folder for folder in target.parents if os.path.lexists(folder))
        temp = temporary_path(folder / target.name)
        temp.touch()
        temp.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    with contextlib.suppress(OSError):  # some network disks cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """A hidden name in the same folder, so on the same disk, where a rename is one step.

    It names this process and machine. What killed runs left under such names is removed here.
    """
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError):  # another user's, or removed by another run
            if is_abandoned(part):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}@{HOST}.part")


def is_abandoned(part: Path) -> bool:
    """Whether the process that wrote a `.NAME.PID@HOST.part` is gone.

    The disk may be shared with machines whose processes cannot be looked up, and older versions
    did not name the machine: such a part is abandoned when it was not written to for a day.
    """
    match = PART_OWNER.search(part.name)
    if not match:
        return False
    pid, host = int(match[1]), match[2]
    if host == HOST:
        try:
            os.kill(pid, 0)  # sends no signal, only looks for the process
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process
            return False
        return pid == os.getpid()  # this process does not write one file twice at the same time
    return time.time() - part.stat().st_mtime > 86_400


def check_regular_file(path: str | Path) -> None:
    """Raise InputError if `path` is a folder, FIFO, device or socket: reading may never end.

    The reader itself reports a missing file.
    """
    if not os.path.isfile(path) and os.path.exists(path):
        raise InputError(f"{path} is not a file: a folder, FIFO or device is not read")


def path_inside(folder: str | Path, name: str) -> str:
    """The path of a file in a folder, for a name that comes from data.

    Raises InputError if the name is absolute or leads out of the folder by `..`. Only the name is
    checked: the folder and what is in it may be links, to another disk for example.
    """
    normal = os.path.normpath(name)
    if os.path.splitdrive(normal)[0] or f"{normal}{os.sep}".startswith((os.sep, f"..{os.sep}")):
        raise InputError(f"{name!r} is outside of {folder}: name files by their path in it")
    return os.path.join(folder, normal)


@contextlib.contextmanager
def reading(path: str | Path):
    """Turn errors of reading a file into InputError."""
    check_regular_file(path)
    try:
        INPUTS.add(file_id(path))
        yield
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def file_id(path: str | Path) -> tuple[int, int]:
    """Equal for two names of one file."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def check_not_input(path: str | Path) -> None:
    """Raise InputError if this process has read the file: a result must not replace its input."""
    if os.path.exists(path) and file_id(path) in INPUTS:
        raise InputError(f"--out {path} is an input of this command: choose another")


def file_version(path: str | Path) -> tuple[int, int]:
    """Size and time of the last change: while they stay, the content has not changed.

    Raises InputError if the file cannot be read.
    """
    with reading(path):
        status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def hash_file(digest, path: str | Path):
    """Feed a file to a `hashlib` object chunk by chunk and return it."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest


def lock_file(file, name: str | Path) -> None:
    """Lock an open file until it is closed. Raises InputError if another run holds the lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        message = f"{name} is in use by another run: wait for that run, or choose another --out"
        raise InputError(message) from error


@contextlib.contextmanager
def locked_folder(folder: Path):
    """Make a folder, and keep other runs out of it until the end, however this process ends.

    Raises InputError if another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        lock_file(file, folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
                folder.rmdir()  # only if nothing was written to it
