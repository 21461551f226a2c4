"""Downloads from a local server that breaks off, sends wrong bytes, redirects and refuses."""

import hashlib
import io
import json
import threading
from http.server import ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save

from nanollava import Llava, Tokenizer
from nanollava.infra import http
from nanollava.infra.io import InputError
from nanollava.weights import hub
from tests.infra.handler import ReplyHandler

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = {"a": torch.arange(50_000.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
REFUSED = {401: "set HF_TOKEN", 403: "set HF_TOKEN", 404: "not found on the hub"}


class Hub(ThreadingHTTPServer):
    """Serves `files` (name -> bytes) of the repository someone/model.

    `faults` says what goes wrong with the next downloads, one by one, `fault` with every request.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"config.json": b"{}", "tokenizer.model": b"pieces",
                      "model.safetensors": save(WEIGHTS), "README.md": b"read me",
                      "pytorch_model.bin": b"pickled", "tf_model.h5": b"other"}
        self.faults, self.fault, self.listing, self.reason = [], None, None, None
        self.requests, self.keys = [], []

    def list_files(self):
        siblings = [{"rfilename": name, "size": len(content),
                     "lfs": {"sha256": hashlib.sha256(content).hexdigest()}}
                    for name, content in self.files.items()]
        return json.dumps({"sha": COMMIT, "siblings": siblings}).encode()


class Handler(ReplyHandler):
    def do_GET(self):
        hub = self.server
        fault = hub.faults.pop(0) if hub.faults and "/resolve/" in self.path else hub.fault
        hub.keys.append(self.headers.get("Authorization"))
        if fault == "broken redirect":
            location = "ftp://other:letmein@host/x?signature=hf_secret"
            return self.send(302, b"", {"Location": location})
        if isinstance(fault, int) and hub.reason:
            return self.send_error(fault, hub.reason)
        if isinstance(fault, int):
            return self.send(fault, b"", {"Retry-After": "7"} if fault == 429 else {})
        if self.path.startswith("/api/models/someone/model/revision/main"):
            return self.send(200, hub.listing or hub.list_files())
        if not self.path.startswith((f"/someone/model/resolve/{COMMIT}/", "/elsewhere/")):
            return self.send(404, b"")
        name = self.path.rpartition("/")[2]
        if fault == "redirect":
            return self.send(302, b"", {"Location": f"/elsewhere/{name}"})
        self.send_file(name, fault)

    def send_file(self, name, fault):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.server.requests.append((name, start))
        content = self.server.files[name]
        if fault == "wrong bytes":
            content = bytes(len(content))
        if fault == "ignore range":
            return self.send(200, content)
        if start >= len(content):
            return self.send(416, b"<xml>InvalidRange</xml>")
        rest = content[start:]
        sent = rest[: len(rest) // 2] if fault == "break" else rest
        self.send(206 if start else 200, sent, length=len(rest))


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    poll = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=poll, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def delays(monkeypatch):
    """No test waits; the delays are recorded."""
    delays = []
    monkeypatch.setattr(hub.time, "sleep", delays.append)
    return delays


def test_only_the_files_of_a_model_folder_are_downloaded(server, tmp_path):
    hub.fetch("someone/model", tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "tokenizer.model", "model.safetensors"}
    for path in (tmp_path / "model").iterdir():
        assert path.read_bytes() == server.files[path.name]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("names, selected", [
    (["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], ["model.safetensors"]),
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
      "model.safetensors.index.json"],
     ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
      "model.safetensors.index.json"]),
    (["model.safetensors", "model-00001-of-00002.safetensors"], ["model.safetensors"]),
    (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin"],
     ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
    (["tokenizer.model", "model.safetensors", "tokenizer.json"],
     ["tokenizer.model", "model.safetensors"]),
])
def test_safetensors_are_preferred_to_pickles(names, selected):
    assert hub.select_files([*names, "config.json"]) == ["config.json", *selected]


@pytest.mark.parametrize("names", [["config.json", "README.md"], ["model.safetensors"]])
def test_repository_without_a_model_is_refused(names):
    with pytest.raises(InputError, match="not a model folder"):
        hub.select_files(names)


def test_broken_connection_resumes_where_it_stopped(server, tmp_path, delays):
    server.faults = [None, None, "break", "break"]
    hub.fetch("someone/model", tmp_path / "model")
    starts = [start for name, start in server.requests if name == "model.safetensors"]
    assert starts == [0, hub.BLOCK, 2 * hub.BLOCK]  # of 200,190 bytes, half of the rest each time
    assert len(delays) == 2 and all(1 < delay <= 1.5 for delay in delays)  # as after one failure
    assert load_file(tmp_path / "model" / "model.safetensors")["a"].equal(WEIGHTS["a"])


def test_stopped_run_resumes_in_the_next_run(server, tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    server.faults = [None, None, "break"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub.time, "sleep", stop)
        hub.fetch("someone/model", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    server.requests.clear()
    hub.fetch("someone/model", tmp_path / "model")
    assert server.requests == [("model.safetensors", hub.BLOCK)]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_server_that_ignores_the_range_is_read_from_the_start(server, tmp_path):
    server.faults = [None, None, "break", "ignore range"]
    hub.fetch("someone/model", tmp_path / "model")
    starts = [start for name, start in server.requests if name == "model.safetensors"]
    assert starts == [0, hub.BLOCK]  # two requests: the second reply was right
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert content == server.files["model.safetensors"]


def test_wrong_bytes_are_downloaded_again_once(server, tmp_path):
    server.faults = [None, None, "wrong bytes"]
    hub.fetch("someone/model", tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert content == server.files["model.safetensors"]
    server.faults = [None, None, "wrong bytes", "wrong bytes"]
    with pytest.raises(InputError, match="model.safetensors: the download does not have the size"):
        hub.fetch("someone/model", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_file_shorter_than_announced_is_given_up(server, tmp_path, delays):
    """The server replies 416 to a request for bytes behind the end."""
    url = f"http://127.0.0.1:{server.server_port}/someone/model/resolve/{COMMIT}/model.safetensors"
    size = len(server.files["model.safetensors"]) + 10
    with pytest.raises(InputError):
        hub.download(hub.RemoteFile(url, tmp_path / "file", size, None), lambda: None)
    assert len(delays) <= 2 * hub.MAX_FAILURES


def listing_of(sha=COMMIT, **entry):
    siblings = [{"rfilename": name, "size": 9} | entry
                for name in ("config.json", "model.safetensors")]
    return json.dumps({"sha": sha, "siblings": siblings}).encode()


@pytest.mark.parametrize("listing", [
    b"[]", b"{}", b'{"sha": "a", "siblings": [{"rfilename": "config.json"}]}', b"3",
    b"<html>Sign in</html>", b"\xff", b"[" * 9999, b'{"sha": ' + b"1" * 5000 + b"}",
    listing_of(sha="../../etc"), listing_of(sha=None), listing_of(sha=10**9),
    listing_of(sha=""), listing_of(size="9"),
    listing_of(size=-9), listing_of(size=1e999), listing_of(size=10**20), listing_of(size=None),
    listing_of(lfs=[]), listing_of(lfs={"sha256": 7}), listing_of(rfilename=7),
    listing_of(rfilename=["config.json"]),
])
def test_reply_of_another_kind_of_server_is_refused(server, tmp_path, delays, listing):
    server.listing = listing
    with pytest.raises(InputError, match="someone/model/revision/main|not a model folder"):
        hub.fetch("someone/model", tmp_path / "model")
    assert not list(tmp_path.iterdir()) and not delays


def test_endless_listing_is_not_read_to_the_end(server, tmp_path, monkeypatch):
    monkeypatch.setattr(http, "MAX_BODY", 1 << 20)
    server.listing = b" " * (2 << 20) + server.list_files()
    with pytest.raises(InputError, match="revision/main.* sends more than 1 MB"):
        hub.fetch("someone/model", tmp_path / "model")


def test_file_longer_than_announced_is_not_read_to_the_end(server, tmp_path):
    url = f"http://127.0.0.1:{server.server_port}/someone/model/resolve/{COMMIT}/model.safetensors"
    path, sizes = tmp_path / "file", []
    with pytest.raises(InputError, match="does not have the size"):
        hub.download(hub.RemoteFile(url, path, 10, None),
                     lambda: sizes.append(path.stat().st_size))
    assert len(sizes) == 2  # blocks, one in each of two downloads


@pytest.mark.parametrize("fault, status", [
    (None, None), ("no entry for hf_secret", 500), ("hf_secret", 401), ("letmein", 404)])
def test_token_and_password_are_in_no_message(
        server, tmp_path, monkeypatch, capsys, fault, status):
    """The server repeats them in its reason and in the address that it redirects to."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:letmein@127.0.0.1:{server.server_port}")
    server.reason, server.fault = fault, status or "broken redirect"
    with pytest.raises(InputError) as caught:
        hub.fetch("someone/model", tmp_path / "model")
    message = str(caught.value) + capsys.readouterr().err
    assert "//" in message
    assert not any(secret in message for secret in ("hf_secret", "letmein", "signature"))


@pytest.mark.parametrize("endpoint", ["huggingface.co", "http//me:letmein@host", "file:///etc"])
def test_endpoint_must_be_an_address(tmp_path, monkeypatch, endpoint):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(InputError, match="HF_ENDPOINT is not the address of a server") as caught:
        hub.fetch("someone/model", tmp_path / "model")
    assert "letmein" not in str(caught.value)


def test_files_of_a_killed_conversion_are_removed(server, tmp_path):
    partial = tmp_path / f".model.{COMMIT[:12]}.part" / "model"
    partial.mkdir(parents=True)
    (partial / ".model.safetensors.1.part").write_bytes(b"half")
    hub.fetch("someone/model", tmp_path / "model")
    assert not list((tmp_path / "model").glob(".*"))


def test_second_run_into_the_same_folder_is_refused(server, tmp_path, monkeypatch):
    def start_second_run(_):
        with pytest.raises(InputError, match="model is in use by another run"):
            hub.fetch("someone/model", tmp_path / "model")

    server.faults = [None, None, "break"]
    monkeypatch.setattr(hub.time, "sleep", start_second_run)  # while the first run waits
    hub.fetch("someone/model", tmp_path / "model")
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert content == server.files["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_redirect_is_followed(server, tmp_path):
    server.faults = ["redirect"]
    hub.fetch("someone/model", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == b"{}"


def test_delay_is_as_long_as_the_hub_asks_for(server, tmp_path, delays):
    server.faults = [429, 503]
    hub.fetch("someone/model", tmp_path / "model")
    assert 7 < delays[0] <= 10.5 and 2 < delays[1] <= 3


def test_failing_hub_is_given_up_after_six_retries(server, tmp_path, delays):
    server.fault = 500
    with pytest.raises(InputError, match="500 .*run the same command again"):
        hub.fetch("someone/model", tmp_path / "model")
    assert len(delays) == 6
    assert all(2**n < delay <= 1.5 * 2**n for n, delay in enumerate(delays))


@pytest.mark.parametrize("code", REFUSED)
def test_refusal_is_not_retried(server, tmp_path, delays, code):
    server.fault = code
    with pytest.raises(InputError, match=REFUSED[code]):
        hub.fetch("someone/model", tmp_path / "model")
    assert delays == [] and not list(tmp_path.iterdir())


def test_token_is_sent_and_not_written(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fetch("someone/model", tmp_path / "model")
    assert set(server.keys) == {"Bearer hf_secret"}
    assert not any(b"hf_secret" in path.read_bytes() for path in (tmp_path / "model").iterdir())


@pytest.mark.parametrize("name", [
    "model", "a/b/c", "../x", "a/..", "../../x", "https://huggingface.co/a/b"])
def test_name_that_is_not_a_repository_is_refused(name, tmp_path):
    with pytest.raises(InputError, match="OWNER/NAME"):
        hub.fetch(name, tmp_path / "model")


def test_existing_folder_is_kept(tmp_path):
    with pytest.raises(InputError, match="exists already"):
        hub.fetch("someone/model", tmp_path)


@pytest.mark.parametrize("weights, copies", [("model.safetensors", 1), ("pytorch_model.bin", 2)])
def test_too_small_disk_is_reported_before_the_download(
        server, tmp_path, monkeypatch, weights, copies):
    """A pickle needs its size again for the conversion."""
    server.files = {name: server.files[name] for name in ("config.json", weights)}
    needed = len(server.files["config.json"]) + copies * len(server.files[weights])
    usage = SimpleNamespace(free=needed - 1)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="GB of the disk are free"):
        hub.fetch("someone/model", tmp_path / "model")
    assert server.requests == []


def test_pickles_are_converted_to_safetensors(server, tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "saved", [tokenizer.path])
    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    names = sorted(tensors)
    server.files = {name: (tmp_path / "saved" / name).read_bytes()
                    for name in ("config.json", "tokenizer.model")}
    for number, shard in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: tensors[name] for name in shard}, tmp_path / "shard.bin")
        content = (tmp_path / "shard.bin").read_bytes()
        server.files[f"pytorch_model-0000{number}-of-00002.bin"] = content
    hub.fetch("someone/model", tmp_path / "model")
    again = Llava.from_pretrained(tmp_path / "model").state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert len(Tokenizer(tmp_path / "model")) == len(tokenizer)
    assert not list((tmp_path / "model").glob("*.bin"))


def test_llava_of_the_original_code_is_downloaded(server, tmp_path, original, clip):
    """As liuhaotian/llava-v1.5-7b: pickles, the projector once more, and no vision tower."""
    content = io.BytesIO()
    torch.save(load_file(original / "model.safetensors"), content)
    server.files = {"config.json": (original / "config.json").read_bytes(),
                    "tokenizer.model": (original / "tokenizer.model").read_bytes(),
                    "pytorch_model.bin": content.getvalue(), "mm_projector.bin": b"never read"}
    hub.fetch("someone/model", tmp_path / "model")
    assert "mm_projector.bin" not in [name for name, _ in server.requests]
    downloaded = Llava.from_pretrained(tmp_path / "model", vision_tower=clip).state_dict()
    expected = Llava.from_pretrained(original, vision_tower=clip).state_dict()
    assert all(torch.equal(downloaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("names, message", [
    (["pytorch_model.bin", "README.md"], "it has no config.json"),  # pickles are downloaded
    (["config.json", "mm_projector.bin"], "mm_projector.bin is the projector alone"),
    (["config.json", "adapter_config.json", "non_lora_trainables.bin"], "it is a LoRA adapter")])
def test_parts_of_a_llava_are_refused_with_what_to_do(names, message):
    with pytest.raises(InputError, match=f"the repository is not a model folder: {message}"):
        hub.select_files(names)


def test_tensors_that_share_memory_are_written_separately(tmp_path):
    tensor = torch.randn(4, 4)
    shared = {"embed": tensor, "head": tensor, "part": tensor[:2]}
    torch.save(shared, tmp_path / "pytorch_model.bin")
    hub.convert_pickles([tmp_path / "pytorch_model.bin"], tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert all(written[name].equal(tensor) for name, tensor in shared.items())


def test_pickle_of_the_oldest_format_is_read(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    hub.convert_pickles([path], tmp_path)
    assert load_file(tmp_path / "model.safetensors")["a"].equal(torch.ones(3))


def test_pickle_that_holds_more_than_tensors_is_refused(tmp_path):
    torch.save({"a": torch.ones(3), "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="some values are not tensors"):
        hub.convert_pickles([tmp_path / "pytorch_model.bin"], tmp_path)


def test_pickle_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trap"), "w"))

    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="more than weights"):
        hub.convert_pickles([tmp_path / "pytorch_model.bin"], tmp_path)
    assert not (tmp_path / "trap").exists()
