"""Downloads public weights from the Hugging Face hub, over plain HTTPS.

The hub lists the files of a repository as JSON, with sizes and SHA-256, and serves each at a URL.
Only the files of a model folder are downloaded: config.json, tokenizer.model, safetensors. Some
repositories (lmsys' Vicuna, OpenAI's CLIP) have pickles (*.bin) instead. Those are read without
running the code that a pickle may carry, and converted to safetensors.

A download that breaks off resumes where it stopped, in this run or in the next one. The folder
appears under its name when it is complete.
"""

import hashlib
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import requests
import torch

from ..infra import http
from ..infra.io import InputError, hash_file, lock_file
from ..infra.json_io import parse_json
from ..infra.shapes import check_shape
from ..infra.progress import Progress, print0
from .hf_config import without_weights
from .safetensors_io import write_tensors

HUB = "https://huggingface.co"
BLOCK = 1 << 16  # bytes written at a time; a broken connection loses less than one block
MAX_FAILURES = 6  # in a row


def check_commit(value) -> None:
    """A commit becomes a part of file names."""
    if not (isinstance(value, str) and re.fullmatch("[0-9a-f]{7,64}", value)):
        raise ValueError("is not a commit")


LISTING = {"sha": check_commit, "siblings": [{"rfilename": str}]}
ENTRY = {"size": range(2**63), "lfs?": {"sha256?": str}}  # of a file to download


@dataclass
class RemoteFile:
    url: str
    path: Path  # where it is downloaded to
    size: int
    sha256: str | None  # None where the hub lists none, as for small files

    def received(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def get(url: str, start: int = 0) -> requests.Response:
    """Send one request for a file from byte `start` on.

    Raises InputError where a retry cannot help, requests.RequestException where it may.
    """
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    auth = http.BearerAuth(http.read_api_key("HF_TOKEN"))
    reply = requests.get(url, headers=headers, auth=auth, stream=True, timeout=30)
    if reply.status_code in (401, 403):
        raise InputError(f"{url}: access denied ({reply.status_code}): the repository does not "
                         "exist, is private, or has terms to accept; accept them on its page and "
                         "set HF_TOKEN")
    if reply.status_code in (400, 404, 410):
        raise InputError(f"{url}: not found on the hub ({reply.status_code})")
    reply.raise_for_status()
    return reply


def retry(attempt, received=lambda: 0):
    """Call attempt() until the network does not fail, and return its result.

    received() is the number of bytes so far: after progress, failures are counted from one again.
    Raises InputError after MAX_FAILURES without progress.
    """
    failures, most = 0, received()
    while True:
        try:
            return attempt()
        except requests.RequestException as error:
            failures = 1 if received() > most else failures + 1
            most = max(most, received())
            if http.is_invalid_request(error) or failures > MAX_FAILURES:
                message = f"{error} (to resume the download, run the same command again)"
                raise InputError(message) from error
            if failures > 1:
                print0(f"{type(error).__name__}: attempt {failures} of {MAX_FAILURES} failed; "
                       "trying again")
            headers = getattr(error.response, "headers", None)
            time.sleep(http.retry_delay(failures, headers, "the hub"))


def select_files(names: list[str]) -> list[str]:
    """The files of a repository that make a model folder; safetensors rather than pickles.

    Raises InputError if there are no weights.
    """
    kinds = (r"model\.safetensors", r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
             r"pytorch_model(-\d+-of-\d+)?\.bin")
    matches = ([name for name in names if re.fullmatch(kind, name)] for kind in kinds)
    weights = next(filter(None, matches), [])
    if "config.json" not in names or not weights:
        # pickles are no reason: they would be converted
        others = [name for name in names if not name.startswith("pytorch_model")]
        reason = without_weights(others) or (
            "it has no config.json, or neither model*.safetensors nor pytorch_model*.bin")
        raise InputError(f"the repository is not a model folder: {reason}")
    return [name for name in ("config.json", "tokenizer.model") if name in names] + weights


def list_files(hub: str, repository: str, revision: str) -> tuple[str, dict[str, dict]]:
    """The commit of a branch, tag or commit, and the hub's entry of each file to download."""
    url = f"{hub}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    listing = parse_json(retry(lambda: http.read_body(get(url))), url, LISTING)
    siblings = {entry["rfilename"]: entry for entry in listing["siblings"]}
    entries = {}
    for name in select_files(list(siblings)):
        entry = siblings[name]
        check_shape(entry, ENTRY, f"{url}, {name}")
        entries[name] = {"size": entry["size"], "sha256": (entry.get("lfs") or {}).get("sha256")}
    return listing["sha"], entries


def download(file: RemoteFile, report) -> None:
    """Download the bytes of a file that are missing. report() is called for each block.

    Raises InputError if size or SHA-256 is wrong even after a second download.
    """
    def attempt():
        start = file.received()
        if start >= file.size:
            return
        with get(file.url, start) as reply, open(file.path, "ab") as output:
            if start and reply.status_code != 206:  # the server ignores Range and sends everything
                start = 0
                output.truncate(start)
            for block in reply.iter_content(BLOCK):
                output.write(block)
                report()
                start += len(block)
                if start > file.size:  # it may never end
                    break
            os.fsync(output.fileno())
        if file.received() < file.size:
            raise requests.ConnectionError(
                f"{file.url} broke off after {file.received()} of {file.size} bytes")

    for _ in range(2):
        retry(attempt, file.received)
        sha256 = hash_file(hashlib.sha256(), file.path).hexdigest()
        if file.received() == file.size and file.sha256 in (None, sha256):
            return
        file.path.unlink()  # an earlier run may have left wrong bytes
    raise InputError(f"{file.url}: the download does not have the size or SHA-256 that the hub "
                     f"announces ({file.size} bytes, {file.sha256})")


def fetch(repository: str, out: Path, revision: str = "main") -> None:
    """Download a repository ("lmsys/vicuna-7b-v1.5") at a branch, tag or commit to folder `out`."""
    out = out.resolve()
    if out.exists():
        raise InputError(f"{out} exists already; remove it or choose another --out")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repository):
        raise InputError(f"{repository} is not OWNER/NAME, as in lmsys/vicuna-7b-v1.5")
    hub = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    address = http.parse_address(hub, "HF_ENDPOINT")
    with http.secrets_hidden(http.find_secrets(http.read_api_key("HF_TOKEN"), address)):
        fetch_from(hub, repository, out, revision)


