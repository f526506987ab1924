"""Files as people have them, by the decoders alone: each is read as a plain file of the same, or refused as it says."""

import io
import sys
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from benchmarks import field_media as media
from service.contract import containers, images
from service.contract.audio import AudioLimits, decode_audio, hear
from service.contract.errors import BadMedia, InputError, MediaTooLarge, UnsupportedMedia
from service.contract.images import NO_AVIF, NO_HEIC, ImageLimits, ImagePreprocessing, decode_image, see_image
from service.contract.metadata import exif_orientation
from service.contract.patches import LogMelPatches

SPEC, FRONT = ImagePreprocessing(height=64, width=64, resize="shortest_edge"), LogMelPatches()


@pytest.fixture(scope="module")
def pictures() -> dict[str, media.Sample]:
    return {each.name: each for each in media.images(1, size=(192, 128))}


@pytest.fixture(scope="module")
def sounds() -> dict[str, media.Sample]:
    return {each.name: each for each in media.sounds(1)}


def seen(data: bytes) -> tuple[np.ndarray, bool]:
    pixels, cut = see_image(data, SPEC)
    return pixels.ravel(), cut


def heard(data: bytes) -> tuple[np.ndarray, bool]:
    sound, cut = hear(data, FRONT.sampling_rate, AudioLimits(), FRONT.prepare_blocks)
    spectrum = sound.rows.mean(axis=(0, 1, 2))
    return spectrum - spectrum.mean(), cut


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


def fault(sample: media.Sample) -> str | None:
    """Return what is wrong with how a file is read."""
    take = seen if sample.kind == "image" else heard
    try:
        vector, cut = take(sample.data)
    except InputError as error:
        return None if error.code == sample.refused else f"{error.code}: {error}"
    if sample.like is None:
        return "it is read"
    if (near := cosine(vector, take(sample.like)[0])) < sample.least - 0.01:
        return f"cosine {near:.4f}"
    if cut != sample.truncated:
        return f"truncated: {cut}"
    if sample.unlike is not None and sample.kind == "image" and cosine(vector, take(sample.unlike)[0]) >= 0.98:
        return "it is like another"
    return None


def test_each_picture_is_read_as_what_it_shows(pictures: dict[str, media.Sample]) -> None:
    assert len(pictures) > 80
    assert {name: why for name, each in pictures.items() if (why := fault(each))} == {}


def test_each_sound_is_read_as_what_it_sounds_like(sounds: dict[str, media.Sample]) -> None:
    assert len(sounds) > 40
    assert {name: why for name, each in sounds.items() if (why := fault(each))} == {}


def test_a_photograph_of_50_megapixels_is_decoded_at_an_eighth() -> None:
    rows = np.arange(6_120, dtype=np.uint8)[:, None].repeat(8_160, axis=1)
    data = media.saved(Image.fromarray(rows), "JPEG", quality=50)
    picture = images._decoded(data, ImageLimits(), ImagePreprocessing(height=224, width=224))
    assert picture.image.size == (1_020, 765)
    with pytest.raises(MediaTooLarge, match="has 49,939,200 pixels, more than the 40,000,000 of ISTHMUS_MAX_IMAGE_PIX"):
        decode_image(data)


