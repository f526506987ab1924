"""Some files are refused before Pillow opens them. The files are those of `make hostile`, which sends them all."""

import io
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import hostile_media as media
from service.contract import structure
from service.contract.errors import BadMedia, InputError, MediaTooLarge
from service.contract.images import ImageLimits, _essentials_of, decode_image

REFUSED: dict[str, tuple[Callable[[], bytes], type[InputError]]] = {
    "png of chunks": (
        lambda: media.PNG_SIGNATURE + media.ihdr(8, 8) + media.chunk(b"prVt") * structure.MAX_PARTS,
        BadMedia,
    ),
    "jpeg of segments": (
        lambda: b"\xff\xd8" + media.segment(0xFE) * (structure.MAX_PARTS + 1) + b"\xff\xda\0\2",
        BadMedia,
    ),
    "jpeg of padding": (lambda: b"\xff\xd8" + b"\xff" * 70_000, BadMedia),
    "jpeg of junk": (lambda: b"\xff\xd8\xff\0" + bytes(70_000) + b"\xff\xfe\0\2", BadMedia),
    "jpeg of marks that stand alone": (lambda: b"\xff\xd8" + b"\xff\xd0" * 40_000, BadMedia),
    "jpeg of scans": (lambda: media.progressive(8_000, 4_096, 140), MediaTooLarge),
    "jpeg of coefficients": (lambda: media.frame_of(0xC2, 8_000, 5_000, 4), MediaTooLarge),
    "gif of a comment": (lambda: media.gif(b"!\xfe" + b"\x01a" * 30_000), BadMedia),
    "gif of comments": (lambda: media.gif(b"!\xfe\x01a\0" * 30_000), BadMedia),
    "gif of junk": (lambda: media.gif(b"\x55" * 70_000), BadMedia),
    "bmp of runs": (lambda: media.bmp(2_000, 1_000, 8, 1, data=b"\1\1" * 500_000), MediaTooLarge),
    "bmp of runs of many pixels": (lambda: media.bmp(40_000, -1_000, 8, 1), MediaTooLarge),
    "tiff of tags": (lambda: b"MM\0*\0\0\0\x08\xff\xff", BadMedia),
    "big tiff of tags": (lambda: b"II+\0\x08\0\0\0\x10" + bytes(7) + b"\xff" * 8, BadMedia),
    "webp of a canvas": (lambda: media.webps()["webp of a canvas of 16,384 x 16,384"][1], MediaTooLarge),
    "webp without loss": (lambda: media.webps()["webp of a lossless 16,384 x 16,384"][1], MediaTooLarge),
    "webp with loss": (lambda: media.webps()["webp of a lossy 16,383 x 16,383"][1], MediaTooLarge),
    "webp of one colour": (lambda: media.picture_of_zeros("WEBP", "RGB", (5_000, 4_000), lossless=True), MediaTooLarge),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_cost_too_much_is_refused(name: str) -> None:
    make, error = REFUSED[name]
    with pytest.raises(error):
        _essentials_of(make(), ImageLimits())


@pytest.mark.parametrize("name", media.honest_images())
def test_honest_pictures_pass(name: str) -> None:
    data = media.honest_images()[name]
    _essentials_of(data, ImageLimits(max_pixels=48 * 40))
    if name.startswith("webp"):
        with pytest.raises(MediaTooLarge):
            _essentials_of(data, ImageLimits(max_pixels=48 * 40 - 1))


def test_pieces_and_tags_of_real_encoders_pass() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    for tag in range(0x9000, 0x9200):
        exif[tag] = "a text"
    large = Image.effect_noise((1_200, 900), 80).convert("RGB")
    large.save(stream, "JPEG", progressive=True, exif=exif, icc_profile=bytes(300_000), comment=b"a" * 60_000)
    assert decode_image(stream.getvalue()).size == large.size


def test_a_side_is_no_longer_than_a_jpeg_can_be() -> None:
    with pytest.raises(MediaTooLarge, match="65,535 pixels wide"):
        decode_image(media.plain_png(65_536, 1))
    assert decode_image(media.plain_png(65_535, 1)).size == (65_535, 1)


@given(st.sampled_from(sorted(media.honest_images())), st.integers(0, 400), st.binary(min_size=1, max_size=60))
def test_whatever_the_bytes_are_they_are_looked_over_or_refused(name: str, place: int, noise: bytes) -> None:
    data = media.honest_images()[name]
    try:
        _essentials_of(data[:place] + noise + data[place + len(noise) :], ImageLimits())
        _essentials_of(data[:place], ImageLimits())
    except InputError:
        pass


@pytest.mark.parametrize("limit", [1_919, 1_920])
def test_the_limit_of_pixels_is_exact_for_every_format(limit: int) -> None:
    for name, data in media.honest_images().items():
        try:
            decode_image(data, ImageLimits(max_pixels=limit))
        except MediaTooLarge:
            assert limit < 1_920, name
        else:
            assert limit == 1_920, name
