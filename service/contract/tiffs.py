"""Tags that the pixels do not need are taken out of a TIFF's directory, and the range of its samples is read.

Samples of a TIFF may be integers or floats of many widths, with or without a sign, in a range that tags state, and 0
may be white. Pillow reads most of them as numbers, and leaves it to us what black and white are. What it has no mode
for, three or four floats or 12-bit numbers a pixel, is read as one long row of grey samples, which is what it is.
"""

import math
import struct
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.contract.errors import BadMedia, UnsupportedMedia
from service.contract.metadata import MOST_PROFILE_BYTES, Essentials, xmp_orientation
from service.contract.structure import MAX_TAGS, TOO_MANY

UNKNOWN_SAMPLES = (
    "the TIFF's samples are of a kind that is not read here: save it as grey or RGB, with 8 or 16 bits a sample"
)
_MOST_STRIPS = 300_000
"""Strips or tiles, for each of which Pillow makes an object. Of 40 megapixels there are 160,000 tiles of 16 × 16."""
_MOST_VALUES = 16
"""Of a tag that describes the pixels; more are nonsense, and are not read."""
_WIDTH, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _PREDICTOR, _TILE_WIDTH = 256, 258, 262, 277, 284, 317, 322
_LOWEST, _HIGHEST, _EXTRA, _FORMAT, _LOWEST_OF_ANY, _HIGHEST_OF_ANY = 280, 281, 338, 339, 340, 341
_XMP, _ICC, _MISSING = 700, 34675, 42113
_LONGEST_NUMBER = 64
_COMPRESSION = 259
_UNREAD_COMPRESSIONS = (9, 10, 33003, 33005, 34663, 34712, 34887, 34892, 50001, 50002, 52546)
"""JBIG, JPEG 2000, LERC, lossy DNG, WebP and JPEG XL, which Pillow's libtiff has no codecs for."""
_PLACES = (273, 279, 324, 325)
"""Where strips and tiles are."""
_LONG = (320, 347, 519, 520, 521)
"""A palette, and the tables of a JPEG."""
_DESCRIBING = (254, 255, 256, 257, 258, 259, 262, 266, 274, 277, 278, 284, 292, 293, 317, 322, 323, 332, 338, 339)
_OF_JPEG = (512, 513, 514, 515, 517, 518, 529, 530, 531, 532)
_PIXELS = frozenset((*_DESCRIBING, *_OF_JPEG, *_PLACES, *_LONG))
_BYTE_ORDER: dict[str, Literal["little", "big"]] = {"<": "little", ">": "big"}
_BLOCK_SAMPLES = 1_000_000
"""That are scaled at once: doubles of all of them would take eight times the picture."""
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_CODES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d", 16: "Q", 17: "q"}
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
_LEAST_PART = 4
"""Part of the room for signed or floating-point samples below which they are not meant to fill it."""


