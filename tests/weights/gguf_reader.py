"""A small reader of GGUF files, written from the format's description."""

import struct

import numpy as np

LETTERS = {4: "I", 5: "i", 6: "f", 7: "?"}


def read_gguf(path):
    """(fields, tensors as float32) of a file."""
    content, position = path.read_bytes(), 0

    def take(letters):
        nonlocal position
        values = struct.unpack_from(f"<{letters}", content, position)
        position += struct.calcsize(f"<{letters}")
        return values if len(values) > 1 else values[0]

    def text():
        return take(f"{take('Q')}s").decode()

    def item(number):
        if number == 9:
            number, count = take("IQ")
            return [item(number) for _ in range(count)]
        return text() if number == 8 else take(LETTERS[number])

    magic, version, tensor_count, field_count = take("4sIQQ")
    assert (magic, version) == (b"GGUF", 3)
    fields = {text(): item(take("I")) for _ in range(field_count)}
    places = []
    for _ in range(tensor_count):
        name, dimensions = text(), take("I")
        shape = [take("Q") for _ in range(dimensions)][::-1]
        places.append((name, shape, *take("IQ")))
    start = position + -position % 32
    return fields, {name: numbers(content, start + offset, shape, number)
                    for name, shape, number, offset in places}


def numbers(content, start, shape, number):
    count = int(np.prod(shape))
    if number == 8:  # q8_0
        kind = np.dtype([("scale", "<f2"), ("levels", "i1", 32)])
        blocks = np.frombuffer(content, kind, count // 32, start)
        values = blocks["scale"].astype(np.float32)[:, None] * blocks["levels"]
    elif number == 30:  # bfloat16 is the upper half of float32
        halves = np.frombuffer(content, "<u2", count, start)
        values = (halves.astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(content, {0: "<f4", 1: "<f2"}[number], count, start)
    return values.reshape(shape).astype(np.float32)
