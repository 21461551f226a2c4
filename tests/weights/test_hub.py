"""Downloads from a hub on this machine that breaks off, lies, redirects and refuses, as the real one may."""

import hashlib
import json
import threading
from http.server import ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save

from nanollava import Llava, Tokenizer
from nanollava.infra.io import InputError
from nanollava.weights import hub
from tests.infra.handler import ReplyHandler

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = {"a": torch.arange(50_000.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}


class Hub(ThreadingHTTPServer):
    """Serves `files` (name -> bytes) of the repository someone/model; `moods` say how the next answers go wrong."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"config.json": b"{}", "tokenizer.model": b"pieces", "model.safetensors": save(WEIGHTS),
                      "README.md": b"read me", "pytorch_model.bin": b"pickled", "tf_model.h5": b"other"}
        self.moods, self.asked, self.keys = [], [], []


class Handler(ReplyHandler):
    def do_GET(self):
        mood = self.server.moods.pop(0) if self.server.moods and "/resolve/" in self.path else None
        mood = self.server.always if getattr(self.server, "always", None) else mood
        self.server.keys.append(self.headers.get("Authorization"))
        if isinstance(mood, int):
            return self.send(mood, b"", {"Retry-After": "7"} if mood == 429 else {})
        if self.path.startswith("/api/models/someone/model/revision/main"):
            siblings = [{"rfilename": name, "size": len(content),
                         "lfs": {"sha256": hashlib.sha256(content).hexdigest()}}
                        for name, content in self.server.files.items()]
            listing = getattr(self.server, "listing", json.dumps({"sha": COMMIT, "siblings": siblings}).encode())
            return self.send(200, listing)
        prefix = f"/someone/model/resolve/{COMMIT}/"
        if not self.path.startswith((prefix, "/elsewhere/")):
            return self.send(404, b"")
        name = self.path.rpartition("/")[2]
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        if mood == "redirect":
            return self.send(302, b"", {"Location": f"/elsewhere/{name}"})
        self.server.asked.append((name, start))
        content = self.server.files[name]
        if mood == "lie":
            content = bytes(len(content))
        if mood == "from the start":
            return self.send(200, content)
        if start >= len(content):
            return self.send(416, b"<xml>InvalidRange</xml>")
        rest = content[start:]
        self.send(206 if start else 200, rest[: len(rest) // 2] if mood == "break" else rest, length=len(rest))


@pytest.fixture
def server(monkeypatch):
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """No test waits; how long it would have is written down."""
    seconds = []
    monkeypatch.setattr(hub.time, "sleep", seconds.append)
    return seconds


def test_a_folder_is_what_a_model_needs_and_nothing_else(server, tmp_path):
    hub.fetch("someone/model", tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"config.json", "tokenizer.model",
                                                                      "model.safetensors"}
    for path in (tmp_path / "model").iterdir():
        assert path.read_bytes() == server.files[path.name]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("names, wanted", [
    (["model.safetensors", "pytorch_model.bin", "flax_model.msgpack"], ["model.safetensors"]),
    (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
     ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]),
    (["model.safetensors", "model-00001-of-00002.safetensors"], ["model.safetensors"]),
    (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "training_args.bin"],
     ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]),
    (["tokenizer.model", "model.safetensors", "tokenizer.json"], ["tokenizer.model", "model.safetensors"]),
])
def test_safetensors_are_preferred_to_pickles_and_all_else_is_left(names, wanted):
    assert hub.needed([*names, "config.json"]) == ["config.json", *wanted]


def test_a_repository_without_weights_is_told():
    with pytest.raises(InputError, match="no model folder"):
        hub.needed(["config.json", "README.md"])


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path, waits):
    server.moods = [None, None, "break", "break"]
    hub.fetch("someone/model", tmp_path / "model")
    starts = [start for name, start in server.asked if name == "model.safetensors"]
    assert starts == [0, hub.BLOCK, 2 * hub.BLOCK]  # of 200,190 bytes, half of what was left came each time
    assert len(waits) == 2 and all(1 < wait <= 1.5 for wait in waits)  # each as after a first failure
    assert load_file(tmp_path / "model" / "model.safetensors")["a"].equal(WEIGHTS["a"])


def test_a_stopped_run_goes_on_in_the_next(server, tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    server.moods = [None, None, "break"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hub.time, "sleep", stop)
        hub.fetch("someone/model", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    server.asked.clear()
    hub.fetch("someone/model", tmp_path / "model")
    assert server.asked == [("model.safetensors", hub.BLOCK)]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_server_that_begins_again_is_heard_from_the_beginning(server, tmp_path):
    server.moods = [None, None, "break", "from the start"]
    hub.fetch("someone/model", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == server.files["model.safetensors"]


def test_wrong_bytes_are_fetched_again_and_then_refused(server, tmp_path):
    server.moods = [None, None, "lie"]
    hub.fetch("someone/model", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    server.moods = [None, None, "lie", "lie"]
    with pytest.raises(InputError, match="model.safetensors: what comes is not what the hub announces"):
        hub.fetch("someone/model", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_file_shorter_than_announced_is_given_up(server, tmp_path, waits):
    """Its server says 416 to a request for what lies behind its end."""
    listing = server.files["model.safetensors"]
    with pytest.raises(InputError):
        hub.download(f"http://127.0.0.1:{server.server_port}/someone/model/resolve/{COMMIT}/model.safetensors",
                     tmp_path / "file", len(listing) + 10, None, lambda: None)
    assert len(waits) <= 2 * hub.ATTEMPTS


@pytest.mark.parametrize("listing", [b"[]", b"{}", b'{"sha": "a", "siblings": [{"rfilename": "config.json"}]}', b"3"])
def test_an_answer_that_is_no_hubs_is_told(server, tmp_path, listing):
    server.listing = listing
    with pytest.raises(InputError):
        hub.fetch("someone/model", tmp_path / "model")


def test_what_a_killed_conversion_left_is_not_shipped(server, tmp_path):
    waiting = tmp_path / f".model.{COMMIT[:12]}.part" / "whole"
    waiting.mkdir(parents=True)
    (waiting / ".model.safetensors.1.part").write_bytes(b"half")
    hub.fetch("someone/model", tmp_path / "model")
    assert not list((tmp_path / "model").glob(".*"))


def test_two_runs_into_one_folder_are_kept_apart(server, tmp_path, monkeypatch):
    def begin_another(_):
        with pytest.raises(InputError, match="model is in use by another run: wait for it, or choose another --out"):
            hub.fetch("someone/model", tmp_path / "model")

    server.moods = [None, None, "break"]
    monkeypatch.setattr(hub.time, "sleep", begin_another)  # while the first waits for its connection
    hub.fetch("someone/model", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_redirects_are_followed(server, tmp_path):
    server.moods = ["redirect"]
    hub.fetch("someone/model", tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_bytes() == b"{}"


def test_a_busy_hub_is_waited_for_as_long_as_it_says(server, tmp_path, waits):
    server.moods = [429, 503]
    hub.fetch("someone/model", tmp_path / "model")
    assert 7 < waits[0] <= 10.5 and 2 < waits[1] <= 3


def test_a_hub_that_stays_silent_is_given_up_in_one_line(server, tmp_path, waits):
    server.always = 500
    with pytest.raises(InputError, match="500 .*the same command goes on where it stopped"):
        hub.fetch("someone/model", tmp_path / "model")
    assert len(waits) == hub.ATTEMPTS and all(2**n < wait <= 1.5 * 2**n for n, wait in enumerate(waits))


@pytest.mark.parametrize("code, words", [(401, "set HF_TOKEN"), (403, "set HF_TOKEN"), (404, "no such thing")])
def test_a_refusal_is_told_at_once(server, tmp_path, waits, code, words):
    server.always = code
    with pytest.raises(InputError, match=words):
        hub.fetch("someone/model", tmp_path / "model")
    assert waits == [] and not list(tmp_path.iterdir())


def test_the_token_is_sent_and_written_nowhere(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fetch("someone/model", tmp_path / "model")
    assert set(server.keys) == {"Bearer hf_secret"}
    assert not any(b"hf_secret" in path.read_bytes() for path in (tmp_path / "model").iterdir())


@pytest.mark.parametrize("name", ["model", "a/b/c", "../../x", "https://huggingface.co/a/b"])
def test_what_is_no_repository_is_told(name, tmp_path):
    with pytest.raises(InputError, match="OWNER/NAME"):
        hub.fetch(name, tmp_path / "model")


def test_a_folder_that_is_there_is_left_alone(server, tmp_path):
    with pytest.raises(InputError, match="is there already"):
        hub.fetch("someone/model", tmp_path)


def test_a_disk_too_small_is_told_before(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="the disk has 0.0 GB left"):
        hub.fetch("someone/model", tmp_path / "model")
    assert server.asked == []


def test_pickles_become_safetensors(server, tmp_path, model, tokenizer):
    """In two shards, two names for one tensor among them: and the folder opens as it would have."""
    model.save_pretrained(tmp_path / "made", [tokenizer.path])
    tensors = load_file(tmp_path / "made" / "model.safetensors")
    names = sorted(tensors)
    server.files = {name: (tmp_path / "made" / name).read_bytes() for name in ("config.json", "tokenizer.model")}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({name: tensors[name] for name in part}, tmp_path / "part.bin")
        server.files[f"pytorch_model-0000{number}-of-00002.bin"] = (tmp_path / "part.bin").read_bytes()
    hub.fetch("someone/model", tmp_path / "model")
    again = Llava.from_pretrained(tmp_path / "model").state_dict()
    assert all(again[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert len(Tokenizer(tmp_path / "model")) == len(tokenizer)
    assert not list((tmp_path / "model").glob("*.bin"))


def test_two_names_for_one_tensor_are_written_twice(tmp_path):
    tensor = torch.randn(4, 4)
    torch.save({"embed": tensor, "head": tensor, "part": tensor[:2]}, tmp_path / "pytorch_model.bin")
    hub.unpickle([tmp_path / "pytorch_model.bin"], tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written["embed"].equal(tensor) and written["head"].equal(tensor) and written["part"].equal(tensor[:2])


def test_a_pickle_of_the_oldest_format_is_read(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    hub.unpickle([tmp_path / "pytorch_model.bin"], tmp_path)
    assert load_file(tmp_path / "model.safetensors")["a"].equal(torch.ones(3))


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path):
    torch.save({"a": torch.ones(3), "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="not all of it is tensors"):
        hub.unpickle([tmp_path / "pytorch_model.bin"], tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "trap"), "w"))

    torch.save({"a": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="more than weights"):
        hub.unpickle([tmp_path / "pytorch_model.bin"], tmp_path)
    assert not (tmp_path / "trap").exists()
