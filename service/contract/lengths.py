"""The length that a sound file states is mended where a recorder did not write it, else compared with its bytes.

A recorder that dies, or writes into a pipe, leaves lengths of 0 or of all ones: what follows is sound to the end of the
file, as ffmpeg has it. A file that states more sound than it has ends early, and whoever sent it is told. And what is
ambisonic is told here, for it stands between the same chunks.
"""

import re
from collections.abc import Iterator
from typing import Literal

from service.contract.errors import BadMedia
from service.contract.structure import MAX_PARTS, after_id3

Order = Literal["little", "big"]
_ORDERS: dict[bytes, Order] = {b"RIFF": "little", b"RIFX": "big"}
_STREAMED, _STREAMED_64 = 0x7FFF_0000, 2**62
"""Lengths of 32 and of 64 bits from here on were written before the length was known."""
_AMBISONIC_B_FORMAT = bytes.fromhex("210 7d311 8644 c8c1ca000000".replace(" ", ""))
"""The end of the identifiers of B-format samples, of integers and of floats, in an extensible WAV."""
_NAMED_AMBISONIC = re.compile(rb"ambisonic|ambix|b-format|fuma", re.IGNORECASE)
_DESCRIBING = (b"bext", b"iXML")
_MOST_DESCRIBING = 65_536
_KNOWN = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"cue ", b"smpl", b"inst", b"fact", b"PEAK", b"JUNK", b"PAD ")
_KNOWN_CAF = b"free info uuid mark regn inst midi strg peak ovvw edct umid".split()
"""Chunks that may follow a sound of no samples."""
_AU_HEADER = 24
_W64, _W64_DATA = b"riff\x2e\x91\xcf\x11", b"data\xf3\xac\xd3\x11"
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_OGG_HEADER, _MOST_OGG_PAGE = 27, 65_307
_MOST_MPEG_FRAME = 3_000
_MPEG_HEADER = 4
_MOST_BEFORE_MPEG = 16_384
_MPEG_1_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG_2_KBITS = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_OGG_FIRST_PAGES, _OGG_LATER_PAGE = (b"OggS\0\2", b"OggS\0\6"), re.compile(rb"OggS\0[\0\1\4\5]")
_FLAC_STARTS, _FLAC_HEADER = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22"), 42
_DISGUISED = (
    b"\x72\xf8\x1f\x4e",
    b"\xfe\x7f\x01\x80",
    b"\x7f\xfe\x80\x01",
    b"\xff\x1f\x00\xe8",
    b"\x1f\xff\xe8\x00",
)
"""What begins a stream of IEC 61937, and one of DTS of 16 or 14 bits in either order of bytes."""
_MOST_DISGUISED = 2**20


def mended(data: bytes) -> tuple[bytes, bool]:
    """Return a sound file whose stated lengths are those of its bytes, and whether it states more sound than it has.

    Files whose lengths are right, or of which nothing is known here, are returned as they are. Raises BadMedia where
    the samples begin outside the file.
    """
    match data[:4]:
        case b"RIFF" | b"RIFX" if data[8:12] == b"WAVE":
            return _wav(data, _ORDERS[data[:4]])
        case b"FORM":
            return _aiff(data)
        case b".snd":
            return _au(data)
        case b"caff":
            return _caf(data)
        case b"RF64":
            return data, _rf64_ends_early(data)
        case b"riff" if data.startswith(_W64):
            return data, _w64_ends_early(data)
        case b"OggS":
            return data, _ogg_ends_early(data)
        case _ if data.startswith(_EBML):
            return data, _matroska_ends_early(data)
        case _:
            return data, _mpeg_ends_early(data)


def _wav(data: bytes, order: Order) -> tuple[bytes, bool]:
    for kind, place, length in _chunks(data, order):
        if kind != b"data":
            continue
        available = len(data) - place
        if length == 0 and available > 8 and data[place : place + 4] not in _KNOWN:
            return _with_length(data, place, available, order), False
        if length > available:
            return _with_length(data, place, available, order), length < _STREAMED
        break
    return data, False


def _with_length(data: bytes, place: int, length: int, order: Order) -> bytes:
    changed = bytearray(data)
    changed[place - 4 : place] = min(length, 0xFFFF_FFFF).to_bytes(4, order)
    changed[4:8] = min(len(data) - 8, 0xFFFF_FFFF).to_bytes(4, order)
    return bytes(changed)