def test_a_missing_codec_is_told_with_what_to_install(
    pictures: dict[str, media.Sample], sounds: dict[str, media.Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UnsupportedMedia, match=r"isthmus\[heif\]") as caught:
        decode_image(pictures["photo.heic"].data)
    assert str(caught.value) == NO_HEIC
    monkeypatch.setattr(images.features, "check", lambda name: False)
    with pytest.raises(UnsupportedMedia, match=r"pillow>=11\.3") as caught:
        decode_image(pictures["photo.avif"].data)
    assert str(caught.value) == NO_AVIF
    monkeypatch.setitem(sys.modules, "av", None)
    for name in ("telephone.m4a", "recorder.aac", "browser.webm"):
        with pytest.raises(UnsupportedMedia) as caught:
            decode_audio(sounds[name].data, 16_000)
        assert str(caught.value) == containers.MISSING, name


def test_an_orientation_of_a_million_fractions_costs_nothing(pictures: dict[str, media.Sample]) -> None:
    began = time.thread_time()
    assert exif_orientation(media.huge_exif(1_000_000)) is None
    for name in ("huge_exif.jpg", "huge_exif.png"):
        decode_image(pictures[name].data)
    assert time.thread_time() - began < 1, "it took 3.5 s to read the fractions"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientations_of_exif_are_read_without_a_library(orientation: int, order: str) -> None:
    exif = Image.Exif()
    exif.endian = order
    exif[0x010F], exif[0x0112] = "a camera", orientation
    assert exif_orientation(exif.tobytes()) == orientation
    for cut in range(8, len(exif.tobytes()), 3):
        exif_orientation(exif.tobytes()[:cut])  # and never raises


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_heic_that_only_exif_turns_is_turned(orientation: int) -> None:
    photo = media.scene(1, (96, 64))
    stored = media.lying(photo, orientation)
    data = bytearray(media.saved(stored, "HEIC", exif=media.turned(1)))
    place = data.index(b"\x01\x12\x00\x03") if b"\x01\x12\x00\x03" in data else data.index(b"\x12\x01\x03\x00")
    little = data[place : place + 2] == b"\x12\x01"
    data[place + 8 : place + 10] = orientation.to_bytes(2, "little" if little else "big")
    upright = decode_image(bytes(data))
    assert upright.size == photo.size
    assert np.abs(np.asarray(upright, np.int16) - np.asarray(photo)).mean() < 8


def test_boxes_that_turn_a_heic_come_before_its_exif() -> None:
    """A telephone writes both: turned twice, the picture would lie again."""
    photo = media.scene(1, (96, 64))
    data = media.saved(media.lying(photo, 6), "HEIC", exif=media.turned(6))
    assert b"irot" in data and decode_image(data).size == photo.size


def test_a_first_frame_is_kept_where_it_shows_something_or_no_frame_does() -> None:
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    photo = media.scene(1, (40, 30))
    for format in ("GIF", "PNG", "WEBP", "AVIF"):
        options = {"save_all": True} | ({"lossless": True} if format == "WEBP" else {})
        flat = media.saved(red, format, append_images=[blue], **options)
        assert decode_image(flat).getpixel((5, 5))[0] > 240, format
        shown = decode_image(media.saved(photo, format, append_images=[blue], **options))
        assert np.abs(np.asarray(shown, np.int16) - np.asarray(photo)).mean() < 12, format


def test_an_animation_of_many_frames_without_anything_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    shown = images._shown
    monkeypatch.setattr(images, "_shown", lambda image: looked_at.append(image) or shown(image))
    black = [Image.new("L", (100, 100), level) for level in range(60)]
    data = media.saved(black[0], "GIF", save_all=True, append_images=black[1:])
    decode_image(data, ImageLimits(max_pixels=100_000))
    assert len(looked_at) == 10, "as many as have the pixels of one image"


def test_an_image_of_which_nothing_is_to_be_seen_is_on_white() -> None:
    assert decode_image(media.saved(Image.new("RGBA", (8, 8), (255, 255, 255, 0)))).getpixel((0, 0)) == (255,) * 3


def test_a_profile_that_says_srgb_changes_no_bit() -> None:
    photo = media.scene(1, (64, 48))
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = media.saved(photo, format, icc_profile=media.srgb_profile(), **options)
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(photo)), format


def test_a_damaged_profile_is_no_reason_to_refuse() -> None:
    photo = media.scene(1, (64, 48))
    for profile in (b"", b"no profile", media.srgb_profile()[:200], bytes(4_000)):
        body = b"p\0\0" + zlib.compress(profile)
        data = media.with_chunk(media.saved(photo), media.chunk(b"iCCP", body))
        assert np.array_equal(np.asarray(decode_image(data)), np.asarray(photo))


@pytest.mark.parametrize("rows", [3, 20, 60])
def test_a_jpeg_is_read_where_a_tenth_of_its_rows_is_missing_at_most(rows: int) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 160, 3), np.uint8))
    data = media.saved(noise, "JPEG", quality=90)
    cut = data[: len(data) - rows * len(data) // 400]
    if rows > 40:
        with pytest.raises(BadMedia):
            see_image(cut, SPEC)
    else:
        assert see_image(cut, SPEC)[1]


def test_channels_that_are_silent_have_no_part_in_the_mean() -> None:
    sound = media.source(1)
    for others in (1, 3, 7):
        quiet = [1e-4 * sound[::-1]] * others
        many = media.written(np.stack([*quiet, sound], 1), subtype="FLOAT")
        assert np.abs(decode_audio(many, media.RATE) - sound).max() < 1e-6
    left, right = sound, 0.3 * sound[::-1]
    both = media.written(np.stack([left, right], 1), subtype="FLOAT")
    assert np.abs(decode_audio(both, media.RATE) - (left + right) / 2).max() < 1e-6


def test_a_loud_float_file_is_left_as_loud_as_it_is() -> None:
    sound = media.source(1)
    for peak in (0.01, 1.0, 8.0):
        samples = sound * np.float32(peak / np.abs(sound).max())
        assert np.array_equal(decode_audio(media.written(samples, subtype="FLOAT"), media.RATE), samples)


def test_a_container_is_footage_only_where_pictures_move(sounds: dict[str, media.Sample]) -> None:
    for name in ("song_with_cover.m4a", "browser.webm", "telephone.3gp", "sound_only.mkv", "mpegts.mp4"):
        assert not containers.is_footage(sounds[name].data), name


def test_metadata_are_not_held() -> None:
    """Pillow would read each of a thousand texts that inflate; here the chunks are left out."""
    text = media.chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))
    data = media.with_chunk(media.saved(media.scene(1, (64, 48))), text * 1_000)
    stripped = images._essentials_of(data, ImageLimits())[1].data
    assert len(stripped) < 20_000
    assert not Image.open(io.BytesIO(stripped)).info
