from pathlib import Path

import numpy as np

from examples.photos import PHOTOS, write_photos
from service.contract.images import decode_image


def test_the_files_are_photographs_that_the_service_reads(tmp_path: Path) -> None:
    files = write_photos(tmp_path / "photos")
    assert set(files) == set(PHOTOS)
    for file in files.values():
        image = decode_image(file.read_bytes())
        assert min(image.size) >= 300
        assert np.asarray(image).std() > 8, "an empty picture"
