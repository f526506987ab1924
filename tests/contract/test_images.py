"""Bytes to pixels: every mode lands as upright RGB, every bad file is a named error."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pydantic import ValidationError

from benchmarks import field_media
from service.contract import images
from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia
from service.contract.images import (
    FORMATS,
    REDUCING_GAP,
    SCALED_TOLERANCE,
    ImageLimits,
    ImagePreprocessing,
    _decoded,
    _Picture,
    _preprocessed,
    decode_image,
    preprocess_image,
    read_image,
)
from service.contract.tiffs import FLOAT, Samples

RED, BLUE = (255, 0, 0), (0, 0, 255)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    if format == "HEIC":
        pillow_heif.from_pillow(image).save(buffer, quality=-1, chroma=444)
        return buffer.getvalue()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decoded(image: Image.Image, format: str = "PNG", **options: Any) -> np.ndarray:
    result = decode_image(encode(image, format, **options))
    assert result.mode == "RGB"
    return np.asarray(result)


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(name: bytes, body: bytes) -> bytes:
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header states a size and which holds no pixels: decoding it would fail as corrupt."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


WIDE = (0, 257, 32_896, 65_535)


@pytest.mark.parametrize(
    ("colour_type", "samples", "clear", "expected"),
    [
        (0, [(x,) for x in WIDE], None, [[0] * 3, [1] * 3, [128] * 3, [255] * 3]),
        (0, [(x,) for x in WIDE], (257,), [[0] * 3, [255] * 3, [128] * 3, [255] * 3]),
        (2, [(x, 0, 65_535) for x in WIDE], None, [[0, 0, 255], [1, 0, 255], [128, 0, 255], [255, 0, 255]]),
        (2, [(x, 0, 65_535) for x in WIDE], (257, 0, 65_535), [[0, 0, 255], [255] * 3, [128, 0, 255], [255, 0, 255]]),
        (4, [(x, 65_535) for x in WIDE], None, [[0] * 3, [1] * 3, [128] * 3, [255] * 3]),
        (6, [(x, 0, 0, 65_535) for x in WIDE], None, [[0, 0, 0], [1, 0, 0], [128, 0, 0], [255, 0, 0]]),
        (6, [(x, 0, 0, 0) for x in WIDE], None, [[255] * 3] * 4),
    ],
    ids=["grey", "grey, one clear", "RGB", "RGB, one clear", "grey and alpha", "RGBA", "all clear"],
)
def test_sixteen_bit_pngs_of_every_kind(
    colour_type: int, samples: list[tuple[int, ...]], clear: tuple[int, ...] | None, expected: list[list[int]]
) -> None:
    """Pillow writes none but the first: these are written here."""
    row = b"\0" + b"".join(struct.pack(f">{len(pixel)}H", *pixel) for pixel in samples)
    between = [] if clear is None else [chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", len(samples), 1, 16, colour_type, 0, 0, 0))
    data = b"".join([PNG, header, *between, chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")])
    assert np.asarray(decode_image(data))[0].tolist() == expected


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_read(format: str) -> None:
    pixels = decoded(Image.new("RGB", (6, 4), RED), format)
    assert pixels.shape == (4, 6, 3)
    assert np.abs(pixels.astype(int) - RED).max() <= 3  # JPEG and WebP are lossy


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    # How a camera stores each orientation of the same picture (EXIF 2.3, tag 0x0112).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif), upright)


def test_transparency_is_laid_on_white() -> None:
    half = np.asarray([255, 127, 127])
    assert np.array_equal(decoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))[0, 0], half)
    assert np.array_equal(decoded(Image.new("RGBA", (1, 1), (255, 0, 0, 0)))[0, 0], (255, 255, 255))
    assert np.array_equal(decoded(Image.new("LA", (1, 1), (0, 128)))[0, 0], (127, 127, 127))
    assert np.array_equal(decoded(Image.new("RGB", (1, 1), RED), transparency=RED)[0, 0], (255, 255, 255))
    assert np.array_equal(decoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)), "TIFF")[0, 0], half)


@pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["one index", "a table"])
@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_palettes(format: str, transparency: Any) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *RED])
    image.putdata([0, 1])
    if format == "GIF" and isinstance(transparency, bytes):
        transparency = 0  # GIF knows no table
    assert decoded(image, format).tolist() == [[list(BLUE), list(RED)]]
    assert decoded(image, format, transparency=transparency).tolist() == [[[255, 255, 255], list(RED)]]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format: str) -> None:
    pixels = decoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format)
    assert np.abs(pixels.astype(int) - RED).max() <= 3


def test_grey_of_one_bit_and_laboratory_colours() -> None:
    assert decoded(Image.new("1", (1, 1), 1)).tolist() == [[[255, 255, 255]]]
    assert decoded(Image.new("L", (1, 1), 77)).tolist() == [[[77, 77, 77]]]
    grey = decoded(Image.new("LAB", (1, 1), (128, 128, 128)), "TIFF")[0, 0]
    assert np.ptp(grey.astype(int)) <= 1


@pytest.mark.parametrize(("format", "dtype"), [("PNG", np.uint16), ("TIFF", np.uint16), ("TIFF", np.int32)])
def test_sixteen_bits_are_scaled_to_eight(format: str, dtype: Any) -> None:
    samples = np.asarray([[0, 257, 32_896, 65_535]], dtype)
    assert decoded(Image.fromarray(samples), format)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_floating_point_samples() -> None:
    assert decoded(Image.fromarray(np.asarray([[0, 100, 255]], np.float32)), "TIFF")[0, :, 0].tolist() == [0, 100, 255]
    wide = np.asarray([[-5, 0, 65_535, 1e9]], np.float32)
    assert decoded(Image.fromarray(wide), "TIFF")[0, :, 0].tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("sample", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_bad(sample: float) -> None:
    with pytest.raises(BadMedia):
        decoded(Image.fromarray(np.full((2, 2), sample, np.float32)), "TIFF")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format: str) -> None:
    later = [Image.new("RGB", (4, 4), BLUE)]
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = decoded(Image.new("RGB", (4, 4), RED), format, save_all=True, append_images=later, **options)
    assert pixels[0, 0].tolist() == list(RED)


def test_a_camera_jpeg_with_a_second_picture_inside() -> None:
    buffer = io.BytesIO()
    second = [Image.new("RGB", (8, 8), BLUE)]
    Image.new("RGB", (8, 8), RED).save(buffer, "MPO", save_all=True, append_images=second)
    assert np.abs(np.asarray(decode_image(buffer.getvalue())).astype(int) - RED).max() <= 3


def test_broken_exif_does_not_lose_the_picture() -> None:
    jpeg = encode(Image.new("RGB", (8, 8), RED), "JPEG")
    body = b"Exif\0\0this is no table of tags"
    marked = jpeg[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[2:]
    assert np.array_equal(np.asarray(decode_image(marked)), np.asarray(decode_image(jpeg)))


def test_one_pixel() -> None:
    image = decode_image(encode(Image.new("RGB", (1, 1), RED)))
    for resize in ("squash", "shortest_edge"):
        array = preprocess_image(image, ImagePreprocessing(height=4, width=6, resize=resize))
        assert array.shape == (3, 4, 6)
        assert np.array_equal(array, np.broadcast_to(np.asarray([1, -1, -1], np.float32)[:, None, None], (3, 4, 6)))


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_bad(format: str) -> None:
    rng = np.random.default_rng(0)
    data = encode(Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)), format)
    with pytest.raises(BadMedia):
        decode_image(data[: len(data) * 3 // 4])


@pytest.mark.parametrize("length", [8, 12, 16, 20, 25, 29])
def test_a_png_that_ends_within_its_header_is_bad(length: int) -> None:
    with pytest.raises(BadMedia):
        decode_image(encode(Image.new("P", (8, 8)))[:length])


def test_a_corrupt_png_is_bad() -> None:
    data = bytearray(encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(BadMedia):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"BMW is a maker of cars and motorcycles",
        b"not an image",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"RIFF\x24\0\0\0WAVEfmt ",
        encode(Image.new("RGB", (16, 16)), "ICO"),
        encode(Image.new("RGB", (4, 4)), "PPM"),
        encode(Image.new("RGB", (4, 4)), "PDF"),
    ],
    ids=["empty", "BMW", "text", "SVG", "sound", "ICO", "PPM", "PDF"],
)
def test_what_is_no_image_of_a_known_format_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia, match="JPEG, PNG"):
        decode_image(data)


def bmp(pixels: np.ndarray, header_bytes: int, masks: tuple[int, int, int, int]) -> bytes:
    """A BMP of 32 bits a pixel, or of 16, in bit fields; `pixels` (H, W) are the samples as they are stored."""
    height, width = pixels.shape
    body = pixels[::-1].astype(f"<u{pixels.dtype.itemsize}").tobytes()
    header = struct.pack(
        "<IiiHHIIiiII", header_bytes, width, height, 1, 8 * pixels.dtype.itemsize, 3, len(body), 0, 0, 0, 0
    )
    header = (header + struct.pack("<4I", *masks)).ljust(header_bytes, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(body), 0, 0, 14 + len(header)) + header + body


@pytest.mark.parametrize("header_bytes", [56, 108, 124])
def test_a_bmp_whose_fourth_byte_is_empty_shows_its_colours(header_bytes: int) -> None:
    """Screen shots and the clipboard of Windows have it so."""
    colours = np.random.default_rng(0).integers(0, 2**24, (9, 13), dtype=np.uint32)
    masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    expected = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=-1)
    assert np.array_equal(np.asarray(decode_image(bmp(colours, header_bytes, masks))), expected)
    clear = colours.copy()
    clear[0] |= 0xFF000000  # one row is there: the others are clear
    shown = np.asarray(decode_image(bmp(clear, header_bytes, masks)))
    assert np.array_equal(shown[0], expected[0]) and (shown[1:] == shown[1, 0]).all()


def frame(marker: int, bits: int) -> bytes:
    """A JPEG whose frame has another marker and other bits a sample."""
    data = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 1], data[place + 4] = marker, bits
    return bytes(data)


def compressed(number: int) -> bytes:
    """A TIFF that states a compression."""
    return field_media.tiff(np.zeros((4, 4), np.uint8), {259: (3, [number])})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (frame(0xC1, 12), "lossless, or has 12 bits"),
        (frame(0xC3, 8), "lossless, or has 12 bits"),
        (compressed(50_001), "the TIFF's compression"),
        (compressed(33_005), "the TIFF's compression"),
        (PNG + chunk(b"CgBI", b"P\0 \2") + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 6, 0, 0, 0)), "CgBI"),
        (bmp(np.zeros((4, 4), np.uint16), 56, (0xF00, 0xF0, 0xF, 0xF000)), "the BMP's pixels"),
    ],
)
def test_a_kind_that_is_not_read_is_told_from_a_damaged_file(data: bytes, words: str) -> None:
    with pytest.raises(UnsupportedMedia, match=words):
        decode_image(data)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"%PDF-1.7\n", "a PDF"),
        (b"PK\3\4\x14\0", "a ZIP archive"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop"),
        (b"<!DOCTYPE html><title>404</title>", "a web page"),
        (b'<?xml version="1.0"?>\n<svg/>', "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "AppleDouble"),
        (bytes(5_000), "nothing but zeros"),
        (PNG.replace(b"\r\n", b"\n") + bytes(9), "line ends"),
        ("ein Hündchen".encode("utf-16"), "a text in UTF-16"),
        ("犬が浜辺を走る\n" * 200, "a text"),
        (bytes(128) + b"DICM", "DICOM"),
        (b"MThd\0\0\0\6", "MIDI"),
    ],
    ids=str,
)
def test_a_file_of_another_kind_is_called_by_its_name(data: bytes | str, name: str) -> None:
    with pytest.raises(UnsupportedMedia, match=f"This is .*{name}"):
        decode_image(data if isinstance(data, bytes) else data.encode())


@pytest.mark.parametrize(("nits", "level"), [(0, 0), (1, 15), (100, 187), (203, 255), (1_000, 255)])
def test_light_of_hdr_pictures_has_its_level(nits: int, level: int) -> None:
    """The samples of so many nits are those of ITU-R BT.2408 and ST 2084."""
    sample = {0: 0.0, 1: 0.1499, 100: 0.5081, 203: 0.5807, 1_000: 0.7518}[nits]
    grey = Image.new("RGB", (2, 2), (round(255 * sample),) * 3)
    data = field_media.with_chunk(encode(grey), chunk(b"cICP", bytes([9, 16, 0, 1])))
    assert np.abs(np.asarray(decode_image(data), np.int16) - level).max() <= 3


def test_zeros_before_something_are_not_nothing_but_zeros() -> None:
    with pytest.raises(UnsupportedMedia) as caught:
        decode_image(bytes(5_000) + encode(Image.new("RGB", (4, 4))))
    assert "This is" not in str(caught.value)


def test_the_byte_limit_comes_before_everything() -> None:
    data = encode(Image.new("RGB", (8, 8)))
    assert decode_image(data, ImageLimits(max_bytes=len(data))).size == (8, 8)
    with pytest.raises(MediaTooLarge, match="bytes"):
        decode_image(data, ImageLimits(max_bytes=len(data) - 1))
    with pytest.raises(MediaTooLarge):
        decode_image(b"no image at all", ImageLimits(max_bytes=3))


def test_the_pixel_limit_comes_before_decoding() -> None:
    # Were a pixel decoded, these would be BadMedia, or take 10 GB.
    with pytest.raises(
        MediaTooLarge, match="3,600,000,000 pixels, more than the 40,000,000 of ISTHMUS_MAX_IMAGE_PIXELS"
    ):
        decode_image(bomb(60_000, 60_000))
    with pytest.raises(MediaTooLarge):
        decode_image(bomb(40_000_001, 1))
    with pytest.raises(BadMedia):
        decode_image(bomb(10, 10))
    assert decode_image(encode(Image.new("RGB", (5, 4))), ImageLimits(max_pixels=20)).size == (5, 4)
    with pytest.raises(MediaTooLarge):
        decode_image(encode(Image.new("RGB", (7, 3))), ImageLimits(max_pixels=20))


def test_golden_array() -> None:
    """A 2 × 2 picture brought to 1 × 2 with a mean and deviation per channel, worked out by hand."""
    pixels = np.asarray([[[0, 0, 0], [255, 255, 255]], [[100, 200, 50], [255, 0, 55]]], np.uint8)
    spec = ImagePreprocessing(height=2, width=2, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    expected = [
        [[0.0, 1.0], [100 / 255, 1.0]],
        [[-1.0, 1.0], [200 / 255 * 2 - 1, -1.0]],
        [[-0.5, 0.0], [(50 / 255 - 1) / 2, (55 / 255 - 1) / 2]],
    ]
    array = preprocess_image(decode_image(encode(Image.fromarray(pixels))), spec)
    assert array.dtype == np.float32 and array.flags.c_contiguous
    np.testing.assert_allclose(array, expected, atol=1e-6)
    # Bilinear to half the height averages the two rows.
    half = preprocess_image(Image.fromarray(pixels), ImagePreprocessing(height=1, width=2))
    np.testing.assert_allclose(
        half[:, 0], [[-1 + 100 / 255, 1], [-1 + 200 / 255, 0], [-1 + 50 / 255, 55 / 255]], atol=0.01
    )


def test_shortest_edge_crops_the_centre_and_squash_does_not() -> None:
    picture = np.zeros((30, 90, 3), np.uint8)
    picture[:, :30], picture[:, 30:60], picture[:, 60:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    image = Image.fromarray(picture)
    cropped = preprocess_image(image, ImagePreprocessing(height=30, width=30, resize="shortest_edge"))
    assert np.array_equal(cropped, np.broadcast_to(np.asarray([-1, 1, -1], np.float32)[:, None, None], (3, 30, 30)))
    squashed = preprocess_image(image, ImagePreprocessing(height=30, width=30))
    assert [squashed[channel, 15, 5 + 10 * channel] for channel in range(3)] == [1, 1, 1]


def test_a_margin_is_cut_where_the_shortest_edge_is_longer_than_the_crop() -> None:
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[4:36, 4:36] = 255
    spec = ImagePreprocessing(height=32, width=32, resize="shortest_edge", shortest_edge=40)
    assert (preprocess_image(Image.fromarray(picture), spec) == 1).all()


@pytest.mark.parametrize("size", [(100_000, 1), (1, 100_000), (3, 7_001)])
@pytest.mark.parametrize("shortest_edge", [None, 256])
def test_a_strip_costs_no_more_than_its_crop(size: tuple[int, int], shortest_edge: int | None) -> None:
    # Resized before it is cropped, 1 × 100,000 at 224 would be 15 GB.
    spec = ImagePreprocessing(height=224, width=224, resize="shortest_edge", shortest_edge=shortest_edge)
    array = preprocess_image(Image.new("RGB", size, RED), spec)
    assert array.shape == (3, 224, 224)
    assert np.array_equal(np.unique(array), [-1, 1])


@given(
    pixels=arrays(np.uint8, st.tuples(st.integers(1, 24), st.integers(1, 24), st.just(3))),
    height=st.integers(1, 32),
    width=st.integers(1, 32),
    resize=st.sampled_from(["squash", "shortest_edge"]),
    resample=st.sampled_from(["bilinear", "bicubic", "lanczos"]),
)
def test_whatever_the_picture_the_array_fits(
    pixels: np.ndarray, height: int, width: int, resize: Any, resample: Any
) -> None:
    spec = ImagePreprocessing(height=height, width=width, resize=resize, resample=resample)
    array = preprocess_image(decode_image(encode(Image.fromarray(pixels))), spec)
    assert array.shape == (3, height, width) and array.dtype == np.float32
    assert np.abs(array).max() <= 1


@given(st.binary(max_size=200), st.sampled_from(FORMATS))
def test_noise_behind_a_true_header_is_a_named_error(noise: bytes, format: str) -> None:
    data = encode(Image.new("RGB", (4, 4)), format)[:30] + noise
    try:
        image = decode_image(data, ImageLimits(max_pixels=10_000))
    except (BadMedia, UnsupportedMedia, MediaTooLarge):
        return
    assert image.mode == "RGB"


SMALL_EDGE = {"shortest_edge": 7, "resize": "shortest_edge"}


def test_a_spec_is_checked() -> None:
    for wrong in ({"height": 0}, {"resize": "stretch"}, {"shortest_edge": 0}, {"colour": "BGR"}, SMALL_EDGE):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ImagePreprocessing.model_validate({"height": 8, "width": 8, **wrong})


def photograph(width: int, height: int) -> Image.Image:
    """It has shapes, edges and grain at every scale."""
    rng = np.random.default_rng(width * height)
    layers = [
        Image.fromarray(rng.integers(0, 256, (max(1, height // step), max(1, width // step), 3), dtype=np.uint8))
        for step in (256, 64, 16, 4)
    ]
    enlarged = [np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), np.float32) for layer in layers]
    mixed = sum(weight * layer for weight, layer in zip((0.5, 0.3, 0.15, 0.05), enlarged, strict=True))
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


CROPPED = ImagePreprocessing(height=64, width=64, resize="shortest_edge", shortest_edge=72, resample="bicubic")
SQUASHED = ImagePreprocessing(height=96, width=48)


def mean_difference(data: bytes, spec: ImagePreprocessing) -> float:
    """Return how far a scaled decode is from a full one on average, in 255ths."""
    return 127.5 * float(np.abs(read_image(data, spec) - preprocess_image(decode_image(data), spec)).mean())


@pytest.mark.parametrize("spec", [CROPPED, SQUASHED], ids=["cropped", "squashed"])
@pytest.mark.parametrize("size", [(1200, 800), (801, 1203), (640, 640)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_scaled_decode_changes_less_than_the_tolerance(
    spec: ImagePreprocessing, size: tuple[int, int], progressive: bool
) -> None:
    data = encode(photograph(*size), "JPEG", quality=90, progressive=progressive)
    assert _decoded(data, ImageLimits(), spec).image.width < size[0], "it is scaled"
    assert 0 < mean_difference(data, spec) < SCALED_TOLERANCE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_decode_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(900, 600), "JPEG", quality=90, exif=exif)
    for spec in (CROPPED, SQUASHED):
        assert mean_difference(data, spec) < SCALED_TOLERANCE


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_are_scaled_too(mode: str) -> None:
    data = encode(photograph(900, 600).convert(mode), "JPEG", quality=90)
    assert _decoded(data, ImageLimits(), CROPPED).image.width == 225
    assert mean_difference(data, CROPPED) < SCALED_TOLERANCE


def test_a_second_picture_inside_does_not_keep_the_first_from_being_scaled() -> None:
    buffer = io.BytesIO()
    photograph(900, 600).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (900, 600), BLUE)])
    assert _decoded(buffer.getvalue(), ImageLimits(), CROPPED).image.width == 225
    assert mean_difference(buffer.getvalue(), CROPPED) < SCALED_TOLERANCE


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"JPEG"}))
def test_other_formats_are_decoded_whole(format: str) -> None:
    data = encode(photograph(900, 600), format)
    assert np.array_equal(read_image(data, CROPPED), preprocess_image(decode_image(data), CROPPED))


@given(width=st.integers(1, 700), height=st.integers(1, 700))
@settings(max_examples=60, deadline=None)
def test_a_scaled_decode_leaves_what_the_resize_needs(width: int, height: int) -> None:
    data = encode(Image.new("RGB", (width, height), RED), "JPEG")
    for spec in (
        ImagePreprocessing(height=40, width=32),
        ImagePreprocessing(height=32, width=32, resize="shortest_edge"),
    ):
        image = _decoded(data, ImageLimits(), spec).image
        if image.size != (width, height):
            least = (32, 40) if spec.resize == "squash" else (32, 32)
            assert image.width >= REDUCING_GAP * least[0] and image.height >= REDUCING_GAP * least[1]


def test_limits_are_of_what_is_decoded_and_a_truncated_one_is_bad() -> None:
    data = encode(photograph(900, 600), "JPEG", quality=90)
    decoded_pixels = 225 * 150
    assert np.array_equal(read_image(data, CROPPED, ImageLimits(max_pixels=decoded_pixels)), read_image(data, CROPPED))
    with pytest.raises(MediaTooLarge, match="has 540,000 pixels"):
        read_image(data, CROPPED, ImageLimits(max_pixels=decoded_pixels - 1))
    with pytest.raises(MediaTooLarge, match="pixels"):
        decode_image(data, ImageLimits(max_pixels=900 * 600 - 1))
    with pytest.raises(BadMedia):
        read_image(data[: len(data) // 2], CROPPED)


@pytest.mark.parametrize("size", [(512, 384), (1024, 768), (2048, 1536)])
def test_real_photographs_stay_within_the_tolerance(data_root: Path, size: tuple[int, int]) -> None:
    """Mosaics of Flickr8k, whose every part is as sharp as a camera's: enlarged photographs would be an easy test."""
    files = sorted((data_root / "data/flickr8k/images").iterdir())
    spec = ImagePreprocessing(height=224, width=224, resize="shortest_edge", shortest_edge=256, resample="bicubic")
    for start in (0, 3000):
        mosaic = Image.new("RGB", size)
        cells = [(x, y) for y in range(0, size[1], 224) for x in range(0, size[0], 224)]
        for cell, file in zip(cells, files[start:], strict=False):
            mosaic.paste(Image.open(file).convert("RGB"), cell)
        assert mean_difference(encode(mosaic, "JPEG", quality=90), spec) < SCALED_TOLERANCE


