"""The chunks of a WAV: lengths that a recorder did not come to write are mended, and what is ambisonic is told.

A recorder that dies, or writes into a pipe, leaves lengths of 0 or of all ones: what follows is sound to the end of the
file, as ffmpeg has it.
"""

import re
from collections.abc import Iterator

from service.contract.structure import MAX_PARTS

_ORDERS = {b"RIFF": "little", b"RIFX": "big"}
_STREAMED = 0x7FFF_0000
"""Lengths from here on were written before the length was known."""
_AMBISONIC_B_FORMAT = bytes.fromhex("210 7d311 8644 c8c1ca000000".replace(" ", ""))
"""The end of the identifiers of B-format samples, of integers and of floats, in an extensible WAV."""
_NAMED_AMBISONIC = re.compile(rb"ambisonic|ambix|b-format|fuma", re.IGNORECASE)
_DESCRIBING = (b"bext", b"iXML")
_MOST_DESCRIBING = 65_536
_KNOWN = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"cue ", b"smpl", b"inst", b"fact", b"PEAK", b"JUNK", b"PAD ")
"""Chunks that may follow a sound of no samples."""


def mended(data: bytes) -> tuple[bytes, bool]:
    """A sound file whose stated lengths are those of its bytes, and whether it states more sound than it has.

    Files that are no WAV, or whose lengths are right, are returned as they are.
    """
    if data[:4] == b"FORM":
        return _mended_aiff(data), False
    order = _ORDERS.get(data[:4])
    if order is None or data[8:12] != b"WAVE":
        return data, False
    for kind, place, length in _chunks(data, order):
        if kind != b"data":
            continue
        rest = len(data) - place
        if length == 0 and rest > 8 and data[place : place + 4] not in _KNOWN:
            return _with_length(data, place, rest, order), False
        if length > rest:
            return _with_length(data, place, rest, order), length < _STREAMED
        break
    return data, False


def _with_length(data: bytes, place: int, length: int, order: str) -> bytes:
    whole = bytearray(data)
    byte_order = "little" if order == "little" else "big"
    whole[place - 4 : place] = min(length, 0xFFFF_FFFF).to_bytes(4, byte_order)  # type: ignore[arg-type]
    whole[4:8] = min(len(data) - 8, 0xFFFF_FFFF).to_bytes(4, byte_order)  # type: ignore[arg-type]
    return bytes(whole)


def _mended_aiff(data: bytes) -> bytes:
    """An AIFF whose chunk of samples states no length, and its count of frames none."""
    common = frames = None
    for kind, place, length in _chunks(data, "big"):
        if kind == b"COMM" and length >= 18:
            common = place
        elif kind == b"SSND" and common is not None:
            rest = len(data) - place
            if length in (0, 8) and rest > 16 and data[place + 8 : place + 12] not in _KNOWN:
                size = max(1, int.from_bytes(data[common : common + 2], "big")) * -(
                    -int.from_bytes(data[common + 6 : common + 8], "big") // 8
                )
                frames = (rest - 8) // max(1, size)
                whole = bytearray(_with_length(data, place, rest, "big"))
                whole[common + 2 : common + 6] = frames.to_bytes(4, "big")
                return bytes(whole)
            break
    return data


def is_ambisonic(data: bytes) -> bool:
    """Whether a sound file says that its channels are ambisonic, the first of which, W, hears in all directions."""
    if data[:4] == b"OggS":
        place = data[:512].find(b"OpusHead")
        return place >= 0 and data[place + 18 : place + 19] in (b"\2", b"\3")
    order = _ORDERS.get(data[:4])
    if order is None:
        return False
    for kind, place, length in _chunks(data, order):
        body = data[place : place + min(length, _MOST_DESCRIBING)]
        if kind == b"fmt " and length >= 40 and body[28:40] == _AMBISONIC_B_FORMAT:
            return True
        if kind in _DESCRIBING and _NAMED_AMBISONIC.search(body):
            return True
        if kind == b"data" and length == 0:
            return False
    return False


def _chunks(data: bytes, order: str) -> Iterator[tuple[bytes, int, int]]:
    """(kind, place of the body, stated length) of the chunks of a RIFF or an IFF."""
    place = 12
    byte_order = "little" if order == "little" else "big"
    for _ in range(MAX_PARTS):
        if place + 8 > len(data):
            return
        length = int.from_bytes(data[place + 4 : place + 8], byte_order)  # type: ignore[arg-type]
        yield data[place : place + 4], place + 8, length
        place += 8 + length + length % 2
