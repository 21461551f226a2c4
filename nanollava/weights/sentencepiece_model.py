"""The vocabulary of a tokenizer.model, for writing it in the formats of other software.

The file is a protocol buffer: sentencepiece_model.proto in the SentencePiece sources. The Python
package tells neither which pieces are user-defined nor how text is normalized.
"""

import struct
from pathlib import Path

from ..tokenizer import Tokenizer

# ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2  # TrainerSpec.ModelType


def read_vocabulary(tokenizer: Tokenizer) -> tuple[list[tuple[str, float, int]], str | None]:
    """(text, score, type) of each piece, in the order of their tokens, and `unsupported`."""
    model = read_message(Path(tokenizer.path).read_bytes())
    pieces = read_pieces(model)
    return pieces, unsupported(model, pieces)


def read_message(data: bytes) -> dict[int, list]:
    """The fields of a protobuf message, {number: values}: int, or bytes still to be decoded.

    https://protobuf.dev/programming-guides/encoding
    """
    fields, position = {}, 0

    def varint() -> int:
        """7 bits a byte, the lowest first; the 8th bit says that more follow."""
        nonlocal position
        value = shift = 0
        while True:
            byte, position = data[position], position + 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(wire_type) or varint()
            value, position = data[position : position + size], position + size
        fields.setdefault(number, []).append(value)
    return fields


def read_pieces(model: dict[int, list]) -> list[tuple[str, float, int]]:
    """(text, score, type) of each piece of a ModelProto; its number in the list is its token."""
    pieces = []
    for fields in map(read_message, model[1]):
        score = struct.unpack("<f", fields.get(2, [bytes(4)])[0])[0]
        pieces.append((fields[1][0].decode(), score, fields.get(3, [NORMAL])[0]))
    return pieces


def unsupported(model: dict[int, list], pieces: list[tuple[str, float, int]]) -> str | None:
    """Why other software would split text otherwise, or None. LLaMA's vocabularies all fit."""
    trainer, normalizer = (read_message(model.get(field, [b""])[0]) for field in (2, 3))
    if trainer.get(3) != [BPE]:
        return "it is not a BPE model"
    if trainer.get(24, [0]) != [0]:
        return "it has spaces as suffixes"
    if normalizer.get(2, [b""]) != [b""]:
        return f"it normalizes text: {normalizer[1][0].decode()}"
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces; absent means true
    if [normalizer.get(field, [1]) for field in (3, 4, 5)] != [[1], [0], [1]]:
        return "it treats spaces in another way than LLaMA's"
    if any(kind == UNUSED for _, _, kind in pieces):
        return "it has unused pieces"
