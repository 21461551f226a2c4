"""Prompts and next tokens in three precisions, with one thread and with all, against llama.cpp.

The language model alone reads a prompt of text and generates greedily. Both sides have the weights
of one folder: llama.cpp reads them from a file of `weights/gguf.py`, as `prepare_data.py gguf`
writes it. "prompt" is the time from the prompt's tokens to the first new token, "next token" the
mean time of each token after that.

Each side runs with its defaults. So they differ in three ways: llama.cpp keeps keys and values in
float16, nanollava in the dtype that it computes in. In 8 bits, llama.cpp has a scale for 32 numbers
(q8_0), nanollava one for a row (`quantize.py`). q8_0 includes lm_head, which nanollava keeps in
float32.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ..infra.device import compile_blocks, pick_compute_dtype
from ..infra.io import InputError
from ..infra.progress import print0
from ..llava import Llava
from ..quantize import quantize_int8
from ..weights.gguf import llama_fields, llama_tensors
from ..weights.gguf_io import write_gguf
from .sides import CONFIG, NEW_TOKENS, TOKENS

PRECISIONS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "q8_0"}  # ours: theirs


def race_llama_cpp(folder: Path, repeat: int, compiled: bool) -> dict[str, dict[str, float]]:
    """{measurement: {side: seconds}}. Raises InputError if the sides compute different tokens."""
    results, all_threads = {}, torch.get_num_threads()
    for ours, theirs in PRECISIONS.items():
        sides = {"nanollava": generator(folder, ours, compiled),
                 "llama.cpp": llama_cpp_generator(folder, theirs)}
        tokens = [next(generate(all_threads)) for generate in sides.values()]
        if ours == "float32" and len(set(tokens)) > 1:
            raise InputError(f"the sides do not compute the same: the first tokens are {tokens}")
        for threads in sorted({1, all_threads}):
            label = f"{ours}, {threads} thread{'s' * (threads > 1)}"
            print0(f"measuring: {label}")
            turns = [{name: time_reply(generate(threads)) for name, generate in sides.items()}
                     for _ in range(1 + repeat)][1:]  # the first turn is always slower
            for index, part in enumerate(("prompt", "next token")):
                results[f"{part}, {label}"] = {
                    name: min(turn[name][index] for turn in turns) for name in sides}
    torch.set_num_threads(all_threads)
    return results


def time_reply(reply: Iterator[int]) -> tuple[float, float]:
    """Seconds of the prompt, and of each next token."""
    start = time.perf_counter()
    next(reply)
    first = time.perf_counter()
    count = sum(1 for _ in reply)
    return first - start, (time.perf_counter() - first) / count


def make_prompt() -> torch.Tensor:
    """A row (1, TOKENS) of text, always the same."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(3, CONFIG.text.vocab_size, (1, TOKENS), generator=random)


# A side: (folder, precision) -> generate(number of threads), which yields new tokens


def generator(folder: Path, precision: str, compiled: bool) -> Callable[[int], Iterator[int]]:
    """Our side, with the dtypes of sample.py."""
    dtype = torch.float32 if precision == "int8" else getattr(torch, precision)
    model = Llava.from_pretrained(folder, dtype)
    model.compute_dtype = pick_compute_dtype(dtype, "cpu")
    if precision == "int8":
        quantize_int8(model.language_model)
    if compiled:
        compile_blocks(model)

    def generate(threads: int) -> Iterator[int]:
        torch.set_num_threads(threads)
        yield from map(int, model.generate(make_prompt(), max_new_tokens=1 + NEW_TOKENS))

    return generate


def llama_cpp_generator(folder: Path, precision: str) -> Callable[[int], Iterator[int]]:
    """The same in llama.cpp."""
    import llama_cpp

    file, text, rows = folder / f"{precision}.gguf", asdict(CONFIG.text), CONFIG.text.vocab_size
    tensors = Llava.from_pretrained(folder).language_model.state_dict()
    write_gguf(file, llama_fields(text, rows) | {"tokenizer.ggml.model": "no_vocab"},
               llama_tensors(tensors, text, rows, 0, precision))
    llama = llama_cpp.Llama(str(file), n_ctx=TOKENS + NEW_TOKENS, verbose=False)

    def generate(threads: int) -> Iterator[int]:
        llama_cpp.llama_set_n_threads(llama.ctx, threads, threads)
        llama.reset()
        tokens = make_prompt()[0].tolist()
        for _ in range(1 + NEW_TOKENS):
            llama.eval(tokens)
            logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
            tokens = [int(np.ctypeslib.as_array(logits, (rows,)).argmax())]
            yield tokens[0]

    return generate
