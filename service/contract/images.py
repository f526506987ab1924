"""bytes → checked RGB → resize / crop / normalise → float32 (3, H, W)."""

import functools
import io
import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

# Pillow's own guard warns or raises at sizes of its choosing; ImageLimits is checked before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None

_LONG = 4
"""Times as long as wide, past which a picture is not resized whole to be cropped."""

Triple = tuple[float, float, float]

REDUCING_GAP = 2.0
SCALED_TOLERANCE = 2.0
"""Mean difference, in 255ths, of a scaled from a full decode, as the tower sees it (benchmarks/decoders.py)."""

_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values where rows and columns are exchanged


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
    the size that it is resized to. That changes pixels by less than SCALED_TOLERANCE on average. Raises as
    decode_image does.
    """
    image, size = _decoded(data, limits, spec)
    return preprocess_image(image, spec, size)


def decode_image(data: bytes, limits: ImageLimits = ImageLimits()) -> Image.Image:
    """Decode the first frame of an image file to upright RGB, at its full size.

    EXIF orientation is applied, transparency is laid on white, 16-bit samples are scaled to 8.

    Raises UnsupportedMedia (not one of FORMATS), MediaTooLarge (bytes or pixels), BadMedia (corrupt, truncated).
    """
    return _decoded(data, limits, None)[0]


def _decoded(data: bytes, limits: ImageLimits, spec: ImagePreprocessing | None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture, upright, and the (width, height) that it has in full."""
    if len(data) > limits.max_bytes:
        raise MediaTooLarge(f"the image is larger than {limits.max_bytes} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        raise UnsupportedMedia(f"not an image in one of these formats: {', '.join(FORMATS)}") from None
    if image.width * image.height > limits.max_pixels:
        raise MediaTooLarge(f"the image has more than {limits.max_pixels} pixels")
    try:
        stored = image.size
        if spec is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, _least(image, spec))
        image.load()
        lying = image.getexif().get(_ORIENTATION) in _LYING
        return _rgb(ImageOps.exif_transpose(image)), (stored[1], stored[0]) if lying else stored
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error … on corrupt data
        raise BadMedia("the image is truncated or corrupt") from None


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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        samples = np.asarray(image, dtype=np.float64)
        if not np.isfinite(samples).all():
            raise ValueError("a sample is NaN or infinite")
        if isinstance(clear := image.info.get("transparency"), int):
            samples = np.where(samples == clear, 65_535, samples)
        if image.mode != "F" or samples.max(initial=0.0) > 255:
            samples = samples / 257.0  # 16-bit full scale to 8-bit full scale
        return Image.fromarray(np.clip(np.rint(samples), 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def preprocess_image(
    image: Image.Image, spec: ImagePreprocessing, size: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """An RGB image → float32 (3, height, width), scaled to [0, 1], then (x - mean) / std per channel.

    Of an image that was decoded smaller than it is, `size` is what it has in full, by which it is cropped.
    The numbers are those of the image processors of transformers (its Pillow backend), bit for bit, but for pictures
    more than four times as long as wide that are cropped.
    """
    resample = Image.Resampling[spec.resample.upper()]
    if spec.resize == "squash":
        image = image.resize((spec.width, spec.height), resample)
    else:
        edge = spec.shortest_edge or max(spec.height, spec.width)
        full = size or image.size
        width, height = (int(edge * length / min(full)) for length in full)
        left, top = (width - spec.width) // 2, (height - spec.height) // 2
        right, bottom = left + spec.width, top + spec.height
        if max(width, height) <= _LONG * min(width, height):
            image = image.resize((width, height), resample).crop((left, top, right, bottom))
        else:
            # A strip of 1 × 10,000 would grow without bound: only the part that the crop holds is resized.
            across, down = image.width / width, image.height / height
            box = (left * across, top * down, min(image.width, right * across), min(image.height, bottom * down))
            image = image.resize((spec.width, spec.height), resample, box=box)
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
