"""bytes → checked RGB → resize / crop / normalise → float32 (3, H, W)."""

import functools
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia
from service.contract.structure import LONGEST_SIDE, look_over, look_over_tags

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Pillow's own guard warns or raises at sizes of its choosing; ImageLimits is checked before memory is taken.
Image.MAX_IMAGE_PIXELS = None

_LONG = 4
"""Times as long as wide, past which a picture is not resized whole to be cropped."""

Triple = tuple[float, float, float]

REDUCING_GAP = 2.0
SCALED_TOLERANCE = 2.0
"""Mean difference, in 255ths, of a scaled from a full decode, as the tower sees it (benchmarks/decoders.py)."""

_LARGE, _BAND = 4_000_000, 1_000_000
"""Pixels from which on a picture becomes RGB in bands, and of a band."""
_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values where rows and columns are exchanged
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_TO_EIGHT = ((np.arange(65_536) + 128) // 257).astype(np.uint8)
"""The nearest of 256 levels, full scale to full scale."""
_CORRUPT = "the image is truncated or corrupt"


class ImagePreprocessing(BaseModel):
    """How an image tower wants its pixels; complete, and carried by the bundle's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["image"] = "image"
    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    resize: Literal["squash", "shortest_edge"] = "squash"
    """`squash` ignores the aspect ratio; `shortest_edge` keeps it, to the pixel, and crops the centre."""
    shortest_edge: int | None = Field(default=None, gt=0, le=4096)
    """Length of the shorter side before the crop; None means the crop's own size."""
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs: pixels, float32 (B, 3, height, width)."""
        return ("pixels",)

    @model_validator(mode="after")
    def _covers_the_crop(self) -> Self:
        if self.resize == "shortest_edge" and (self.shortest_edge or 4096) < max(self.height, self.width):
            raise ValueError(f"shortest_edge {self.shortest_edge} is less than the crop, {self.height} x {self.width}")
        return self


@dataclass(frozen=True)
class ImageLimits:
    max_bytes: int = 10_000_000
    max_pixels: int = 40_000_000


def read_image(data: bytes, spec: ImagePreprocessing, limits: ImageLimits = ImageLimits()) -> NDArray[np.float32]:
    """An image file → what the tower takes: `preprocess_image(decode_image(…))`, with less decoded where less will do.

    A JPEG is decoded at 1/2, 1/4 or 1/8, straight from its cosine coefficients, where that leaves REDUCING_GAP times
    the size that it is resized to. That changes pixels by less than SCALED_TOLERANCE on average. Of a large picture
    that is not RGB yet, only a band at a time is: to one level of 255. Raises as decode_image does.
    """
    picture = _decoded(data, limits, spec)
    try:
        return _preprocessed(picture, spec)
    except Exception:  # samples that are no numbers come to light when they become RGB
        raise BadMedia(_CORRUPT) from None


def decode_image(data: bytes, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """Decode the first frame of an image file to upright RGB, at its full size.

    EXIF orientation is applied, transparency is laid on white, 16-bit samples are scaled to 8.

    Raises UnsupportedMedia (not one of FORMATS), MediaTooLarge (bytes or pixels), BadMedia (corrupt, truncated).
    """
    picture = _decoded(data, limits, None)
    try:
        return picture.whole()
    except Exception:
        raise BadMedia(_CORRUPT) from None


@dataclass(frozen=True, eq=False)
class _Picture:
    """A picture as it was decoded: of any mode, and perhaps lying on its side."""

    image: Image.Image
    orientation: int = 1
    """EXIF's: 1 is upright."""
    full: tuple[int, int] | None = None
    """(width, height), upright, where it was decoded smaller than it is."""

    @property
    def size(self) -> tuple[int, int]:
        """Upright."""
        width, height = self.image.size
        return (height, width) if self.orientation in _LYING else (width, height)

    @property
    def _plain(self) -> bool:
        return self.image.mode == "RGB" and self.orientation == 1 and "transparency" not in self.image.info

    def whole(self) -> Image.Image:
        """Upright, in RGB."""
        if self._plain:
            return self.image
        bands = list(self._ranges())
        if len(bands) == 1:
            return self._band(*bands[0])
        image = Image.new("RGB", self.size)
        for top, bottom in bands:
            image.paste(self._band(top, bottom), (0, top))
        return image

    def resized(
        self, size: tuple[int, int], resample: Image.Resampling, box: tuple[float, float, float, float] | None = None
    ) -> Image.Image:
        """`whole().resize(size, resample, box)`, with no more than a band in RGB at a time.

        A band is resized across by itself, and all of them down at the end. Pillow goes down first where that is less
        work, and rounds in between, so a sample may differ by one of 255 levels.
        """
        if self._plain or len(list(self._ranges())) == 1:
            return self.whole().resize(size, resample, box)
        width, height = self.size
        left, top, right, bottom = box or (0, 0, width, height)
        across = Image.new("RGB", (size[0], height))
        for start, end in self._ranges():
            band = self._band(start, end)
            across.paste(band.resize((size[0], end - start), resample, (left, 0, right, end - start)), (0, start))
        return across.resize(size, resample, (0, top, size[0], bottom))

    def _ranges(self) -> Iterator[tuple[int, int]]:
        width, height = self.size
        rows = height if width * height <= _LARGE else max(1, _BAND // width)
        return ((top, min(height, top + rows)) for top in range(0, height, rows))

    def _band(self, top: int, bottom: int) -> Image.Image:
        """Rows of the upright picture, in RGB."""
        width, height = self.image.size
        first, last = top, bottom
        if self.orientation in (3, 4):
            first, last = height - bottom, height - top
        elif self.orientation in (7, 8):
            first, last = width - bottom, width - top
        box = (first, 0, last, height) if self.orientation in _LYING else (0, first, width, last)
        part = self.image if box == (0, 0, width, height) else self.image.crop(box)
        if self.orientation in _UPRIGHT:
            part = part.transpose(_UPRIGHT[self.orientation])
        return _rgb(part, self._loudest)

    @functools.cached_property
    def _loudest(self) -> float:
        """The largest sample, where samples are numbers of any size."""
        extremes = self.image.getextrema() if self.image.mode == "F" else (0.0, 0.0)
        return float(extremes[1])  # type: ignore[arg-type]


def _decoded(data: bytes, limits: ImageLimits, spec: ImagePreprocessing | None) -> _Picture:
    if len(data) > limits.max_bytes:
        raise MediaTooLarge(f"the image is larger than {limits.max_bytes} bytes")
    look_over(data, limits.max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        raise UnsupportedMedia(f"not an image in one of these formats: {', '.join(FORMATS)}") from None
    if image.width * image.height > limits.max_pixels:
        raise MediaTooLarge(f"the image has more than {limits.max_pixels} pixels")
    if max(image.size) > LONGEST_SIDE:
        raise MediaTooLarge(f"the image is more than {LONGEST_SIDE} pixels wide or high")
    try:
        width, height = image.size
        if spec is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, _least(image, spec))
        image.load()
        look_over_tags(image.info.get("exif", b"").removeprefix(b"Exif\0\0"))
        orientation = image.getexif().get(_ORIENTATION)
        full = (height, width) if orientation in _LYING else (width, height)
        return _Picture(image, orientation if orientation in _UPRIGHT else 1, full)
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error … on corrupt data
        raise BadMedia(_CORRUPT) from None


def _least(image: Image.Image, spec: ImagePreprocessing) -> tuple[int, int]:
    """The size, as the file stores it, below which a scaled decode would cost too much of what the tower sees."""
    if spec.resize == "squash":
        width, height = spec.width, spec.height
        if image.getexif().get(_ORIENTATION) in _LYING:
            width, height = height, width
    else:
        edge = spec.shortest_edge or max(spec.height, spec.width)
        scale = edge / min(image.size)
        width, height = math.ceil(image.width * scale), math.ceil(image.height * scale)
    return math.ceil(REDUCING_GAP * width), math.ceil(REDUCING_GAP * height)


def _rgb(image: Image.Image, loudest: float) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        samples = np.clip(np.asarray(image), 0, 65_535).astype(np.uint16)
        levels = _SIXTEEN_TO_EIGHT[samples]
        if isinstance(clear := image.info.get("transparency"), int):
            levels[samples == clear] = 255
        return Image.fromarray(levels).convert("RGB")
    if image.mode == "F":
        floats = np.asarray(image, dtype=np.float64)
        if not np.isfinite(floats).all():
            raise ValueError("a sample is NaN or infinite")
        floats = floats / 257.0 if loudest > 255 else floats  # 16-bit full scale to 8-bit full scale
        return Image.fromarray(np.clip(np.rint(floats), 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def preprocess_image(
    image: Image.Image, spec: ImagePreprocessing, size: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """An RGB image → float32 (3, height, width), scaled to [0, 1], then (x - mean) / std per channel.

    Of an image that was decoded smaller than it is, `size` is what it has in full, by which it is cropped.
    The numbers are those of the image processors of transformers (its Pillow backend), bit for bit, but for pictures
    more than four times as long as wide that are cropped.
    """
    return _preprocessed(_Picture(image, full=size), spec)


def _preprocessed(picture: _Picture, spec: ImagePreprocessing) -> NDArray[np.float32]:
    resample = Image.Resampling[spec.resample.upper()]
    if spec.resize == "squash":
        image = picture.resized((spec.width, spec.height), resample)
    else:
        edge = spec.shortest_edge or max(spec.height, spec.width)
        full = picture.full or picture.size
        width, height = (int(edge * length / min(full)) for length in full)
        left, top = (width - spec.width) // 2, (height - spec.height) // 2
        right, bottom = left + spec.width, top + spec.height
        if max(width, height) <= _LONG * min(width, height):
            image = picture.resized((width, height), resample).crop((left, top, right, bottom))
        else:
            # A strip of 1 × 10,000 would grow without bound: only the part that the crop holds is resized.
            wide, high = picture.size
            across, down = wide / width, high / height
            box = (left * across, top * down, min(wide, right * across), min(high, bottom * down))
            image = picture.resized((spec.width, spec.height), resample, box)
    samples = np.asarray(image)
    pixels = np.empty((3, spec.height, spec.width), np.float32)
    for channel, values in enumerate(_normalised(spec.mean, spec.std)):
        np.take(values, samples[:, :, channel], out=pixels[channel], mode="clip")
    return pixels


@functools.lru_cache(maxsize=8)
def _normalised(mean: Triple, std: Triple) -> NDArray[np.float32]:
    """(3, 256): what each sample of each channel becomes. To look it up takes a tenth of the time of computing it."""
    samples = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
    return np.ascontiguousarray(((samples - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).T)
