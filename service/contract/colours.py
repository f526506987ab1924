"""Colours of an embedded profile (ICC), of another curve or of HDR become sRGB, in which every encoder has learnt to
see."""

import functools
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

SAME_LEVELS = 4
"""Levels of 255 by which no colour may change for a profile to count as sRGB: such pictures are left as they are."""
_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}
_STEPS = 9


PQ = 16
"""The curve of HDR pictures (SMPTE ST 2084), as cICP and other tables of ITU-T H.273 number it."""
_WHITE_NITS, _MOST_NITS = 203, 10_000
"""Brightness of a white page in an HDR picture (ITU-R BT.2408), and of its largest sample."""
_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
"""From the primaries of ITU-R BT.2020 to those of BT.709, for colours (…, 3) on the left."""
_LEVELS = np.arange(256) / 255


@dataclass(frozen=True)
class Curve:
    """Says how the samples of a picture without a profile become light, where that is not sRGB's curve."""

    gamma: float | None = None
    """As PNG counts it: samples are light to this power, 1 / 2.2 for most."""
    is_pq: bool = False

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """Return an RGB picture in sRGB. What is brighter than white is white."""
        if self.gamma is not None:
            levels = np.rint(255 * _LEVELS ** (1 / (2.2 * self.gamma))).astype(int).tolist()
            return image.point(levels * 3)
        light = _pq_light()[np.asarray(image)] @ _TO_709.T.astype(np.float32)
        return Image.fromarray(_SRGB[np.clip(np.rint(light * _SRGB_STEPS), 0, _SRGB_STEPS).astype(np.uint16)])


def _srgb(light: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


_SRGB_STEPS = 4_096
_SRGB = np.rint(255 * _srgb(np.arange(_SRGB_STEPS + 1) / _SRGB_STEPS)).astype(np.uint8)


@functools.cache
def _pq_light() -> NDArray[np.float32]:
    """Return the light of each of 256 levels, 1 for white."""
    power = _LEVELS ** (1 / 78.84375)
    light = (np.maximum(power - 0.8359375, 0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    return (light * _MOST_NITS / _WHITE_NITS).astype(np.float32)


def colour_mode(mode: str) -> str:
    """Return the mode, of those a profile can speak of, in which a picture's colours are converted."""
    if mode in ("CMYK", "LAB"):
        return mode
    return "L" if mode in ("1", "L", "LA", "La", "F") or mode.startswith("I") else "RGB"


@functools.lru_cache(maxsize=8)
def to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return how colours of a mode become sRGB; None where they are, or the profile is damaged or of another mode."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.PERCEPTUAL,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return None if _changes_nothing(transform, mode) else transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    if mode not in ("RGB", "L"):
        return False
    steps = np.linspace(0, 255, _STEPS).round().astype(np.uint8)
    if mode == "L":
        colours = np.arange(256, dtype=np.uint8)[None]
    else:
        colours = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
    converted = np.asarray(transform.apply(Image.fromarray(colours)), np.int16)
    before = colours.astype(np.int16)
    return bool(np.abs(converted - (before[..., None] if mode == "L" else before)).max() <= SAME_LEVELS)
