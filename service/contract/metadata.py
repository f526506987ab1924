"""Metadata of an image file is taken out before a decoder reads the file.

A decoder that meets damaged, huge or hostile metadata refuses the picture, or takes seconds and gigabytes over it; the
pixels do not need it. Three things are kept, each read here within bounds: how the picture lies, its colour profile,
and, of a TIFF, the range of its samples (see `tiffs`). The bytes that hold the pixels are never changed.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from service.contract.colours import PQ, Curve
from service.contract.errors import BadMedia, UnsupportedMedia
from service.contract.structure import MAX_LOOSE, MAX_PARTS, MAX_TAGS, TOO_MANY

MOST_PROFILE_BYTES = 4_000_000
"""Largest colour profile that is read; those of printing machines have 2 MB."""
_MOST_XMP_BYTES = 1_000_000
_ORIENTATION = 0x0112
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_XMP_ORIENTATION = re.compile(rb"""tiff:Orientation(?:\s*=\s*["']|>)([1-8])""")

_MOST_GIF_BLOCKS = 400_000
"""Blocks of a GIF that are walked through, each a step of Python: 100 MB, as encoders write them."""
_PNG_PIXELS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_PNG_CURVES = (b"cICP", b"sRGB", b"gAMA")
_LEAST_GAMMA, _MOST_GAMMA, _SAME_GAMMA = 0.1, 5.0, 0.1
"""What is past these is a slip of the pen; and the part by which a curve may differ from sRGB's to count as it."""


@dataclass(frozen=True)
class Essentials:
    """Holds an image file without what its pixels do not need, and what was found there."""

    data: bytes
    orientation: int = 1
    """As EXIF counts: 1 is upright."""
    profile: bytes | None = None
    """The ICC profile of the colours."""
    animated: bytes | None = None
    """Of a PNG that is animated: the file with its further frames, which `data` lacks."""
    curve: Curve | None = None
    """How samples become light, where neither a profile nor sRGB says so."""
    one_frame: bool = False
    """Whether further frames are not to be looked for."""


def exif_orientation(exif: bytes) -> int | None:
    """Return the orientation (1 to 8) that EXIF, or a TIFF, states; None where it states none. Never raises."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if start + 2 > len(exif):
        return None
    (count,) = struct.unpack_from(order + "H", exif, start)
    for place in range(start + 2, start + 2 + 12 * min(count, MAX_TAGS), 12):
        if place + 12 > len(exif):
            return None
        tag, kind, length = struct.unpack_from(order + "HHI", exif, place)
        if tag == _ORIENTATION and length == 1 and kind in (3, 4):
            (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, place + 8)
            return int(value) if 1 <= value <= 8 else None
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """Return the orientation that a block of XMP states; None where it states none."""
    match = _XMP_ORIENTATION.search(xmp, 0, _MOST_XMP_BYTES)
    return int(match[1]) if match else None


def jpeg_essentials(data: bytes) -> Essentials:
    """Return a JPEG without application segments and comments, but for those that say how colours are stored."""
    pieces: list[memoryview] = []
    view, start, place = memoryview(data), 0, 2
    exif, xmp = bytearray(), b""
    profiles: dict[int, bytes] = {}
    for _ in range(MAX_PARTS):
        place = data.find(b"\xff", place)
        if place < 0 or place + 4 > len(data):
            break
        marker = data[place + 1]
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD8 or marker == 0x01:
            place += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            break
        end = place + 2 + max(2, int.from_bytes(data[place + 2 : place + 4], "big"))
        if marker == 0xFE or (0xE1 <= marker <= 0xEF and marker != 0xEE):
            body = view[place + 4 : end]
            if marker == 0xE1 and bytes(body[:6]) == b"Exif\0\0":
                exif += body[6:] if exif else body
            elif marker == 0xE1 and bytes(body[: len(_XMP)]) == _XMP:
                xmp = xmp or bytes(body)
            elif marker == 0xE2 and bytes(body[:12]) == b"ICC_PROFILE\0" and len(body) > 14:
                profiles.setdefault(body[12], bytes(body[14:]))
            pieces.append(view[start:place])
            start = end
        place = end
    profile = b"".join(profiles[number] for number in sorted(profiles))
    orientation = exif_orientation(bytes(exif)) or xmp_orientation(xmp) or 1
    stripped = b"".join([*pieces, view[start:]]) if pieces else data
    return Essentials(stripped, orientation, profile or None)


def png_essentials(data: bytes) -> Essentials:
    """Return a PNG of its critical chunks, and of a sound tRNS."""
    view = memoryview(data)
    if data[12:16] == b"CgBI":
        raise UnsupportedMedia("the PNG is in Apple's own form for apps (CgBI): save it as a plain PNG")
    still, moving = [view[:8]], [view[:8]]
    exif = xmp = b""
    profile: bytes | None = None
    curves: dict[bytes, bytes] = {}
    colour, animated, pixels, extra = -1, False, False, False
    for kind, place, length in _chunks(data):
        body, end = view[place + 8 : place + 8 + length], place + 12 + length
        chunk = view[place:end]
        if kind in _PNG_PIXELS:
            if kind == b"IHDR" and len(body) >= 13:
                colour = body[9]
            pixels = pixels or kind == b"IDAT"
            still.append(chunk)
            moving.append(chunk)
            continue
        if kind == b"tRNS" and not pixels and _sound_transparency(colour, length) and _sound_chunk(data, place, length):
            still.append(chunk)
            moving.append(chunk)
            continue
        extra = True
        if kind in _PNG_ANIMATION and _sound_chunk(data, place, length):
            animated = animated or (kind == b"acTL" and length == 8 and 1 < int.from_bytes(body[:4], "big") < 2**31)
            moving.append(chunk)
        elif kind == b"iCCP" and profile is None:
            profile = _inflated_profile(body)
        elif kind in _PNG_CURVES and _sound_chunk(data, place, length):
            curves.setdefault(kind, bytes(body))
        elif kind == b"eXIf" and not exif:
            exif = bytes(body)
        elif kind == b"iTXt" and not xmp and bytes(body[:18]) == b"XML:com.adobe.xmp\0":
            xmp = bytes(body[:_MOST_XMP_BYTES])
    orientation = exif_orientation(exif) or xmp_orientation(xmp) or 1
    return Essentials(
        b"".join(still) if extra else data,
        orientation,
        profile,
        b"".join(moving) if animated else None,
        None if profile and b"cICP" not in curves else _png_curve(curves),
    )


def _png_curve(curves: dict[bytes, bytes]) -> Curve | None:
    """Return the curve that a PNG's chunks state: each goes before those after it, as PNG has it."""
    if (code := curves.get(b"cICP")) is not None:
        return Curve(is_pq=True) if code[1:2] == bytes([PQ]) else None
    if b"sRGB" in curves:
        return None
    gamma = int.from_bytes(curves.get(b"gAMA", b"")[:4], "big") / 100_000
    return Curve(gamma) if _LEAST_GAMMA < gamma < _MOST_GAMMA and abs(2.2 * gamma - 1) > _SAME_GAMMA else None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, place, length of the body) of a PNG's chunks; the last may be cut off. Raises BadMedia past
    MAX_PARTS."""
    place = 8
    for _ in range(MAX_PARTS):
        if place + 8 > len(data):
            return
        length = int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        yield kind, place, length
        if kind == b"IEND":
            return
        place += 12 + length
    raise BadMedia(TOO_MANY)


def _sound_chunk(data: bytes, place: int, length: int) -> bool:
    checksum = data[place + 8 + length : place + 12 + length]
    return checksum == zlib.crc32(data[place + 4 : place + 8 + length]).to_bytes(4, "big")


def _sound_transparency(colour: int, length: int) -> bool:
    return {0: length == 2, 2: length == 6, 3: 0 < length <= 256}.get(colour, False)


def _inflated_profile(body: memoryview) -> bytes | None:
    name, _, body_after_name = bytes(body[: MOST_PROFILE_BYTES + 100]).partition(b"\0")
    if len(name) > 79 or body_after_name[:1] != b"\0":
        return None
    reader = zlib.decompressobj()
    try:
        profile = reader.decompress(body_after_name[1:], MOST_PROFILE_BYTES)
    except zlib.error:
        return None
    # A profile says its own length, and may be followed by anything.
    return profile if reader.eof or int.from_bytes(profile[:4], "big") <= len(profile) else None


def gif_essentials(data: bytes) -> Essentials:
    """Return a GIF without comments and application data, which Pillow joins block by block, the whole anew each
    time."""
    if len(data) < 13:
        return Essentials(data)
    view, start = memoryview(data), 0
    pieces: list[memoryview] = []
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    frames, loose, blocks_left = 0, 0, _MOST_GIF_BLOCKS
    while place + 2 <= len(data) and data[place] != 0x3B:
        began, dropped = place, False
        blocks_left -= 1
        if data[place] == 0x21:
            dropped = data[place + 1] != 0xF9
            place += 2
        elif data[place] == 0x2C and place + 10 < len(data):
            frames += 1
            place += 11 + (3 << (data[place + 9] & 7) + 1 if data[place + 9] & 0x80 else 0)
        else:
            place, loose = place + 1, loose + 1
            if loose > MAX_LOOSE and not frames:
                raise BadMedia(TOO_MANY)
            if blocks_left > 0:
                continue
        while place < len(data) and data[place] and blocks_left > 0:
            place += 1 + data[place]
            blocks_left -= 1
        place += 1
        if not frames and _MOST_GIF_BLOCKS - blocks_left - loose > MAX_PARTS:
            raise BadMedia(TOO_MANY)
        if blocks_left <= 0:  # not all blocks are walked through: the first frame is enough
            last = began if frames > 1 or dropped else len(data)
            return Essentials(b"".join([*pieces, view[start:last]]), one_frame=True)
        if dropped:
            pieces.append(view[start:began])
            start = min(place, len(data))
    return Essentials(b"".join([*pieces, view[start:]]) if pieces else data)


@dataclass(frozen=True)
class _Box:
    kind: bytes
    start: int
    end: int


def _boxes(data: bytes, start: int, end: int) -> Iterator[_Box]:
    """Yield the boxes of an ISO base media file between two places."""
    for _ in range(MAX_PARTS):
        if start + 8 > end:
            return
        size, kind, head = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        last = end if size == 0 else min(start + size, end)
        if last < start + head:
            return
        yield _Box(kind, start + head, last)
        start = last


def heif_essentials(data: bytes) -> Essentials:
    """Return a HEIC or AVIF without EXIF and XMP. The boxes `irot` and `imir`, which decoders apply, decide how it
    lies; EXIF does where there is neither. The colour profile is the decoder's to tell."""
    meta = next((box for box in _boxes(data, 0, len(data)) if box.kind == b"meta"), None)
    if meta is None:
        return Essentials(data)
    inside = {box.kind: box for box in _boxes(data, meta.start + 4, meta.end)}
    exif_item, hidden = None, []
    if (items := inside.get(b"iinf")) is not None:
        wide = data[items.start : items.start + 1] != b"\0"
        for box in _boxes(data, items.start + (8 if wide else 6), items.end):
            if box.kind != b"infe" or (version := data[box.start]) < 2:
                continue
            width = 2 if version == 2 else 4
            number = int.from_bytes(data[box.start + 4 : box.start + 4 + width], "big")
            place = box.start + 6 + width
            kind = data[place : place + 4]
            if kind in (b"Exif", b"mime"):
                hidden.append(place)
                exif_item = number if kind == b"Exif" and exif_item is None else exif_item
    curve = Curve(is_pq=True) if _is_pq(data, inside) else None
    if not hidden:
        return Essentials(data, curve=curve)
    orientation = None
    if exif_item is not None and not _is_turned(data, inside):
        exif = _heif_item(data, inside, exif_item)
        orientation = exif_orientation(exif[4 + int.from_bytes(exif[:4], "big") :])
    masked = bytearray(data)
    for place in hidden:
        masked[place : place + 4] = b"skip"
    return Essentials(bytes(masked), orientation or 1, curve=curve)


