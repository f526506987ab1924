"""JSON whose integers are read as they are written, and that takes no more memory than is bounded here."""

import json
from typing import Any

import numpy as np
import orjson

from service.errors import BodyTooLarge, MalformedRequest

_SMALL = 32_768
"""Bytes of JSON that cannot become much."""
_MOST_MEMORY = 200_000_000
"""Bytes that a body may become when it is read: 19 MB of `{},{},…` would become 461 MB."""
_MEMORY = {b"{": 240, b"[": 64, b",": 32, b":": 60, b'"': 50}
"""That each of these stands for: an object of a key, a list, a number, a place in an object, half a text."""

_MARKS = bytes.maketrans(b"0123456789[: \t\r\n", b"0000000000,,,,,,")
_LONG = (b"," + b"0" * 20, b",-" + b"0" * 19)
"""How an integer of more than 64 bits begins, once the marks before it and its digits are all alike."""


def loads(data: bytes) -> Any:
    """As orjson.loads, which takes an integer of more than 64 bits for the nearest double.

    Here it stays an integer, so that it can be told from a number like 1e300. Raises orjson.JSONDecodeError.
    """
    value = orjson.loads(data)
    alike = data.translate(_MARKS)
    if not any(mark in alike for mark in _LONG):
        return value
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise orjson.JSONDecodeError("nested too deeply, or an integer of thousands of digits", "", 0) from None


def parse_json(body: bytes) -> Any:
    """What a client sent. Raises BodyTooLarge where it would fill the memory, MalformedRequest."""
    if len(body) > _SMALL and _memory_of(body) > _MOST_MEMORY:
        raise BodyTooLarge("the body holds too many values")
    # orjson refuses NaN, Infinity, numbers that overflow, lone surrogates and bottomless nesting.
    try:
        return loads(body)
    except orjson.JSONDecodeError:
        raise MalformedRequest("the body is not valid JSON") from None


def _memory_of(body: bytes) -> int:
    """About what the body becomes, at most; what is written inside of texts is first taken for JSON, too."""
    rough = sum(size * body.count(mark) for mark, size in _MEMORY.items())
    if rough <= _MOST_MEMORY:
        return rough
    letters = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = np.logical_xor.accumulate(letters == ord('"'))
    outside = letters[~inside].tobytes()
    # Of a text, its end is outside and its beginning is not.
    return sum(size * outside.count(mark) * (2 if mark == b'"' else 1) for mark, size in _MEMORY.items())