def fetch_from(hub: str, repository: str, out: Path, revision: str) -> None:
    commit, entries = list_files(hub, repository, revision)
    # The commit is part of the name, so files of two revisions never mix.
    partial = out.with_name(f".{out.name}.{commit[:12]}.part")
    model = partial / "model"
    model.mkdir(parents=True, exist_ok=True)
    files = [RemoteFile(f"{hub}/{repository}/resolve/{commit}/{name}",
                        (partial if name.endswith(".bin") else model) / name, **entry)
             for name, entry in entries.items()]
    with open(partial / "lock", "w") as lock:
        lock_file(lock, out)
        for stray in {*model.iterdir()} - {file.path for file in files}:
            stray.unlink()  # left by a conversion that was killed
        check_disk_space(files, out)
        download_all(files, repository)
        pickles = sorted(partial.glob("*.bin"))
        if pickles:
            convert_pickles(pickles, model)
        model.rename(out)
    shutil.rmtree(partial)


def download_all(files: list[RemoteFile], label: str) -> None:
    def megabytes() -> int:
        return sum(file.received() for file in files) // 10**6

    total = sum(file.size for file in files) // 10**6
    with Progress(label, total, "MB", initial=megabytes()) as progress:
        for file in files:
            download(file, lambda: progress.update(megabytes()))


def check_disk_space(files: list[RemoteFile], out: Path) -> None:
    """Raises InputError if the rest of the download, and the conversion of pickles, do not fit."""
    missing = sum(file.size - file.received() for file in files)
    missing += sum(file.size for file in files if file.path.suffix == ".bin")
    free = shutil.disk_usage(out.parent).free
    if missing > free:
        raise InputError(f"{out}: {missing / 1e9:.1f} GB are needed, but only {free / 1e9:.1f} GB "
                         "of the disk are free")


def convert_pickles(paths: list[Path], folder: Path) -> None:
    """Convert pickled tensors to safetensors in a folder.

    Raises InputError if a file holds anything but tensors.
    """
    tensors = {}
    for path in paths:
        tensors |= load_pickle(path)
    # safetensors refuses two tensors that share memory: all but one of them are copied
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if owners[tensor.untyped_storage().data_ptr()] != name:
            tensors[name] = tensor.clone()
    write_tensors(folder, tensors)


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """With `weights_only`, torch.load unpickles tensors and runs no other code."""
    try:
        try:
            # memory-mapped, so that the weights need not fit in memory
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files older than PyTorch 1.6 cannot be mapped
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise ValueError("some values are not tensors")
    except Exception as error:  # torch.load raises errors of many types
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is broken or holds more than weights: {reason}") from error
    return tensors
