"""An image file is checked, decoded to RGB, resized, cropped and normalised, and becomes float32 (3, H, W)."""

import functools
import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, ImageCms, features
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from service.contract.colours import Curve, colour_mode, to_srgb
from service.contract.containers import refusal
from service.contract.errors import BadMedia, InputError, MediaTooLarge, UnsupportedMedia, check_bytes
from service.contract.metadata import (
    Essentials,
    exif_orientation,
    gif_essentials,
    heif_essentials,
    jpeg_essentials,
    png_essentials,
    xmp_orientation,
)
from service.contract.structure import (
    LONGEST_SIDE,
    check_sparse,
    check_structure,
    picture_format,
)
from service.contract.tiffs import (
    FLOAT,
    SIGNED,
    UNKNOWN_SAMPLES,
    UNSIGNED,
    Samples,
    check_finite,
    regrouped,
    tiff_essentials,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIC")
NO_HEIC = "HEIC images are read where pillow-heif is installed: pip install 'isthmus[heif]'"
NO_AVIF = "AVIF images are read where Pillow has its codec for them: pip install 'pillow>=11.3'"

# Pillow's own guard warns or raises at sizes of its choosing; ImageLimits is checked before memory is taken.
Image.MAX_IMAGE_PIXELS = None
# The lanes of the towers have the cores.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_LONG = 4
"""Times as long as wide, past which a picture is not resized whole to be cropped."""

Triple = Annotated[
    tuple[float, float, float],
    WithJsonSchema({"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}),
]

Pair = Annotated[
    tuple[int, int], WithJsonSchema({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2})
]

REDUCING_GAP = 2.0
SMALL_SIDE = 480
"""Longest side of a thumbnail, in pixels."""
SMALL_RESAMPLE, SMALL_GAP = Image.Resampling.HAMMING, 1.0
"""The filter for previews, after the mean of whole pixels: a third of the time of Lanczos, and about as sharp."""
SCALED_TOLERANCE = 2.0
"""Mean difference, in 255ths, of a scaled from a full decode, as the tower sees it (docs/LOG.md, JPEG decoders)."""

_LARGE, _BAND = 4_000_000, 250_000
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
_BIT_FIELDS = b"\3\0\0\0"
_UNKNOWN_BMP = "the BMP's pixels are of a kind that is not read here: save it with 24 bits a pixel, or as PNG"

_MOST_SCALED = 16
"""Times the limit of pixels that a JPEG may have which is decoded at a fraction of its size: to read through it all
takes time, if no memory."""
_MOST_MISSING = 0.1
"""Part of a JPEG's rows that may be missing at its end for the rest to be read."""
_LEAST_SCANS = 5
"""That a progressive JPEG which breaks off must have begun, of the six or ten that encoders write."""
_LEAST_CONTRAST = 32.0
"""Mean difference from white, in 255ths, below which what is visible of a picture is not seen on white."""
_LEAST_CLEAR = 0.02
"""Part of a picture that is transparent below which its ground does not matter."""
_LEAST_SHOWN = 4.0
"""Standard deviation, in 255ths, from which on the frame of an animation shows something."""
_CLEARLY_SHOWN = 24.0
"""The same, from which on no later frame is looked at, where the first shows nothing: a film may fade in."""
_SEARCHED_PIXELS = 10_000_000
"""Of an animation, up to which its later frames are looked at, or a quarter of the limit: five of them are held."""
_MOST_FRAMES = 256
"""Of an animation that are looked at for one that shows something."""
_SAMPLED = 512
"""Pixels of a side, at most, of the sample by which a ground or a frame is chosen."""
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")


class ImagePreprocessing(BaseModel):
    """Says how an image tower wants its pixels: completely, in the bundle's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["image"] = "image"
    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    resize: Literal["squash", "shortest_edge"] = "squash"
    """`squash` ignores the aspect ratio; `shortest_edge` keeps it, to the pixel, and crops the centre."""
    shortest_edge: int | None = Field(default=None, gt=0, le=4096)
    """Length of the shorter side before the crop; None means the crop's own size."""
    squashed: Pair | None = None
    """Height and width that `squash` makes, before the centre is cropped; None means the crop's own."""
    resample: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bilinear"
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the graph's inputs: pixels, float32 (B, 3, height, width)."""
        return ("pixels",)

    @model_validator(mode="after")
    def _covers_the_crop(self) -> Self:
        if self.resize == "shortest_edge" and (self.shortest_edge or 4096) < max(self.height, self.width):
            raise ValueError(f"shortest_edge {self.shortest_edge} is less than the crop, {self.height} x {self.width}")
        if self.squashed is not None:
            if self.resize != "squash":
                raise ValueError("squashed is given, and resize is not squash")
            if not (self.height <= self.squashed[0] <= 4096 and self.width <= self.squashed[1] <= 4096):
                raise ValueError(
                    f"squashed {self.squashed} is no size from the crop, {self.height} x {self.width}, to 4096"
                )
        return self


@dataclass(frozen=True)
class ImageLimits:
    max_bytes: int = 25_000_000
    max_pixels: int = 40_000_000
    """That are decoded: a JPEG of which an eighth of each side is enough may have more."""

    def check_pixels(self, width: int, height: int, full_pixels: int | None = None) -> None:
        """Check the pixels that are decoded; `whole` is what the image has in full, in pixels. Raises MediaTooLarge."""
        if width * height > self.max_pixels:
            raise MediaTooLarge(
                f"the image has {full_pixels or width * height:,} pixels, more than the {self.max_pixels:,} of "
                "ISTHMUS_MAX_IMAGE_PIXELS"
            )


def read_image(data: bytes, spec: ImagePreprocessing, limits: ImageLimits = ImageLimits()) -> NDArray[np.float32]:
    """Return the pixels of `see_image`."""
    return see_image(data, spec, limits)[0]


def see_image(
    data: bytes,
    spec: ImagePreprocessing,
    limits: ImageLimits = ImageLimits(),
    show: Callable[[Image.Image], None] | None = None,
) -> tuple[NDArray[np.float32], bool]:
    """Return an image file's pixels (3, height, width), and whether the file ends before the picture does: the little
    that is missing is grey.

    The pixels are those of `preprocess_image(decode_image(…))`, with less decoded where less will do.

    A JPEG is decoded at 1/2, 1/4 or 1/8, straight from its cosine coefficients, where that leaves REDUCING_GAP times
    the size that it is resized to. That changes pixels by less than SCALED_TOLERANCE on average. Of a large picture
    that is not RGB yet, only a band at a time is: to one level of 255. `show` is called with the whole picture, upright
    in RGB and of at most SMALL_SIDE pixels a side, unless it has more and fewer were decoded. Raises as decode_image
    does.
    """
    picture = _decoded(data, limits, spec)
    try:
        pixels = _preprocessed(picture, spec)
        if show is not None and max(picture.size) >= min(SMALL_SIDE, max(picture.full or picture.size)):
            small = picture.whole()
            small.thumbnail((SMALL_SIDE, SMALL_SIDE), SMALL_RESAMPLE, SMALL_GAP)
            show(small)
        return pixels, picture.cut
    except InputError:
        raise
    except Exception:  # samples that are no numbers come to light when they become RGB
        raise BadMedia(_CORRUPT) from None


def decode_image(data: bytes, limits: ImageLimits = ImageLimits(), enough: int | None = None) -> Image.Image:
    """Decode one frame of an image file to upright RGB: the first that shows something.

    The orientation that EXIF or the container states is applied, colours of an embedded profile become sRGB, 16-bit
    and floating-point samples are scaled to 8 bits, and transparency is laid on white, or on black where what is
    visible is white. A JPEG whose last rows are missing is read. Where sides of `enough` pixels are enough, a JPEG is
    decoded at a fraction of its size; other pictures, and without `enough` all, have their full size.

    Raises UnsupportedMedia (not one of FORMATS, no codec), MediaTooLarge (bytes or pixels), BadMedia (corrupt,
    truncated).
    """
    picture = _decoded(data, limits, enough)
    try:
        return picture.whole()
    except InputError:
        raise
    except Exception:
        raise BadMedia(_CORRUPT) from None


@dataclass(frozen=True, eq=False)
class _Picture:
    """Holds a picture as it was decoded: of any mode, and perhaps lying on its side."""

    image: Image.Image
    orientation: int = 1
    """EXIF's: 1 is upright."""
    full: tuple[int, int] | None = None
    """(width, height), upright, where it was decoded smaller than it is."""
    profile: bytes | None = None
    """ICC, of the colours."""
    curve: Curve | None = None
    samples: Samples | None = None
    """Of a TIFF whose samples have another range than their bits."""
    cut: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) of the upright picture."""
        width, height = self.image.size
        return (height, width) if self.orientation in _LYING else (width, height)

    @property
    def _plain(self) -> bool:
        return (
            self.image.mode == "RGB"
            and self.orientation == 1
            and "transparency" not in self.image.info
            and self._transform is None
            and self.curve is None
            and self.samples is None
        )

    def whole(self) -> Image.Image:
        """Return the picture upright, in RGB."""
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
        """Return `whole().resize(size, resample, box)`, with no more than a band in RGB at a time.

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
        """Return rows of the upright picture, in RGB."""
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
        return self._rgb(part) if self.curve is None else self.curve.to_srgb(self._rgb(part))

    @functools.cached_property
    def _extremes(self) -> tuple[float, float]:
        """Return the smallest and the largest sample, where samples are numbers of any size."""
        if self.image.mode not in ("I", "F", "L"):
            return 0.0, 255.0
        if self.samples is not None and self.samples.missing is not None:
            return self._known_extremes(self.samples)
        smallest, largest = self.image.getextrema()
        return float(smallest), float(largest)  # type: ignore[arg-type]

    def _known_extremes(self, samples: Samples) -> tuple[float, float]:
        """Return the extremes of the samples that stand for something, a band at a time; 0 and 1 where none does."""
        (width, height), lows, highs = self.image.size, list[float](), list[float]()
        rows = max(1, _BAND // width)
        for top in range(0, height, rows):
            pixels = np.asarray(self.image.crop((0, top, width, min(height, top + rows))))
            known = pixels[~samples.absent(pixels)]
            if known.size:
                lows.append(float(known.min()))
                highs.append(float(known.max()))
        return (min(lows), max(highs)) if lows else (0.0, 1.0)

    @functools.cached_property
    def _transform(self) -> ImageCms.ImageCmsTransform | None:
        return None if self.profile is None else to_srgb(self.profile, colour_mode(self.image.mode))

    @functools.cached_property
    def _ground(self) -> int:
        """Return white (255), or black (0) where what is visible would not be seen on white."""
        sample = _sample(self.image)
        if sample.mode.startswith("I"):
            samples = np.asarray(sample)
            visible = (samples != self.image.info["transparency"]).astype(np.float64)
            away = 255.0 - _SIXTEEN_TO_EIGHT[np.clip(samples, 0, 65_535).astype(np.uint16)]
        else:
            pixels = np.asarray(sample.convert("RGBA"))
            visible, away = pixels[..., 3] / 255, 255.0 - pixels[..., :3].min(axis=2)
        clear, weight = 1.0 - visible.mean(), visible.sum()
        return 0 if clear >= _LEAST_CLEAR and weight > 0 and (visible * away).sum() < _LEAST_CONTRAST * weight else 255

    def _rgb(self, image: Image.Image) -> Image.Image:
        if self.samples is not None or image.mode == "F":
            image = _scaled(image, self.samples or Samples(32, kind=FLOAT), self._extremes)
        elif image.mode.startswith("I;16") or image.mode == "I":
            samples = np.clip(np.asarray(image), 0, 65_535).astype(np.uint16)
            levels = _SIXTEEN_TO_EIGHT[samples]
            if isinstance(clear := image.info.get("transparency"), int):
                levels[samples == clear] = self._ground
            image = Image.fromarray(levels)
        if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
            image = image.convert("RGBA")
            if self._transform is None:
                ground = Image.new("RGBA", image.size, (*(self._ground,) * 3, 255))
                return Image.alpha_composite(ground, image).convert("RGB")
            colours = self._converted(image.convert("L" if colour_mode(self.image.mode) == "L" else "RGB"))
            return Image.composite(colours, Image.new("RGB", image.size, (self._ground,) * 3), image.getchannel("A"))
        return self._converted(image)

    def _converted(self, image: Image.Image) -> Image.Image:
        """Convert colours without alpha to sRGB."""
        if self._transform is not None:
            mode = colour_mode(self.image.mode)
            return self._transform.apply(image if image.mode == mode else image.convert(mode))
        return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(image: Image.Image, samples: Samples, extremes: tuple[float, float]) -> Image.Image:
    """Turn a TIFF's samples into levels, by the range that its tags or the samples themselves state."""
    if image.mode in ("L", "RGB"):
        levels = np.arange(256)
        if samples.kind == SIGNED:
            levels = np.where(levels > 127, levels - 256, levels)
            extremes = (-1.0, 127.0) if extremes[1] > 127 else (0.0, 127.0)
        # Pillow has turned round already what has white for 0.
        table = replace(samples, white_is_zero=False).range(*extremes).levels(levels)
        return image.point(table.tolist() * len(image.getbands()))
    pixels = np.asarray(image)
    if image.mode == "I" and samples.kind == UNSIGNED and samples.bits == 32:
        pixels = pixels.view(np.uint32)
        extremes = (0.0, 2.0**32 - 1) if extremes[0] < 0 else extremes
    absent = samples.absent(pixels)
    if absent.any():
        pixels = np.where(absent, pixels.dtype.type(0), pixels)
    check_finite(pixels)
    grey = samples.range(*extremes).levels(pixels)
    grey[absent] = 0
    return Image.fromarray(grey)


def _sample(image: Image.Image) -> Image.Image:
    """Return a picture of the same mode with at most _SAMPLED pixels to a side, each one of its own."""
    width, height = (min(length, _SAMPLED) for length in image.size)
    return image if (width, height) == image.size else image.resize((width, height), Image.Resampling.NEAREST)


Enough = ImagePreprocessing | int
"""For what a picture is decoded: a tower, or sides of so many pixels."""
_ESSENTIALS: Mapping[str, Callable[[bytes], Essentials]] = {
    "JPEG": jpeg_essentials,
    "PNG": png_essentials,
    "GIF": gif_essentials,
    "AVIF": heif_essentials,
    "HEIC": heif_essentials,
}


def _decoded(data: bytes, limits: ImageLimits, enough: Enough | None) -> _Picture:
    format, essentials, samples = _essentials_of(data, limits)
    try:
        if format == "HEIC":
            image = _heic(essentials.data, limits)
            profile = image.info.get("icc_profile")
            return _Picture(image, essentials.orientation, profile=profile, curve=essentials.curve)
        return _with_pillow(essentials, format, samples, limits, enough)
    except InputError:
        raise
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error … on corrupt data
        raise BadMedia(_CORRUPT) from None


def header_pixels(data: bytes, limits: ImageLimits = ImageLimits()) -> int:
    """Return how many pixels decoding an image costs at most, by its header. Raises for what is going to be refused."""
    format, width, height = _header(data, limits)
    if format == "JPEG":
        replace(limits, max_pixels=_MOST_SCALED * limits.max_pixels).check_pixels(width, height)
        return min(width * height, limits.max_pixels)
    limits.check_pixels(width, height)
    return width * height


def header_size(data: bytes, limits: ImageLimits = ImageLimits()) -> tuple[int, int]:
    """Return width and height of an image as its header states them, before it is turned. Raises InputError."""
    return _header(data, limits)[1:]


def _header(data: bytes, limits: ImageLimits) -> tuple[str, int, int]:
    """Return the format, the width and the height that an image's header states."""
    format, essentials, samples = _essentials_of(data, limits)
    if format == "HEIC":
        size: tuple[int, int] = _open_heic(essentials.data).size
        return format, *size
    with Image.open(io.BytesIO(essentials.data), formats=(format,)) as image:
        return format, image.width // samples.per_pixel, image.height


def _essentials_of(data: bytes, limits: ImageLimits) -> tuple[str, Essentials, Samples]:
    """Return the format of an image file and what a decoder needs of it. Raises InputError for what is not decoded."""
    check_bytes("image", len(data), limits.max_bytes, "ISTHMUS_MAX_IMAGE_BYTES")
    format = picture_format(data)
    if format is None:
        raise refusal(data, f"not an image in one of these formats: {', '.join(FORMATS)}")
    if format == "AVIF" and not features.check("avif"):
        raise UnsupportedMedia(NO_AVIF)
    check_structure(data, limits.max_pixels)
    if format == "TIFF":
        return format, *tiff_essentials(data)
    return format, _ESSENTIALS.get(format, Essentials)(data), Samples()


def _with_pillow(
    essentials: Essentials, format: str, samples: Samples, limits: ImageLimits, enough: Enough | None
) -> _Picture:
    try:
        image: Image.Image = Image.open(io.BytesIO(essentials.data), formats=(format,))
    except Exception:
        if format == "TIFF" and samples.are_there:
            raise UnsupportedMedia(UNKNOWN_SAMPLES) from None
        if format == "BMP" and essentials.data[30:34] == _BIT_FIELDS:
            raise UnsupportedMedia(_UNKNOWN_BMP) from None
        raise
    width, height = image.width // samples.per_pixel, image.height
    if max(width, height) > LONGEST_SIDE:
        raise MediaTooLarge(f"the image is more than {LONGEST_SIDE:,} pixels wide or high")
    smaller = None
    if enough is not None and format == "JPEG":
        smaller = _least((width, height), essentials.orientation in _LYING, enough)
        replace(limits, max_pixels=_MOST_SCALED * limits.max_pixels).check_pixels(width, height)
        image.draft(None, smaller)
    limits.check_pixels(*image.size, width * height)
    if format == "AVIF":
        check_sparse(width, height, len(essentials.data))
    # A small file without its end is decoded without a complaint.
    cut = format == "JPEG" and essentials.data.rfind(b"\xff\xd9") < essentials.data.rfind(b"\xff\xda")
    broken = False
    try:
        image.load()
    except OSError:
        if format != "JPEG":
            raise
        broken = True
    if broken:
        del image  # its memory is needed; so is that of the error's frames
        image, cut = _completed(essentials.data, smaller), True
    if format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image = image.convert("RGB")  # whoever wrote it left the fourth byte empty, as viewers know
    if format in _ANIMATED and not essentials.one_frame:
        image = _showing(image, essentials, format, limits)
    info = image.info
    orientation = essentials.orientation
    if format == "TIFF":
        orientation = image.getexif().get(_ORIENTATION, orientation)
        if samples.per_pixel > 1:
            image = regrouped(image, samples)
    elif format in ("WEBP", "AVIF"):
        orientation = exif_orientation(info.get("exif", b"")) or xmp_orientation(info.get("xmp", b"")) or orientation
    return _Picture(
        image,
        orientation if orientation in _UPRIGHT else 1,
        (height, width) if orientation in _LYING else (width, height),
        profile=essentials.profile or (info.get("icc_profile") if format in ("WEBP", "AVIF") else None),
        samples=None if samples.is_plain or samples.per_pixel > 1 or image.mode not in _SCALED else samples,
        cut=cut,
        curve=essentials.curve,
    )


_SCALED = ("L", "RGB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes whose samples are numbers as a TIFF has them."""


def _completed(jpeg: bytes, smaller: tuple[int, int] | None) -> Image.Image:
    """Return a JPEG that breaks off, as viewers show it, with grey for what is missing. Raises ValueError past
    bounds."""
    image = Image.open(io.BytesIO(jpeg + b"\xff\xd9"), formats=("JPEG",))
    if smaller is not None:
        image.draft(None, smaller)
    image.load()
    if image.info.get("progressive") and jpeg.count(b"\xff\xda") < _LEAST_SCANS:
        raise ValueError("most of the scans are missing")
    if _grey_rows(image) > _MOST_MISSING * image.height:
        raise ValueError("too many rows are missing")
    return image


def _grey_rows(image: Image.Image) -> int:
    """Return how many rows at the end of a picture are grey, as a decoder leaves those that it has not."""
    rows, count = max(1, _BAND // image.width), 0
    for bottom in range(image.height, 0, -rows):
        band = np.asarray(image.crop((0, max(0, bottom - rows), image.width, bottom)), np.int16)
        grey = np.abs(band.reshape(len(band), -1) - 128).max(axis=1) <= 1
        if not grey.all():
            return count + int(np.argmin(grey[::-1]))
        count += len(grey)
    return count


def _heic(data: bytes, limits: ImageLimits) -> Image.Image:
    """Return the primary image of a HEIC, turned as its boxes say."""
    heif = _open_heic(data)
    width, height = heif.size
    limits.check_pixels(width, height)
    check_sparse(width, height, len(data))
    pixels = heif.data  # the size may be another one after decoding
    limits.check_pixels(*heif.size)
    image = Image.frombytes(heif.mode, heif.size, pixels, "raw", heif.mode, heif.stride)
    image.info["icc_profile"] = heif.info.get("icc_profile")
    return image


def _open_heic(data: bytes) -> Any:
    """Return the primary image of a HEIC, not yet decoded. Raises UnsupportedMedia where the codec is missing."""
    try:
        import pillow_heif
    except ImportError:
        raise UnsupportedMedia(NO_HEIC) from None
    options = pillow_heif.options
    options.DECODE_THREADS, options.THUMBNAILS, options.DEPTH_IMAGES, options.AUX_IMAGES = 1, False, False, False
    file = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=True)
    return file[file.primary_index]


def _showing(image: Image.Image, essentials: Essentials, format: str, limits: ImageLimits) -> Image.Image:
    """Return the first frame, or, where that is of one colour, the first after it that shows something.

    Raises MediaTooLarge where frames would have to be looked at of which a decoder holds too many.
    """
    if (format == "PNG" and essentials.animated is None) or (most := _shown(image)) >= _LEAST_SHOWN:
        return image
    if image.width * image.height > (most_pixels := max(_SEARCHED_PIXELS, limits.max_pixels // 4)):
        if essentials.animated is None and not getattr(image, "is_animated", False):
            return image
        raise MediaTooLarge(
            "the first frame of the animation shows nothing, and the others are not looked at in one of more than "
            f"{most_pixels:,} pixels"
        )
    best = image.copy()
    if essentials.animated is not None:
        image = Image.open(io.BytesIO(essentials.animated), formats=(format,))
    for number in range(1, min(_MOST_FRAMES, limits.max_pixels // (image.width * image.height))):
        try:
            image.seek(number)
            image.load()
        except Exception:  # the last one was the last, or the rest is damaged
            break
        if (contrast := _shown(image)) > most:
            best, most = image.copy(), contrast
        if most >= _CLEARLY_SHOWN:
            break
    return best


def _shown(image: Image.Image) -> float:
    """Return how much a frame shows: the standard deviation of its brightness."""
    return float(np.asarray(_Picture(_sample(image)).whole().convert("L"), np.float32).std())


def _least(size: tuple[int, int], lying: bool, spec: Enough) -> tuple[int, int]:
    """Return the size, as the file stores it, below which a scaled decode costs too much of what the tower sees."""
    if isinstance(spec, int):
        return spec, spec
    if spec.resize == "squash":
        high, wide = spec.squashed or (spec.height, spec.width)
        width, height = (high, wide) if lying else (wide, high)
    else:
        edge = spec.shortest_edge or max(spec.height, spec.width)
        scale = edge / min(size)
        width, height = (math.ceil(length * scale) for length in size)
    return math.ceil(REDUCING_GAP * width), math.ceil(REDUCING_GAP * height)


def preprocess_image(
    image: Image.Image, spec: ImagePreprocessing, size: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Turn an RGB image into float32 (3, height, width), scaled to [0, 1], then (x - mean) / std per channel.

    Of an image that was decoded smaller than it is, `size` is what it has in full, by which it is cropped.
    The numbers are those of the image processors of transformers (its Pillow backend), bit for bit, but for pictures
    more than four times as long as wide that are cropped.
    """
    return _preprocessed(_Picture(image, full=size), spec)


def _preprocessed(picture: _Picture, spec: ImagePreprocessing) -> NDArray[np.float32]:
    resample = Image.Resampling[spec.resample.upper()]
    if spec.resize == "squash":
        high, wide = spec.squashed or (spec.height, spec.width)
        image = picture.resized((wide, high), resample)
        if spec.squashed is not None:
            left, top = (wide - spec.width) // 2, (high - spec.height) // 2
            image = image.crop((left, top, left + spec.width, top + spec.height))
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
    """Return what each sample of each channel becomes, (3, 256): to look it up takes a tenth of computing it."""
    samples = (np.arange(256) * (1 / 255)).astype(np.float32)[:, None]
    return np.ascontiguousarray(((samples - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)).T)
