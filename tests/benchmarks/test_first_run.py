from pathlib import Path

import pytest
from PIL import Image

from benchmarks import first_run
from benchmarks.servers import BenchmarkError


def test_the_photographs_are_of_one_megapixel_and_each_another(tmp_path: Path) -> None:
    paths = first_run.photographs(tmp_path / "many", 24)
    assert len({path.read_bytes() for path in paths}) == 24
    with Image.open(paths[-1]) as image:
        assert image.format == "JPEG" and image.width * image.height == pytest.approx(1e6, rel=0.01)


def test_a_server_that_does_not_come_up_is_told_with_its_last_words(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "Makefile").write_text("serve:\n\t@echo no room; false\n")
    with pytest.raises(BenchmarkError, match="no room"), first_run.serving(checkout, tmp_path):
        pass
