"""What the tests of the commands share: running one as a user does, and small models on disk."""

import importlib
import os
import signal
import sys
import threading
import time

import pytest

from nanollava.infra import io
from nanollava.infra.cli import one_line_errors
from nanollava.weights import hf_config, hf_format


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """command("train", "--stage", 1) -> (exit code, stdout, stderr), run in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        io.INPUTS.clear()  # a command is a process of its own
        module = importlib.import_module(name)
        code = 0
        try:
            with one_line_errors():
                module.main(module.parse_arguments())
        except SystemExit as exit:
            code = exit.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def error_of(command):
    """error_of("train", "--stage", 3) -> the one line that a mistake ends with."""

    def run(name, *arguments):
        code, out, error = command(name, *arguments)
        assert (code, out) == (2, "")
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.fixture(params=["SIGTERM", "SIGHUP"])
def signal_in_flight(request, server):
    """signal_in_flight(4) -> a signal that this process gets when 4 requests are in flight."""
    signum, answer = getattr(signal, request.param), threading.Event()
    before = signal.signal(signum, signal.SIG_DFL)  # nohup ignores SIGHUP

    def prepare(count):
        reply = server.reply

        def reply_late(body):
            if len(server.requests) >= count and body is server.requests[count - 1]:
                time.sleep(0.1)  # now the main thread waits for answers
                os.kill(os.getpid(), signum)
                time.sleep(0.1)
                answer.set()
            answer.wait(5)
            return reply(body)

        server.reply = reply_late
        return signum

    yield prepare
    signal.signal(signum, before)


@pytest.fixture
def parts(model, tokenizer, tmp_path):
    """The flags of train.py for a tiny CLIP and a tiny LLaMA with random weights."""
    clip, llama = tmp_path / "clip", tmp_path / "llama"
    hf_format.save_folder(clip, hf_config.clip_json(vars(model.config.vision)),
                          model.vision_tower.state_dict())
    hf_format.save_folder(llama, hf_config.llama_json(vars(model.config.text)),
                          model.language_model.state_dict(), [tokenizer.path])
    return "--vision-tower", clip, "--llm", llama


@pytest.fixture
def run_folder(model, tokenizer, tmp_path):
    """A tiny LLaVA with random weights, as train.py saves one."""
    model.save_pretrained(tmp_path / "run", [tokenizer.path])
    return tmp_path / "run"
