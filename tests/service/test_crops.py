import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.contract.errors import BadMedia, MediaTooLarge
from service.contract.images import ImageLimits, decode_image
from service.retrieval.crops import crops

LIMITS = ImageLimits()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5))
def test_cells_cover_the_image_and_hold_its_pixels(height, width, rows, columns):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    cells = [np.asarray(decode_image(cell, LIMITS)) for cell in crops(png(pixels), rows, columns, LIMITS)]
    assert len(cells) == rows * columns
    for row in range(rows):
        for column in range(columns):
            top, bottom = int(height * row / rows), int(np.ceil(height * (row + 1) / rows))
            left, right = int(width * column / columns), int(np.ceil(width * (column + 1) / columns))
            np.testing.assert_array_equal(cells[row * columns + column], pixels[top:bottom, left:right])


def test_a_large_cell_is_reduced():
    [cell] = crops(png(np.zeros((1500, 3000, 3), np.uint8)), 1, 1, LIMITS)
    assert decode_image(cell, LIMITS).size == (1024, 512)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(BadMedia):
        crops(png(np.zeros((90, 90, 3), np.uint8))[:60], 2, 2, LIMITS)
    with pytest.raises(MediaTooLarge):
        crops(png(np.zeros((9, 9, 3), np.uint8)), 2, 2, ImageLimits(max_pixels=80))