@dataclass(frozen=True)
class Range:
    """Says which sample is black and which is white, as the file's numbers have it."""

    black: float
    white: float

    def levels(self, samples: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Return samples of any shape as levels from 0 to 255, of the same shape."""
        levels = np.empty(samples.shape, np.uint8)
        rows = max(1, _BLOCK_SAMPLES * len(samples) // max(samples.size, 1))
        for start in range(0, len(samples), rows):
            block = samples[start : start + rows].astype(np.float64)
            block = (block - self.black) * 255 / (self.white - self.black)
            levels[start : start + rows] = np.clip(np.rint(block), 0, 255)
        return levels


@dataclass(frozen=True)
class Samples:
    """Holds what a TIFF's tags say of its samples."""

    bits: int = 8
    kind: int = UNSIGNED
    """SampleFormat: 1 unsigned, 2 signed, 3 floating point."""
    lowest: float | None = None
    highest: float | None = None
    white_is_zero: bool = False
    per_pixel: int = 1
    """Of a picture that is read as one long row of grey samples, how many are a pixel; else 1."""
    alpha: bool = False
    """Whether the last sample of such a pixel says how opaque it is."""
    predicted: bool = False
    """Whether each sample of such a picture is the difference from that of the pixel before it."""

    def range(self, smallest: float, largest: float) -> Range:
        """Return black and white of samples from `smallest` to `largest`: what the tags leave open, the samples
        decide."""
        black, white = self._range(smallest, largest)
        if not white > black:
            black, white = 0.0, float(2**self.bits - 1)
        return Range(white, black) if self.white_is_zero else Range(black, white)

    def _range(self, smallest: float, largest: float) -> tuple[float, float]:
        if self.kind == FLOAT:
            full = 1.0 if largest <= 1 else 255.0 if largest <= 255 else _full(min(largest, 65_535.0), 65_535.0)
            black = smallest if smallest <= -full / _LEAST_PART else 0.0
            return black if self.lowest is None else self.lowest, full if self.highest is None else self.highest
        if self.kind == SIGNED and self.bits <= 16:
            half = float(2 ** (self.bits - 1))
            black = (-_full(-smallest, half) if smallest < 0 else 0.0) if self.lowest is None else self.lowest
            return black, _full(largest, half - 1) if self.highest is None else self.highest
        if self.bits > 16:
            black = min(0.0, smallest) if self.lowest is None else self.lowest
            return black, max(65_535.0, largest) if self.highest is None else self.highest
        return self.lowest or 0.0, float(2**self.bits - 1) if self.highest is None else self.highest

    def absent(self, samples: NDArray[np.generic]) -> NDArray[np.bool_]:
        """Return which samples stand for a place of which nothing is known, by the tag that states their number."""
        if self.missing is None:
            return np.zeros(samples.shape, np.bool_)
        numbers = samples.astype(np.float64)
        return np.isnan(numbers) if math.isnan(self.missing) else np.isclose(numbers, self.missing, 1e-6, 0.0)

    missing: float | None = None
    """The number of samples that are none, as maps have them (GDAL's tag)."""
    are_there: bool = False
    """Whether the directory can be read and says where the pixels are."""

    @property
    def is_plain(self) -> bool:
        """Return whether Pillow's own reading of 8 and 16 bits has the range that the tags state."""
        return (
            self.kind == UNSIGNED
            and self.bits in (1, 2, 4, 8, 16)
            and not self.lowest
            and self.highest in (None, float(2**self.bits - 1))
            and (self.bits < 16 or not self.white_is_zero)
        )


@dataclass(frozen=True)
class _Tag:
    place: int
    """Of its entry in the directory."""
    kind: int
    count: int
    value: int
    """Place of its first value."""


class _Directory:
    """Reads the first directory of a TIFF, and rewrites its entries in place."""

    def __init__(self, data: bytes) -> None:
        self.data, self._as_it_was = bytearray(data), data
        self.order = ">" if data.startswith(b"MM") else "<"
        self.large = data[2:4] in (b"+\0", b"\0+")
        self.tags: dict[int, _Tag] = {}
        where, counted = ("Q", "Q") if self.large else ("I", "H")
        self._entry = self.order + ("HHQ" if self.large else "HHI")
        self._room = 8 if self.large else 4
        try:
            (start,) = struct.unpack_from(self.order + where, data, 8 if self.large else 4)
            (count,) = struct.unpack_from(self.order + counted, data, start)
            if count > MAX_TAGS:
                raise BadMedia(TOO_MANY)
            start += struct.calcsize(counted)
            size = struct.calcsize(self._entry) + self._room
            for place in range(start, start + size * count, size):
                tag, kind, length = struct.unpack_from(self._entry, data, place)
                value = place + size - self._room
                if _SIZES.get(kind, 1) * length > self._room:
                    (value,) = struct.unpack_from(self.order + where, data, value)
                self.tags.setdefault(tag, _Tag(place, kind, length, value))
                if not _is_needed(tag, length):
                    self._rewrite(place, 0xFFFF, 1, 1, 0)
        except (struct.error, OverflowError):
            pass  # ends too early, or points outside: Pillow says so

    def numbers(self, tag: int) -> tuple[float, ...]:
        """Return the values of a tag; none where it is not there, is of an odd kind, or has too many."""
        entry = self.tags.get(tag)
        if entry is None or entry.kind not in _CODES or not 0 < entry.count <= _MOST_VALUES:
            return ()
        try:
            return struct.unpack_from(f"{self.order}{entry.count}{_CODES[entry.kind]}", self._as_it_was, entry.value)
        except (struct.error, OverflowError):
            return ()

    def number(self, tag: int, otherwise: int) -> int:
        numbers = self.numbers(tag)
        return int(numbers[0]) if numbers else otherwise

    def bytes_of(self, tag: int, most: int) -> bytes | None:
        entry = self.tags.get(tag)
        if entry is None or entry.kind not in (1, 7) or not 0 < entry.count <= most:
            return None
        return self._as_it_was[entry.value : entry.value + entry.count]

    def text(self, tag: int) -> str:
        """Return a short text of ASCII; an empty one where it is not there."""
        entry = self.tags.get(tag)
        if entry is None or entry.kind != 2 or not 0 < entry.count <= _LONGEST_NUMBER:
            return ""
        return self._as_it_was[entry.value : entry.value + entry.count].decode("latin-1").strip("\0 ")

    def first_places(self) -> list[int]:
        """Return where the first strip or tile begins."""
        tags = [self.tags[tag] for tag in (273, 324) if tag in self.tags]
        return [
            int.from_bytes(self.data[entry.value : entry.value + _SIZES[entry.kind]], _BYTE_ORDER[self.order])
            for entry in tags
            if entry.kind in (3, 4, 16)
        ]

    def set(self, tag: int, number: int) -> None:
        """Give a tag that is there one number."""
        if (entry := self.tags.get(tag)) is not None:
            self._rewrite(entry.place, tag, 4, 1, number)

    def drop(self, tag: int) -> None:
        if (entry := self.tags.get(tag)) is not None:
            self._rewrite(entry.place, 0xFFFF, 1, 1, 0)

    def _rewrite(self, place: int, tag: int, kind: int, count: int, value: int) -> None:
        body = struct.pack(self.order + "I", value) if kind == 4 else b""
        entry = struct.pack(self._entry, tag, kind, count) + body.ljust(self._room, b"\0")
        self.data[place : place + len(entry)] = entry


def _is_needed(tag: int, count: int) -> bool:
    if tag in _PLACES and count > _MOST_STRIPS:
        raise BadMedia("the image is cut into too many parts")
    return tag in _PIXELS and (count <= _MOST_VALUES or tag in _PLACES or tag in _LONG)


def tiff_essentials(data: bytes) -> tuple[Essentials, Samples]:
    """Return a TIFF without the tags that its pixels do not need, and what the others say of its samples.

    Raises BadMedia (too many strips), UnsupportedMedia (samples that cannot be read).
    """
    directory = _Directory(data)
    samples = _samples(directory)
    orientation = None if directory.numbers(274) else xmp_orientation(directory.bytes_of(_XMP, len(data)) or b"")
    profile = directory.bytes_of(_ICC, MOST_PROFILE_BYTES)
    if samples.per_pixel > 1:
        for tag, factor in ((_WIDTH, samples.per_pixel), (_TILE_WIDTH, samples.per_pixel)):
            directory.set(tag, factor * directory.number(tag, 0))
        for tag, number in ((_BITS, samples.bits), (_SAMPLES, 1), (_PHOTOMETRIC, 1), (_PREDICTOR, 1)):
            directory.set(tag, number)
        directory.set(_FORMAT, samples.kind)
        directory.drop(_EXTRA)
    return Essentials(bytes(directory.data), orientation or 1, profile), samples


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _samples(directory: _Directory) -> Samples:
    if directory.number(_COMPRESSION, 1) in _UNREAD_COMPRESSIONS:
        raise UnsupportedMedia("the TIFF's compression is not read here: save it with LZW or Deflate, or with none")
    bits, kinds = directory.numbers(_BITS) or (1,), directory.numbers(_FORMAT) or (1,)
    lowest = directory.numbers(_LOWEST_OF_ANY) or directory.numbers(_LOWEST)
    highest = directory.numbers(_HIGHEST_OF_ANY) or directory.numbers(_HIGHEST)
    photometric = directory.number(_PHOTOMETRIC, 1)
    samples = Samples(
        bits=int(bits[0]),
        kind=int(kinds[0]) if kinds[0] in (SIGNED, FLOAT) else UNSIGNED,
        lowest=float(min(lowest)) if lowest else None,
        highest=float(max(highest)) if highest else None,
        white_is_zero=photometric == 0,
        missing=_number(directory.text(_MISSING)),
        are_there=any(0 < place < len(directory.data) for place in directory.first_places()),
    )
    count = directory.number(_SAMPLES, 1)
    if count == 1 or samples.is_plain or (samples.kind == UNSIGNED and samples.bits <= 8):
        return samples
    predictor = directory.number(_PREDICTOR, 1)
    can_be_read = (
        count in (2, 3, 4)
        and photometric in (0, 1, 2)
        and directory.number(_PLANAR, 1) == 1
        and len(set(bits)) == 1
        and samples.bits in (16, 32, 64)
        and (predictor == 1 or (predictor == 2 and samples.bits == 16 and _TILE_WIDTH not in directory.tags))
    )
    if not can_be_read:
        raise UnsupportedMedia(UNKNOWN_SAMPLES)
    alpha = count in (2, 4) and directory.numbers(_EXTRA) in ((1,), (2,))
    return replace(samples, per_pixel=count, alpha=alpha, predicted=predictor == 2)


def _full(largest: float, full: float) -> float:
    """Return the sample that is full scale: heights of a map, or what an instrument measured, may be a small part of
    what the samples have room for, and would be all black."""
    return full if full / _LEAST_PART <= largest <= full else max(largest, 1.0)


def check_finite(samples: NDArray[np.generic]) -> None:
    """Raises BadMedia."""
    if not np.isfinite(samples).all():
        raise BadMedia("the image has samples that are not finite (NaN or infinite): give those without a value one")


def regrouped(image: Image.Image, samples: Samples) -> Image.Image:
    """Turn a picture that was read as one long row of grey samples into RGB, RGBA or grey with alpha, of 8 bits a
    sample.

    Raises BadMedia where a sample is NaN or infinite.
    """
    pixels = np.asarray(image)
    pixels = pixels.reshape(image.height, -1, samples.per_pixel)
    if samples.predicted:
        kind = np.int16 if samples.kind == SIGNED else np.uint16
        pixels = np.cumsum(pixels.astype(kind), axis=1, dtype=kind)
    count = 3 if samples.per_pixel > 2 else 1
    check_finite(pixels)
    colours = pixels[..., :count]
    levels = samples.range(float(colours.min()), float(colours.max())).levels(colours)
    picture = Image.fromarray(levels if count == 3 else levels[..., 0])
    if samples.alpha:
        opaque = pixels[..., -1]
        picture.putalpha(
            Image.fromarray(replace(samples, white_is_zero=False).range(0.0, float(opaque.max())).levels(opaque))
        )
    return picture
