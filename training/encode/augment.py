"""Augmented views of a picture, as Freeze-Align trains on (arXiv 2409.19425): crop, mirror image, RandAugment.

The numbers are those of the paper's public code: an area from 20 % to all of the picture, sides from 3:4 to 4:3, then
two operations of ten, each done half the time, at strength 7 of 10 (RandAugment, arXiv 1909.13719).
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from training.data.shards import Medium

GENERATION = 1
"""Raise it when the same view becomes another one: cached views of the former number are then not used any more."""
_LEAST_AREA, _MOST_ASPECT = 0.2, 4 / 3
_TRIES = 10
_OPERATIONS, _CHANCE, _STRENGTH = 2, 0.5, 0.7
_ENHANCED = 1.8 * _STRENGTH + 0.1
_SHEAR, _MOVED_PIXELS, _TURNED_DEGREES = 0.3 * _STRENGTH, 10 * _STRENGTH, 30 * _STRENGTH
_GREY = (128, 128, 128)

Operation = Callable[[Image.Image, float], Image.Image]


@dataclass(frozen=True, slots=True)
class View:
    """An augmented view of a picture: which one, its seed and what the picture holds decide."""

    medium: Medium
    seed: int

    def __str__(self) -> str:
        return str(self.medium)

    def read_bytes(self) -> bytes:
        return self.medium.read_bytes()


def augmented(image: Image.Image, size: tuple[int, int], data: bytes, seed: int) -> Image.Image:
    """A view of an RGB image at `size` (width, height); `data` is its file."""
    rng = np.random.default_rng([seed, zlib.crc32(data)])
    image = image.resize(size, Image.Resampling.BICUBIC, _crop(image.size, rng))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for place in rng.integers(len(_RANDAUGMENT), size=_OPERATIONS):
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if rng.random() < _CHANCE:
            image = _RANDAUGMENT[place](image, sign)
    return image


def _crop(size: tuple[int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A random box; where none of the tries lies inside, the largest one in the middle of a shape that is allowed."""
    width, height = size
    for _ in range(_TRIES):
        area, logarithm = width * height * rng.uniform(_LEAST_AREA, 1), rng.uniform(-1, 1) * math.log(_MOST_ASPECT)
        across, down = (area * math.exp(logarithm)) ** 0.5, (area / math.exp(logarithm)) ** 0.5
        if across <= width and down <= height:
            left, top = rng.uniform(0, width - across), rng.uniform(0, height - down)
            return left, top, left + across, top + down
    across, down = min(width, height * _MOST_ASPECT), min(height, width * _MOST_ASPECT)
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down


def _moved(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, fillcolor=_GREY)


_RANDAUGMENT: tuple[Operation, ...] = (
    lambda image, sign: image,
    lambda image, sign: ImageOps.autocontrast(image),
    lambda image, sign: ImageOps.equalize(image),
    lambda image, sign: ImageEnhance.Brightness(image).enhance(_ENHANCED),
    lambda image, sign: ImageEnhance.Sharpness(image).enhance(_ENHANCED),
    lambda image, sign: _moved(image, 1, sign * _SHEAR, 0, 0, 1, 0),
    lambda image, sign: _moved(image, 1, 0, 0, sign * _SHEAR, 1, 0),
    lambda image, sign: _moved(image, 1, 0, sign * _MOVED_PIXELS, 0, 1, 0),
    lambda image, sign: _moved(image, 1, 0, 0, 0, 1, sign * _MOVED_PIXELS),
    lambda image, sign: image.rotate(sign * _TURNED_DEGREES, fillcolor=_GREY),
)