def _aiff(data: bytes) -> tuple[bytes, bool]:
    """Mend an AIFF: one whose chunk of samples states no length has no count of frames either."""
    common = None
    for kind, place, length in _chunks(data, "big"):
        available = len(data) - place
        if kind == b"COMM" and length >= 18:
            common = place
        elif kind == b"SSND" and length > available:
            return data, length < _STREAMED
        elif kind == b"SSND" and common is not None:
            if length in (0, 8) and available > 16 and data[place + 8 : place + 12] not in _KNOWN:
                size = max(1, int.from_bytes(data[common : common + 2], "big")) * -(
                    -int.from_bytes(data[common + 6 : common + 8], "big") // 8
                )
                changed = bytearray(_with_length(data, place, available, "big"))
                changed[common + 2 : common + 6] = ((available - 8) // max(1, size)).to_bytes(4, "big")
                return bytes(changed), False
            break
    return data, False


def _au(data: bytes) -> tuple[bytes, bool]:
    """Mend an AU. Readers take a header of less than 24 bytes, or of a negative number of them, for one of 24."""
    if len(data) < _AU_HEADER:
        return data, False
    start, length = int.from_bytes(data[4:8], "big"), int.from_bytes(data[8:12], "big")
    available = len(data) - start
    if start < _AU_HEADER or available < 0:
        raise BadMedia("the sound's header states that its samples begin where they cannot")
    if length == 0 or available < length:
        return data[:8] + available.to_bytes(4, "big") + data[12:], available < length < _STREAMED
    return data, False


def _caf(data: bytes) -> tuple[bytes, bool]:
    """Mend a CAF. The first four bytes of the chunk of samples count edits."""
    place = 8
    for _ in range(MAX_PARTS):
        length = int.from_bytes(data[place + 4 : place + 12], "big", signed=True)
        available = len(data) - place - 12
        if available < 0:
            break
        if data[place : place + 4] == b"data" and length >= -1:
            if length == -1 or (length <= 4 and available > 12 and data[place + 16 : place + 20] not in _KNOWN_CAF):
                return data[: place + 4] + available.to_bytes(8, "big") + data[place + 12 :], False
            return data, available < length < _STREAMED_64
        place += 12 + max(0, length)
    return data, False


def _rf64_ends_early(data: bytes) -> bool:
    ds64_length = None
    for kind, place, length in _chunks(data, "little"):
        if kind == b"ds64":
            ds64_length = int.from_bytes(data[place + 8 : place + 16], "little")
        elif kind == b"data":
            length = ds64_length if ds64_length is not None and length == 0xFFFF_FFFF else length
            return len(data) - place < length < _STREAMED_64
    return False


def _w64_ends_early(data: bytes) -> bool:
    """Return whether a W64 ends early. A chunk's length includes its header of 24 bytes; chunks begin at multiples of
    8."""
    place = 40
    for _ in range(MAX_PARTS):
        length = int.from_bytes(data[place + 16 : place + 24], "little")
        if length < 24:
            break
        if data.startswith(_W64_DATA, place):
            return len(data) - place < length < _STREAMED_64
        place += -(-length // 8) * 8
    return False


def _ogg_ends_early(data: bytes) -> bool:
    """Return whether the last page is not whole."""
    place = data.rfind(b"OggS", max(0, len(data) - _MOST_OGG_PAGE))
    if place < 0:
        return False
    segments = data[place + 26 : place + _OGG_HEADER]
    count = segments[0] if segments else 255
    sizes = data[place + _OGG_HEADER : place + _OGG_HEADER + count]
    return len(sizes) < count or place + _OGG_HEADER + count + sum(sizes) > len(data)


def _matroska_ends_early(data: bytes) -> bool:
    """Return whether the segment is longer than the file; a browser that records leaves its length open."""
    _, start, length = _element(data, 0)
    kind, start, length = _element(data, start + length)
    return kind == _SEGMENT and start + length > len(data) and length < _STREAMED_64


def _element(data: bytes, place: int) -> tuple[bytes, int, int]:
    """Return (identifier of 4 bytes, place of the body, length) of an element of EBML; an open length is endless."""
    first = data[place + 4 : place + 5]
    size = 9 - first[0].bit_length() if first and first[0] else 9
    number = int.from_bytes(data[place + 4 : place + 4 + size], "big")
    length = number & (1 << 7 * size) - 1
    return data[place : place + 4], place + 4 + size, _STREAMED_64 if length == (1 << 7 * size) - 1 else length


def _mpeg_ends_early(data: bytes) -> bool:
    """Return whether the first frame of an MP3 states more bytes than follow, as one of an encoder that knows them
    does."""
    start, size = _mpeg_stated_bytes(data)
    return len(data) - start < size


def _mpeg_stated_bytes(data: bytes) -> tuple[int, int]:
    """Return where the frames of an MP3 begin, and how many bytes the first states that they have: 0 where it states
    none."""
    start = after_id3(data)
    frame = data[start : start + _MOST_MPEG_FRAME]
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if frame[:1] != b"\xff" or place < 0 or len(frame) < place + 16:
        return start, 0
    has_frames, has_bytes = frame[place + 7] & 1, frame[place + 7] & 2
    at = place + 8 + (4 if has_frames else 0)
    return start, int.from_bytes(frame[at : at + 4], "big") if has_bytes else 0


def goes_on(data: bytes) -> bool:
    """Return whether another sound follows the first in an Ogg, a FLAC or an MP3, as where a station's stream was
    recorded, or files were joined: libsndfile ends with the first."""
    if data[:4] == b"OggS":
        page = _OGG_LATER_PAGE.search(data)
        return page is not None and any(data.find(mark, page.end()) >= 0 for mark in _OGG_FIRST_PAGES)
    if data[:4] == b"fLaC":
        return any(data.find(mark, _FLAC_HEADER) >= 0 for mark in _FLAC_STARTS)
    start, size = _mpeg_stated_bytes(data)
    following = data[start + size : start + size + _MPEG_HEADER]
    return size > 0 and (following.startswith(b"ID3") or (following[:1] == b"\xff" and following[1:2] >= b"\xe0"))


def late_start(data: bytes) -> int | None:
    """Return where the frames of an MP3 begin that does not begin with one, as where a station's stream was recorded
    from the middle of a frame on, or there is padding before it; None where there are none near its beginning.

    Three frames that follow one another count as one.
    """
    begin = len(data) - len(data.lstrip(b"\0"))
    place = begin
    while (place := data.find(b"\xff", place, begin + _MOST_BEFORE_MPEG)) >= 0:
        following = place
        for _ in range(3):
            following += _mpeg_frame_bytes(data[following : following + _MPEG_HEADER]) or len(data)
        if following <= len(data):
            return place
        place += 1
    return None


def _mpeg_frame_bytes(header: bytes) -> int:
    """Return how long the frame of an MP3 is; 0 for what is none."""
    if len(header) < _MPEG_HEADER or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version, speed, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or speed in (0, 15) or rate == 3:
        return 0
    kilobits = (_MPEG_1_KBITS if version == 3 else _MPEG_2_KBITS)[speed - 1]
    hertz = (44_100, 48_000, 32_000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    return (144_000 if version == 3 else 72_000) * kilobits // hertz + (header[2] >> 1 & 1)


def is_disguised(data: bytes) -> bool:
    """Return whether the samples of a WAV are none, but a DTS or AC-3 stream in the place of them, as on DTS CDs and
    from digital outputs: played as samples it is noise."""
    if data[:4] != b"RIFF":
        return False
    for kind, place, length in _chunks(data, "little"):
        if kind == b"data":
            beginning = data[place : place + min(length, _MOST_DISGUISED)].lstrip(b"\0")
            return beginning.startswith(_DISGUISED)
    return False


def is_ambisonic(data: bytes) -> bool:
    """Return whether a sound file says that its channels are ambisonic: the first, W, hears in all directions."""
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


def _chunks(data: bytes, order: Order) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, place of the body, stated length) of the chunks of a RIFF or an IFF."""
    place = 12
    for _ in range(MAX_PARTS):
        if place + 8 > len(data):
            return
        length = int.from_bytes(data[place + 4 : place + 8], order)
        yield data[place : place + 4], place + 8, length
        place += 8 + length + length % 2
