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

from .checkpoint import write_tensors
from .files import InputError
from .progress import Progress

HUB = "https://huggingface.co"
BLOCK = 1 << 16  # bytes; so much of what came last is lost where a connection breaks
WAITS = (1, 2, 4, 8, 16, 32)  # seconds between attempts; so many may fail in a row


def get(url: str, start: int = 0) -> requests.Response:
    """The answer to one request for a file from byte `start` on.

    Raises InputError for what asking again would not change, requests.RequestException for what it may.
    """
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"} if start else {"Accept-Encoding": "identity"}
    if os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"
    answer = requests.get(url, headers=headers, stream=True, timeout=30)
    if answer.status_code in (401, 403):
        raise InputError(f"{url}: the hub refuses ({answer.status_code}): there is no such repository, or it is private "
                         "or asks for consent: give that on its page and set HF_TOKEN")
    if 400 <= answer.status_code < 500 and answer.status_code not in (408, 416, 429):
        raise InputError(f"{url}: the hub has no such thing ({answer.status_code})")
    if answer.status_code != 416:  # nothing is left beyond `start`
        answer.raise_for_status()
    return answer


def patiently(attempt, progressed=lambda: False):
    """attempt(), again after a while as long as the network fails; a failure after some progress does not count."""
    failures = 0
    while True:
        try:
            return attempt()
        except requests.RequestException as error:
            failures = 1 if progressed() else failures + 1
            if failures > len(WAITS):
                raise InputError(f"{error} (the same command goes on where it stopped)") from error
            answer = error.response
            asked = answer.headers.get("Retry-After", "") if answer is not None else ""
            time.sleep(min(int(asked), 300) if asked.isdigit() else WAITS[failures - 1])


def needed(names: list[str]) -> list[str]:
    """Of a repository's files those that make a model folder. Raises InputError where there are no weights."""
    weights = [name for name in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]
    weights = weights or [name for name in names if re.fullmatch(r"pytorch_model(-\d+-of-\d+)?\.bin", name)]
    if "config.json" not in names or not weights:
        raise InputError("the repository is no model folder: it lacks config.json, or weights as *.safetensors or *.bin")
    return [name for name in ("config.json", "tokenizer.model") if name in names] + weights


def download(url: str, path: Path, size: int, sha256: str | None, report) -> None:
    """One file, from where an earlier attempt stopped. report(bytes that have come) is called now and then.

    Raises InputError if its size or its SHA-256 is wrong even after a second download.
    """
    before = size_of(path)

    def attempt():
        start = size_of(path)
        if start >= size:
            return
        with get(url, start) as answer, open(path, "ab") as file:
            if start and answer.status_code != 206:  # the server sends all of it again
                file.truncate(0)
            for block in answer.iter_content(BLOCK):
                file.write(block)
                report(file.tell())
        if size_of(path) < size:
            raise requests.ConnectionError(f"{url} broke off after {size_of(path)} of {size} bytes")

    def progressed():
        nonlocal before
        before, last = size_of(path), before
        return before > last

    for _ in range(2):
        patiently(attempt, progressed)
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
    if out.exists():
        raise InputError(f"{out} is there already; remove it or choose another --out")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise InputError(f"{repository} is no repository: say OWNER/NAME, as in lmsys/vicuna-7b-v1.5")
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    listing = patiently(lambda: get(f"{hub}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true").json())
    files, commit = {row["rfilename"]: row for row in listing["siblings"]}, listing["sha"]
    names = needed(list(files))

    # what has come so far waits beside `out`, under the commit's name: another revision would not mix with it
    waiting = out.with_name(f".{out.name}.{commit[:12]}.part")
    whole, pickles = waiting / "whole", waiting / "pickles"
    for folder in (whole, pickles):
        folder.mkdir(parents=True, exist_ok=True)
    place = {name: (pickles if name.endswith(".bin") else whole) / name for name in names}
    missing = sum(files[name]["size"] * (1 + name.endswith(".bin")) - size_of(place[name]) for name in names)
    free = shutil.disk_usage(waiting).free
    if missing > free:
        raise InputError(f"{out}: {missing / 1e9:.1f} GB are to come, but the disk has {free / 1e9:.1f} GB left")

    total, come = sum(files[name]["size"] for name in names), sum(map(size_of, place.values()))
    done = 0
    with Progress(repository, total // 10**6, "MB", come // 10**6) as progress:
        for name in names:
            download(f"{hub}/{repository}/resolve/{commit}/{name}", place[name], files[name]["size"],
                     (files[name].get("lfs") or {}).get("sha256"),
                     lambda now: progress.update((done + now) // 10**6))
            done += files[name]["size"]
            progress.update(done // 10**6)
    if any(pickles.iterdir()):
        unpickle(sorted(pickles.iterdir()), whole)
    whole.rename(out)
    shutil.rmtree(waiting)


def unpickle(paths: list[Path], folder: Path) -> None:
    """Pickled tensors to safetensors in a folder; memory-mapped, so that what is read is written and forgotten."""
    tensors = {}
    for path in paths:
        try:
            tensors |= torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load raises whatever its parts raise
            raise InputError(f"{path} holds more than weights, or is broken: {str(error).splitlines()[0]}") from error
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in tensors.items()}
    write_tensors(folder, {name: tensor if owners[tensor.untyped_storage().data_ptr()] == name else tensor.clone()
                           for name, tensor in tensors.items()})  # safetensors refuses two names for one memory
