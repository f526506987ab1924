"""An image cut into a grid, each cell as a file of its own that goes the way of any other image."""

import io

from PIL import Image

from service.contract.images import ImageLimits, decode_image

_LONGEST = 1_024
"""Longer side of a cell, in pixels: towers use a few hundred, and a cell is kept uncompressed."""


def crops(data: bytes, rows: int, columns: int, limits: ImageLimits) -> list[bytes]:
    """Return the cells of an image's grid, row by row, uncompressed. Slow: for a thread. Raises InputError.

    Cells differ by at most a pixel in size; an image with fewer pixels than cells repeats some.
    """
    image = decode_image(data, limits, enough=_LONGEST * max(rows, columns))
    cells = []
    for row in range(rows):
        top, bottom = row * image.height // rows, -(-(row + 1) * image.height // rows)
        for column in range(columns):
            left, right = column * image.width // columns, -(-(column + 1) * image.width // columns)
            cell = image.crop((left, top, right, bottom))
            cell.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
            file = io.BytesIO()
            cell.save(file, "BMP")
            cells.append(file.getvalue())
    return cells
