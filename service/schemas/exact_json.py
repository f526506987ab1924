"""JSON parsing that keeps integers exact and bounds the memory that a body takes."""

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
"""Bytes of memory per mark of JSON: an object with a key, a list, a number, a member of an object, half a text."""

_MARKS = bytes.maketrans(b"0123456789[: \t\r\n", b"0000000000,,,,,,")
_LONG = (b"," + b"0" * 20, b",-" + b"0" * 19)
"""First characters of an integer of more than 64 bits, after all marks before it and all digits are made alike."""


def loads(data: bytes) -> Any:
    """Parse JSON like orjson.loads, but keep integers of more than 64 bits, which orjson rounds to a double.

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
    """Parse a client's body. Raises BodyTooLarge where it would fill the memory, MalformedRequest."""
    if len(body) > _SMALL and _memory_of(body) > _MOST_MEMORY:
        raise BodyTooLarge("the body holds too many values")
    # orjson refuses NaN, Infinity, numbers that overflow, lone surrogates and bottomless nesting.
    try:
        return loads(body)
    except orjson.JSONDecodeError:
        raise MalformedRequest("the body is not valid JSON") from None


def _memory_of(body: bytes) -> int:
    """Return an upper estimate of the parsed body's bytes; text between quotes is first counted as JSON, too."""
    rough = sum(size * body.count(mark) for mark, size in _MEMORY.items())
    if rough <= _MOST_MEMORY:
        return rough
    letters = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = np.logical_xor.accumulate(letters == ord('"'))
    outside = letters[~inside].tobytes()
    # Only one of a text's two quotes is outside.
    return sum(size * outside.count(mark) * (2 if mark == b'"' else 1) for mark, size in _MEMORY.items())
