"""Public weights from the Hugging Face hub, over plain HTTPS.

The hub lists a repository's files as JSON, with their sizes and SHA-256, and serves each at one address. Only what
a model folder needs is taken: config.json, tokenizer.model, safetensors. Some folders (the lmsys Vicuna, OpenAI's
CLIP) have pickles (*.bin) instead: those are read without executing anything and rewritten as safetensors.

A download that breaks off goes on where it stopped, in this run or the next; the folder appears when it is whole.
"""

import hashlib
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import requests
import torch

from ..infra.http import BearerAuth, is_invalid_request, read_api_key, retry_delay
from ..infra.io import InputError, lock_file
from ..infra.progress import Progress
from .hf_format import write_tensors

HUB = "https://huggingface.co"
BLOCK = 1 << 16  # bytes; so much of what came last is lost where a connection breaks
ATTEMPTS = 6  # that may fail in a row


def get(url: str, start: int = 0) -> requests.Response:
    """The answer to one request for a file from byte `start` on.

    Raises InputError for what asking again would not change, requests.RequestException for what it may.
    """
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    answer = requests.get(url, headers=headers, auth=BearerAuth(read_api_key("HF_TOKEN")), stream=True, timeout=30)
    if answer.status_code in (401, 403):
        raise InputError(f"{url}: the hub refuses ({answer.status_code}): there is no such repository, or it is "
                         "private or asks for consent: give that on its page and set HF_TOKEN")
    if answer.status_code in (400, 404, 410):
        raise InputError(f"{url}: the hub has no such thing ({answer.status_code})")
    answer.raise_for_status()
    return answer


def patiently(attempt, come=lambda: 0):
    """attempt(), again after a while as long as the network fails. Where come(), the bytes that have come, is more than
    ever before, failures are counted from one again."""
    failures, most = 0, come()
    while True:
        try:
            return attempt()
        except requests.RequestException as error:
            failures = 1 if come() > most else failures + 1
            most = max(most, come())
            if is_invalid_request(error) or failures > ATTEMPTS:
                raise InputError(f"{error} (the same command goes on where it stopped)") from error
            time.sleep(retry_delay(failures, getattr(error.response, "headers", None)))


def needed(names: list[str]) -> list[str]:
    """Of a repository's files those that make a model folder. Raises InputError where there are no weights."""
    kinds = (r"model\.safetensors", r"model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)",
             r"pytorch_model(-\d+-of-\d+)?\.bin")
    weights = next(filter(None, ([name for name in names if re.fullmatch(kind, name)] for kind in kinds)), [])
    if "config.json" not in names or not weights:
        raise InputError("the repository is no model folder: it lacks config.json, or *.safetensors and *.bin")
    return [name for name in ("config.json", "tokenizer.model") if name in names] + weights


def download(url: str, path: Path, size: int, sha256: str | None, report) -> None:
    """One file, from where an earlier attempt stopped. report() is called as bytes come.

    Raises InputError if its size or its SHA-256 is wrong even after a second download.
    """
    def attempt():
        start = size_of(path)
        if start >= size:
            return
        with get(url, start) as answer, open(path, "ab") as file:
            if start and answer.status_code != 206:  # the server sends all of it again
                file.truncate(0)
            for block in answer.iter_content(BLOCK):
                file.write(block)
                report()
            os.fsync(file.fileno())
        if size_of(path) < size:
            raise requests.ConnectionError(f"{url} broke off after {size_of(path)} of {size} bytes")

    for _ in range(2):
        patiently(attempt, lambda: size_of(path))
        if size_of(path) == size and sha256 in (None, sha256_of(path)):
            return
        path.unlink()  # perhaps a broken piece of an earlier attempt
    raise InputError(f"{url}: what comes is not what the hub announces ({size} bytes, SHA-256 {sha256})")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(repository: str, out: Path, revision: str = "main") -> None:
    """The model folder of a repository ("lmsys/vicuna-7b-v1.5") at a branch, tag or commit, to `out`."""
    out = out.resolve()
    if out.exists():
        raise InputError(f"{out} is there already; remove it or choose another --out")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"{repository} is no repository: say OWNER/NAME, as in lmsys/vicuna-7b-v1.5")
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    address = f"{hub}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    listing = patiently(lambda: get(address).json())
    try:
        files, commit = {row["rfilename"]: row for row in listing["siblings"]}, str(listing["sha"])
        names = needed(list(files))
        sizes = {name: int(files[name]["size"]) for name in names}
        digests = {name: (files[name].get("lfs") or {}).get("sha256") for name in names}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{address}: this is not what a hub answers ({type(error).__name__}: {error})") from error

    # what has come so far waits beside `out`, under the commit's name: another revision would not mix with it
    waiting = out.with_name(f".{out.name}.{commit[:12]}.part")
    whole, pickles = waiting / "whole", waiting / "pickles"
    for folder in (whole, pickles):
        folder.mkdir(parents=True, exist_ok=True)
    place = {name: (pickles if name.endswith(".bin") else whole) / name for name in names}

    def come() -> int:
        return sum(map(size_of, place.values())) // 10**6

    with open(waiting / "lock", "w") as file:
        lock_file(file, out)
        for stray in {*whole.iterdir()} - {*place.values()}:  # of a conversion that was killed
            stray.unlink()
        missing = sum(sizes[name] * (1 + name.endswith(".bin")) - size_of(place[name]) for name in names)
        free = shutil.disk_usage(waiting).free
        if missing > free:
            raise InputError(f"{out}: {missing / 1e9:.1f} GB are to come, but the disk has {free / 1e9:.1f} GB left")
        with Progress(repository, sum(sizes.values()) // 10**6, "MB", come()) as progress:
            for name in names:
                download(f"{hub}/{repository}/resolve/{commit}/{name}", place[name], sizes[name], digests[name],
                         lambda: progress.update(come()))
        if any(pickles.iterdir()):
            unpickle(sorted(pickles.iterdir()), whole)
        whole.rename(out)
    shutil.rmtree(waiting)


def unpickle(paths: list[Path], folder: Path) -> None:
    """Pickled tensors to safetensors in a folder; memory-mapped, so that what is read is written and forgotten."""
    tensors = {}
    for path in paths:
        try:
            try:
                part = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
                part = torch.load(path, map_location="cpu", weights_only=True)
            if not all(isinstance(tensor, torch.Tensor) for tensor in part.values()):
                raise ValueError("not all of it is tensors")
        except Exception as error:  # torch.load raises whatever its parts raise
            raise InputError(f"{path} holds more than weights, or is broken: {str(error).splitlines()[0]}") from error
        tensors |= part
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    write_tensors(folder, {name: tensor if owners[tensor.untyped_storage().data_ptr()] == name else tensor.clone()
                           for name, tensor in tensors.items()})  # safetensors refuses two names for one memory
