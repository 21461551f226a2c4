"""The race against llama.cpp, with a stand-in for its Python binding that computes with our
model."""

import ctypes
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanollava.infra.io import InputError
from nanollava.llava import Llava
from nanollava.speed import __main__ as command
from nanollava.speed import llama_cpp


class StandIn:
    """llama_cpp.Llama, as far as the race uses it."""

    opened, threads, shift = [], [], 0

    def __init__(self, path, n_ctx, verbose):
        self.opened.append(Path(path).name)
        self.ctx, self.model = self, Llava.from_pretrained(Path(path).parent)

    def reset(self):
        self.tokens = []

    def eval(self, tokens):
        self.tokens += tokens

    def logits(self, index):
        with torch.no_grad():
            logits = self.model(torch.tensor([self.tokens]))[0, index].roll(self.shift)
        array = (ctypes.c_float * len(logits))(*logits)
        return ctypes.cast(array, ctypes.POINTER(ctypes.c_float))


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(StandIn, "opened", [])
    monkeypatch.setattr(StandIn, "threads", [])
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(
        Llama=StandIn, llama_get_logits_ith=StandIn.logits,
        llama_set_n_threads=lambda llama, *threads: llama.threads.append(threads)))
    return StandIn


def test_both_sides_generate_the_same_tokens(folder, stand_in):
    ours = llama_cpp.generator(folder, "float32", compiled=False)
    theirs = llama_cpp.llama_cpp_generator(folder, "float32")
    assert list(ours(1)) == list(theirs(1))
    assert len(list(ours(1))) == 1 + 4


def test_precisions_and_threads_are_raced(folder, stand_in, monkeypatch):
    set_threads = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", set_threads.append)
    results = llama_cpp.race_llama_cpp(folder, 2, compiled=False)
    assert list(results) == [
        f"{part}, {precision}, {threads}" for precision in ("float32", "bfloat16", "int8")
        for threads in ("1 thread", "8 threads") for part in ("prompt", "next token")]
    assert all(list(times) == ["nanollava", "llama.cpp"] and min(times.values()) > 0
               for times in results.values())
    assert stand_in.opened == ["float32.gguf", "bfloat16.gguf", "q8_0.gguf"]
    # for each precision: a first token with all threads, then a first turn and two that count
    assert stand_in.threads == 3 * ([(8, 8)] + 3 * [(1, 1)] + 3 * [(8, 8)])
    assert set_threads == 3 * ([8] + 3 * [1] + 3 * [8]) + [8]


def test_sides_with_different_tokens_are_not_compared(folder, stand_in, monkeypatch):
    monkeypatch.setattr(stand_in, "shift", 1)
    with pytest.raises(InputError, match="the first tokens are"):
        llama_cpp.race_llama_cpp(folder, 1, compiled=False)


def test_prompt_lasts_until_the_first_token():
    def reply():
        for wait in (0.05, 0.01, 0.02):
            time.sleep(wait)
            yield 0

    prompt, next_token = llama_cpp.time_reply(reply())
    assert 0.05 <= prompt and 0.015 <= next_token < 0.05


def test_losses_are_named():
    results = {"prompt": {"nanollava": 1.0, "llama.cpp": 2.0},
               "next token": {"nanollava": 2.0, "llama.cpp": 1.0}}
    assert command.slower(results) == "nanollava is slower: next token"
    assert command.slower({"prompt": results["prompt"]}) == "nanollava is slower: nowhere"
    assert "of the limit" not in command.results_table(results, {})
