"""Cursors of pages: a few bytes as an opaque text."""

import base64
import binascii


def encoded(place: bytes) -> str:
    """Return a place in a listing as a cursor."""
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def decoded(cursor: str) -> bytes:
    """Return the place that a cursor stands for; empty where encoded() did not make it."""
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
