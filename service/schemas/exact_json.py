"""JSON whose integers are read as they are written."""

import json
from typing import Any

import orjson

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
