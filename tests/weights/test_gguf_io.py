"""The GGUF file format, against ggml and against a reader of its own."""

import struct

import numpy as np
import pytest
import torch

from nanollava.infra.io import InputError
from nanollava.weights.gguf_io import TYPES, entry, quantize, write_gguf
from tests.weights.gguf_reader import read_gguf

# Three blocks and what quantize_row_q8_0_ref of llama.cpp 0.5.0 (commit 0c1e57098) makes of them,
# called by ctypes: halves; zeros; numbers whose scale is below the smallest float16
BLOCKS = np.stack([np.append(127, np.arange(1, 32) - 15.5), np.zeros(32), np.arange(32) * -1e-7])
GGML = bytes.fromhex(
    "003c7ff1f2f3f4f5f6f7f8f9fafbfcfdfeff0102030405060708090a0b0c0d0e0f10" + 34 * "00"
    + "000000fcf8f4f0ece7e3dfdbd7d3cfcbc7c3bebab6b2aeaaa6a29e9a95918d898581")


def test_q8_0_is_ggmls():
    assert quantize(BLOCKS.astype(np.float32)).tobytes() == GGML


@pytest.mark.parametrize("dtype, error", (
    ("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8), ("q8_0", 1 / 200)))
def test_numbers_come_back(tmp_path, dtype, error):
    torch.manual_seed(0)
    wide, narrow, vector = torch.randn(6, 64), torch.randn(3, 10), torch.randn(7)
    tensors = [entry("wide", wide, dtype), entry("narrow", narrow, dtype),
               entry("vector", vector, dtype),
               entry("view", wide.view(2, 3, 64).transpose(0, 1), dtype, torch.Size((6, 64)))]
    write_gguf(tmp_path / "file", {}, tensors)
    _, found = read_gguf(tmp_path / "file")
    assert found["vector"].dtype == np.float32 and (found["vector"] == vector.numpy()).all()
    assert found["wide"] == pytest.approx(wide.numpy(), rel=error, abs=error * 4)
    assert found["narrow"] == pytest.approx(narrow.numpy(), rel=error, abs=1e-9)
    assert (found["view"] == found["wide"].reshape(2, 3, 64).swapaxes(0, 1).reshape(6, 64)).all()


def test_large_tensors_are_converted_in_pieces(tmp_path, monkeypatch):
    tensors = [entry("a", torch.randn(50, 32), "q8_0"), entry("b", torch.randn(9), "float32")]
    write_gguf(tmp_path / "whole", {}, tensors)
    monkeypatch.setattr("nanollava.weights.gguf_io.CHUNK", 100)
    write_gguf(tmp_path / "pieces", {}, tensors)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


def test_fields_come_back(tmp_path):
    fields = {"a": True, "b": 7, "c": 0.5, "d": "▁é", "e": ["", "x"], "f": [3, -1], "g": [0.25]}
    write_gguf(tmp_path / "file", fields, [])
    assert read_gguf(tmp_path / "file") == (fields, {})


def test_header_is_that_of_version_3(tmp_path):
    write_gguf(tmp_path / "file", {"k": 1}, [entry("t", torch.zeros(2, 3), "float16")])
    content = (tmp_path / "file").read_bytes()
    assert content[:24] == b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    assert len(content) % 32 == 0


@pytest.mark.parametrize("dtype, number", (
    ("float16", 1e5), ("float32", float("nan")), ("bfloat16", float("inf")), ("q8_0", 1e38),
    ("q8_0", float("nan"))))
def test_numbers_that_do_not_fit_are_refused(tmp_path, dtype, number):
    weights = torch.zeros(2, 32)
    weights[1, 5] = number
    with pytest.raises(InputError, match=f"^blk.0 has weights that are too large for {dtype}"):
        write_gguf(tmp_path / "file", {}, [entry("blk.0", weights, dtype)])


def test_types_have_the_sizes_of_their_names():
    assert {name: block[2] / block[1] for name, block in TYPES.items()} == {
        "float32": 4, "float16": 2, "bfloat16": 2, "q8_0": 34 / 32}
