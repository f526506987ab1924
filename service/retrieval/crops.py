"""An image cut into parts, each as a file of its own that goes the way of any other image."""

import io
from collections.abc import Iterable

from PIL import Image

from service.contract.images import ImageLimits, decode_image

_LONGEST = 1_024
"""Longer side of a cell, in pixels: towers use a few hundred, and a cell is kept uncompressed."""
Box = tuple[int, int, int]
"""First row, first column and side of a part, in cells of a grid."""


def crops(data: bytes, rows: int, columns: int, limits: ImageLimits) -> list[bytes]:
    """Return the cells of an image's grid, row by row, uncompressed. Slow: for a thread. Raises InputError.

    Cells differ by at most a pixel in size; an image with fewer pixels than cells repeats some.
    """
    image = decode_image(data, limits, enough=_LONGEST * max(rows, columns))
    return _cut(image, rows, columns, [(row, column, 1) for row in range(rows) for column in range(columns)])


def windows(data: bytes, side: int, boxes: Iterable[Box], limits: ImageLimits) -> list[bytes]:
    """Return parts of an image, which may overlap, in a grid of side × side cells, uncompressed; the whole image is
    reduced to _LONGEST pixels first. Slow: for a thread. Raises InputError."""
    image = decode_image(data, limits, enough=_LONGEST)
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    return _cut(image, side, side, boxes)


def _cut(image: Image.Image, rows: int, columns: int, boxes: Iterable[Box]) -> list[bytes]:
    files = []
    for row, column, span in boxes:
        top, bottom = row * image.height // rows, -(-(row + span) * image.height // rows)
        left, right = column * image.width // columns, -(-(column + span) * image.width // columns)
        cell = image.crop((left, top, right, bottom))
        cell.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        cell.save(file, "BMP")
        files.append(file.getvalue())
    return files
