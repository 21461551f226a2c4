"""Shapes: what the reader of a JSON file expects of its content."""

import json
import math
import types

from .io import InputError

KINDS = {str: "a string", int: "an integer", float: "a finite number", bool: "true or false",
         type(None): "null", list: "a list", dict: "an object"}


def check_shape(value, shape, where: str) -> None:
    """Raises InputError, which begins with `where`, unless a value has a shape."""
    if error := shape_error(value, shape):
        raise InputError(f"{where}: {error}")


def shape_error(value, shape) -> str | None:
    """What is wrong with a JSON value, or None if it has a shape, which is one of:

        str, int, float, int | None   a type or several; integers are floats, but no other mix
        range(1, 10), (0.0, 1.0)      an integer of the range; a number from the first to the second
        [shape], [shape, shape]       a list of any length; a list of this length
        {"id": int, "image?": str}    an object; image may be absent or null, other fields may exist
        {str: shape}                  an object with any fields
        a function                    raises ValueError with what is wrong: "is not ..."

        >>> shape_error({"rows": [{"id": 1}, {"id": None}]}, {"rows": [{"id": int | str}]})
        'rows[1].id must be an integer or a string, not null'
    """
    if fault := find_fault(value, shape):
        place, reason = fault
        return f"{place.removeprefix('.') or 'it'} {reason}"


def find_fault(value, shape) -> tuple[str, str] | None:
    """(place, reason) of the first part of a value that does not have its shape."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in (dict.fromkeys(value, shape[str]) if str in shape else shape).items():
            name = key if str in shape else key.removesuffix("?")
            if name != key and value.get(name) is None:
                continue
            if name not in value:
                return "", f"has no {name!r}"
            if fault := find_fault(value[name], inner):
                return f".{name if name.isidentifier() else quote(name)}{fault[0]}", fault[1]
    elif isinstance(shape, list) and isinstance(value, list) and len(shape) in (1, len(value)):
        for number, item in enumerate(value):
            if fault := find_fault(item, shape[number % len(shape)]):
                return f"[{number}]{fault[0]}", fault[1]
    elif isinstance(shape, types.FunctionType):
        try:
            shape(value)
        except ValueError as error:
            return "", str(error)
    elif not has_kind(value, shape):
        return "", f"must be {describe(shape)}, not {quote(value)}"


def has_kind(value, shape) -> bool:
    """Whether a value without parts has a shape without parts."""
    number = type(value) is int or (type(value) is float and math.isfinite(value))
    if isinstance(shape, tuple):
        return number and shape[0] <= value <= shape[1]
    if isinstance(shape, range):
        return type(value) is int and value in shape
    kinds = getattr(shape, "__args__", (shape,))  # of a union
    return (type(value) in kinds and (number or type(value) is not float)
            or object in kinds or (float in kinds and number and abs(value) < 1e308))


def describe(shape) -> str:
    """A shape in words: "an integer or a string"."""
    if isinstance(shape, tuple):
        return f"a number from {shape[0]:g} to {shape[1]:g}"
    if isinstance(shape, range):
        return f"an integer from {shape.start} to {shape.stop - 1}"
    if isinstance(shape, (list, dict)):
        length = f" of {len(shape)}" if len(shape) > 1 and isinstance(shape, list) else ""
        return KINDS[type(shape)] + length
    return " or ".join(KINDS[kind] for kind in getattr(shape, "__args__", (shape,)))


def quote(value) -> str:
    """A JSON value in a message: in one line, and short."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, dict):
        return KINDS[type(value)]
    text = repr(value) if isinstance(value, (str, float)) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
