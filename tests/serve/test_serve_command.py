"""python -m nanollava.serve as a user meets it: its start, its errors, its end."""

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest
from PIL import Image

from nanollava.infra.cli import one_line_errors
from tests.serve.test_server import chat, speak

ROOT = Path(__file__).parents[2]
KEY = "NANOLLAVA_API_KEY"


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    """A tiny LLaVA that says the same two words again and again, for very long."""
    speak(model, tokenizer, "A cat", forever=True)
    model.config.text.max_position_embeddings = 50_000
    model.save_pretrained(tmp_path / "tiny", [tokenizer.path])
    return tmp_path / "tiny"


# ---------------------------------------------------------------------------------------------
# Errors at the start


@pytest.fixture
def error_of(monkeypatch, capsys):
    """error_of("--port", "x") -> the one line with which the command ends."""
    command = importlib.import_module("nanollava.serve.__main__")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # main sets it
    monkeypatch.delenv(KEY, raising=False)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["serve", *map(str, words)])
        with pytest.raises(SystemExit) as exit, one_line_errors():
            command.main(command.parse_arguments())
        out, error = capsys.readouterr()
        assert (exit.value.code, out) == (2, "")
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.mark.parametrize("host", ["example.org", "localhost.example.org", "256.0.0.1", "", "x y"])
def test_host_must_be_an_address(error_of, host):
    assert "is not an IP address" in error_of("--host", host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1"])
def test_other_machines_need_a_key(error_of, monkeypatch, host):
    assert KEY in error_of("--host", host)
    monkeypatch.setenv(KEY, " ")
    assert KEY in error_of("--host", host)


def test_key_must_fit_into_a_header(error_of, monkeypatch):
    monkeypatch.setenv(KEY, "sk-\u00e9")
    error = error_of("--host", "0.0.0.0")
    assert KEY in error and "sk-" not in error


def test_port_in_use_is_named(error_of, folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"port {port}: " in error_of("--model", folder, "--port", port)


def test_images_of_very_many_pixels_are_refused_by_default(error_of, folder):
    """A file of 50 kB may hold 400 million, which would fill the memory."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        error_of("--model", folder, "--port", other.getsockname()[1])
    assert Image.MAX_IMAGE_PIXELS == 2**25


def test_address_of_another_machine_is_refused(error_of, folder, monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret")
    error = error_of("--model", folder, "--host", "192.0.2.1")
    assert "cannot listen at 192.0.2.1" in error and "sk-secret" not in error


def test_missing_model_is_named(error_of, tmp_path):
    assert str(tmp_path / "none") in error_of("--model", tmp_path / "none")


@pytest.mark.parametrize("words", [["--prot", "1"], ["--port", "65536"], ["--max-waiting", "-1"],
                                   ["--cache-gib", "nan"], ["extra"]])
def test_wrong_flag_is_refused_before_torch_is_imported(words):
    run = subprocess.run([sys.executable, "-X", "importtime", "-m", "nanollava.serve", *words],
                         cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in run.stderr.splitlines() if not line.startswith("import time:")]
    assert (run.returncode, run.stdout, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ") and words[0] in lines[0]
    assert "| torch\n" not in run.stderr


# ---------------------------------------------------------------------------------------------
# The end


@pytest.fixture
def process(folder):
    """A server in a process of its own; `port` is its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nanollava.serve", "--model", folder, "--port", "0"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    address = process.stdout.readline()
    process.port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)\n", address)[1])
    yield process
    process.kill()
    process.communicate()


def begin(process, max_tokens: int) -> socket.socket:
    """Ask for a streamed reply; returns when it is under way."""
    client = socket.create_connection(("127.0.0.1", process.port), timeout=30)
    client.sendall(chat("What?", stream=True, max_tokens=max_tokens))
    data = b""
    while data.count(b"cat") < 3:
        data += client.recv(2**16)
    return client


def read_all(client: socket.socket) -> bytes:
    data = b""
    while block := client.recv(2**16):
        data += block
    return data


def end_of(process) -> tuple[int, list[str]]:
    """The exit code, and what was printed behind the line about the memory."""
    _, error = process.communicate(timeout=30)
    first, *lines = error.splitlines()
    assert first.startswith("conversations are kept in 2 GiB: ")
    return process.returncode, lines


def test_ctrl_c_lets_the_reply_under_way_end(process):
    client = begin(process, max_tokens=300)
    process.send_signal(signal.SIGINT)
    assert read_all(client).endswith(b"data: [DONE]\n\n")
    code, lines = end_of(process)
    assert code == 130 and lines[-1] == "stopped"
    assert len(lines) == 2 and "reply 300 tokens" in lines[0]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", process.port))


def test_second_signal_ends_at_once(process):
    client, start = begin(process, max_tokens=40_000), time.monotonic()
    process.send_signal(signal.SIGTERM)
    while True:  # until it listens no more
        try:
            HTTPConnection("127.0.0.1", process.port).connect()
        except ConnectionError:  # a connection that was not accepted is reset
            break
    process.send_signal(signal.SIGTERM)
    code, lines = end_of(process)
    assert time.monotonic() - start < 4
    assert (code, lines) == (143, ["stopped"])
    client.close()
