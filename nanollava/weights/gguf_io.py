"""Tensors and fields in a GGUF file, the format of llama.cpp.

It is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..infra.io import InputError

# {dtype: (its number in GGUF, numbers a block, bytes a block, general.file_type)}
TYPES = {"float32": (0, 1, 4, 0), "float16": (1, 1, 2, 1), "bfloat16": (30, 1, 2, 32),
         "q8_0": (8, 32, 34, 7)}
ALIGNMENT = 32  # bytes: each tensor begins at a multiple
CHUNK = 2**22  # numbers that are converted at a time


class Tensor(NamedTuple):
    """A tensor of a file. `data` may have another shape, with its numbers in the same order."""

    name: str
    data: torch.Tensor
    dtype: str
    shape: torch.Size


def entry(name: str, data: torch.Tensor, dtype: str, shape: torch.Size | None = None) -> Tensor:
    """A Tensor with this shape (None: that of `data`), in float32 if it is no matrix."""
    shape = data.shape if shape is None else shape
    if len(shape) != 2:  # what is not multiplied stays exact, and llama.cpp expects float32
        dtype = "float32"
    elif shape[1] % TYPES[dtype][1]:  # a row is no whole number of blocks
        dtype = "float16"
    return Tensor(name, data, dtype, shape)


def write_gguf(path: Path, fields: dict, tensors: list[Tensor]) -> None:
    """A header, the fields, names and places of the tensors, and then their numbers."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]
    parts += [string(key) + value(field) for key, field in fields.items()]
    offset = 0
    for tensor in tensors:
        number, block_numbers, block_bytes, _ = TYPES[tensor.dtype]
        shape = tensor.shape[::-1]  # the dimension of neighboring numbers comes first
        parts += [string(tensor.name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape),
                  struct.pack("<IQ", number, offset)]
        offset += tensor.data.numel() // block_numbers * block_bytes
        offset += -offset % ALIGNMENT
    with open(path, "wb") as file:
        file.write(b"".join(parts))
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            rows = max(1, CHUNK * len(tensor.data) // tensor.data.numel())
            for chunk in tensor.data.split(rows):
                file.write(encode(chunk, tensor.dtype, tensor.name))
        file.write(bytes(-file.tell() % ALIGNMENT))


def string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def value(field) -> bytes:
    """A field behind the number of its type: bool, int, float, str, or a list of the last three."""
    if isinstance(field, str):
        return struct.pack("<I", 8) + string(field)
    if not isinstance(field, list):
        number, letter = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(field)]
        return struct.pack(f"<I{letter}", number, field)
    if isinstance(field[0], str):
        number, items = 8, b"".join(map(string, field))
    else:
        number, letter = {int: (5, "i"), float: (6, "f")}[type(field[0])]
        items = struct.pack(f"<{len(field)}{letter}", *field)
    return struct.pack("<IIQ", 9, number, len(field)) + items


def encode(data: torch.Tensor, dtype: str, name: str) -> bytes:
    """The numbers of a tensor as they stand in the file.

    Raises InputError that names the tensor if they are not finite.
    """
    if dtype == "q8_0":
        blocks = quantize(data.float().reshape(-1, 32).numpy())
        finite, content = np.isfinite(blocks["scale"]).all(), blocks.tobytes()
    else:
        data = data.contiguous().to(getattr(torch, dtype))
        finite, content = data.isfinite().all(), data.view(torch.uint8).numpy().tobytes()
    if not finite:
        raise InputError(f"{name} has weights that are too large for {dtype}, or not finite: "
                         "choose another --type, or another model")
    return content


def quantize(numbers: np.ndarray) -> np.ndarray:
    """float32 (n, 32) to the n blocks of q8_0: 32 whole numbers and a scale for them."""
    blocks = np.empty(len(numbers), [("scale", "<f2"), ("levels", "i1", 32)])
    scale = np.abs(numbers).max(axis=1, keepdims=True) / np.float32(127)  # (n, 1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        levels = numbers * np.where(scale > 0, 1 / scale, np.float32(0))
        whole = np.trunc(levels)
        blocks["levels"] = whole + np.trunc(2 * (levels - whole))  # halves away from 0, as in C
        blocks["scale"] = scale[:, 0]
    return blocks