def _properties(data: bytes, inside: dict[bytes, _Box]) -> Iterator[_Box]:
    if (properties := inside.get(b"iprp")) is not None:
        for container in _boxes(data, properties.start, properties.end):
            if container.kind == b"ipco":
                yield from _boxes(data, container.start, container.end)


def _is_turned(data: bytes, inside: dict[bytes, _Box]) -> bool:
    return any(box.kind in (b"irot", b"imir") for box in _properties(data, inside))


def _is_pq(data: bytes, inside: dict[bytes, _Box]) -> bool:
    """Return whether the colours are those of HDR: primaries, curve and matrix are two bytes each."""
    colours = (data[box.start : box.end] for box in _properties(data, inside) if box.kind == b"colr")
    return any(colour[:4] == b"nclx" and colour[6:8] == bytes([0, PQ]) for colour in colours)


def _heif_item(data: bytes, inside: dict[bytes, _Box], number: int) -> bytes:
    """Return the first extent of an item, as the box `iloc` says where it lies; nothing where it does not."""
    if (places := inside.get(b"iloc")) is None:
        return b""
    at = places.start

    def take(size: int) -> int:
        nonlocal at
        at += size
        return int.from_bytes(data[at - size : at], "big")

    version = take(1)
    take(3)
    sizes, more = take(1), take(1)
    offset_size, length_size, base_size, index_size = sizes >> 4, sizes & 15, more >> 4, more & 15 if version else 0
    wide = 4 if version == 2 else 2
    for _ in range(min(take(wide), MAX_PARTS)):
        item = take(wide)
        method = take(2) & 15 if version else 0
        take(2)
        base, extents = take(base_size), take(2)
        for extent in range(extents):
            take(index_size)
            offset, length = base + take(offset_size), take(length_size)
            if item == number and extent == 0:
                if method == 1 and (box := inside.get(b"idat")) is not None:
                    offset += box.start
                elif method:
                    return b""
                return data[offset : offset + length]
            if at > places.end:
                return b""
    return b""