def test_every_sample_is_normalised_as_the_formula_says() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([every, every.T, every[::-1]], axis=2))
    spec = ImagePreprocessing(height=16, width=16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    scaled = np.asarray(image, np.float32) / np.float32(255)
    expected = (scaled - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    assert np.array_equal(preprocess_image(image, spec), expected.transpose(2, 0, 1))


ONE_LEVEL = 2.001 / 255  # from -1 to 1
MODES = ("RGB", "RGBA", "LA", "P", "L", "1", "CMYK", "YCbCr", "I;16", "I", "F")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_bands_make_what_the_whole_makes(mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(orientation).integers(0, 256, (57, 83, 4), np.uint8)
    if mode in ("I;16", "I", "F"):
        wide = samples[..., 0].astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 250
        image = Image.fromarray(wide)
    else:
        image = Image.fromarray(samples, "RGBA").convert(mode)
    picture = _Picture(image, orientation)
    upright = picture.whole()
    lying = orientation in (5, 6, 7, 8)
    assert upright.size == ((57, 83) if lying else (83, 57))
    specs = [
        ImagePreprocessing(height=20, width=24, resample=resample, resize=resize)
        for resample in ("nearest", "bilinear", "bicubic", "lanczos")
        for resize in ("squash", "shortest_edge")
    ]
    expected = [preprocess_image(upright, spec) for spec in specs]
    monkeypatch.setattr(images, "_LARGE", 700)
    monkeypatch.setattr(images, "_BAND", 700)  # some rows
    assert np.array_equal(np.asarray(picture.whole()), np.asarray(upright))
    for spec, array in zip(specs, expected, strict=True):
        assert np.abs(_preprocessed(picture, spec) - array).max() <= ONE_LEVEL, spec


@pytest.mark.parametrize("size", [(400, 31), (31, 400)])
def test_bands_of_a_strip_make_what_the_whole_makes(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    picture = _Picture(Image.fromarray(noise, "RGBA"))
    spec = ImagePreprocessing(height=20, width=24, resize="shortest_edge")
    expected = preprocess_image(picture.whole(), spec)
    monkeypatch.setattr(images, "_LARGE", 900)
    monkeypatch.setattr(images, "_BAND", 900)
    assert np.abs(_preprocessed(picture, spec) - expected).max() <= ONE_LEVEL


@pytest.mark.parametrize("band", [50, 1_000, 10**6])
@pytest.mark.parametrize("missing", [0, 1, 17, 40])
def test_rows_that_a_decoder_has_not_are_counted_from_the_end(
    missing: int, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.random.default_rng(missing).integers(140, 256, (40, 30, 3), np.uint8)
    rows[5:8] = 128  # grey, and not at the end
    rows[40 - missing :] = [127, 128, 129]
    monkeypatch.setattr(images, "_BAND", band)
    assert images._grey_rows(Image.fromarray(rows)) == missing
    assert images._grey_rows(Image.fromarray(rows[..., 0])) == missing


def test_the_extremes_of_heights_are_read_in_bands() -> None:
    """Heights of 6 megapixels, some of which stand for nothing: a band takes less than the picture."""
    rows = np.random.default_rng(0).uniform(100, 900, (2_000, 3_000)).astype(np.float32)
    rows[:700] = -9_999
    picture = _Picture(Image.fromarray(rows), samples=Samples(bits=32, kind=FLOAT, missing=-9_999))
    tracemalloc.start()
    try:
        extremes = picture._extremes
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert extremes == (float(rows[700:].min()), float(rows[700:].max()))
    assert peak < rows.nbytes / 2


@pytest.mark.parametrize("format", ["GIF", "PNG", "AVIF"])
def test_a_large_animation_is_not_taken_for_its_blank_first_frame(format: str) -> None:
    blank, shown = Image.new("RGB", (4_000, 2_600)), Image.linear_gradient("L").resize((4_000, 2_600)).convert("RGB")
    options: dict[str, Any] = {"save_all": True, "append_images": [shown], "speed": 10}
    with pytest.raises(MediaTooLarge, match="the first frame of the animation shows nothing"):
        decode_image(encode(blank, format, **options))
    assert not np.asarray(decode_image(encode(blank, format, speed=10))).any()
    assert np.asarray(decode_image(encode(shown, format, **options | {"append_images": [blank]}))).any()
