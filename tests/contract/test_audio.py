"""Bytes to a waveform: decoded, averaged, resampled, checked."""

import io
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import field_media
from service.contract.audio import AudioLimits, _File, decode_audio
from service.contract.errors import BadMedia, InputError, MediaTooLarge, UnsupportedMedia
from service.contract.lengths import goes_on, late_start

RATE = 16_000


def encode(samples: Any, rate: int = RATE, format: str = "WAV", **options: Any) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, **options)
    return buffer.getvalue()


def sine(hertz: float = 440.0, seconds: float = 1.0, rate: int = RATE) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def peak_hertz(waveform: NDArray[np.float32]) -> float:
    return float(np.abs(np.fft.rfft(waveform)).argmax() * RATE / len(waveform))


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "W64", "CAF", "AU"])
def test_every_format_is_read(format: str) -> None:
    waveform = decode_audio(encode(sine(), format=format), RATE)
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert len(waveform) == RATE
    assert abs(peak_hertz(waveform) - 440) < 2
    assert abs(float(np.abs(waveform[2_000:-2_000]).max()) - 0.5) < 0.03  # OGG and MP3 are lossy


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_every_sample_width_has_the_same_scale(subtype: str) -> None:
    waveform = decode_audio(encode(sine(), subtype=subtype), RATE)
    np.testing.assert_allclose(waveform, sine(), atol={"PCM_U8": 0.01, "ULAW": 0.02}.get(subtype, 1e-4))


def test_channels_are_averaged() -> None:
    left, right = sine(), np.full(RATE, 0.25, np.float32)
    waveform = decode_audio(encode(np.stack([left, right], axis=1), subtype="FLOAT"), RATE)
    np.testing.assert_allclose(waveform, (left + right) / 2, atol=1e-6)


def test_sounds_one_after_another_in_a_file_are_all_heard() -> None:
    for name, data in field_media.joined(sine(440, 3.0)).items():
        waveform = decode_audio(data, RATE)
        assert abs(len(waveform) / RATE - 3.0) < 0.25, f"{name}: {len(waveform) / RATE} s"
        assert abs(peak_hertz(waveform[-RATE:]) - 440) < 3, f"{name}: the second is not at its rate"


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_an_mp3_that_begins_within_a_frame_is_heard_from_the_next_on(rate: int) -> None:
    whole = field_media.muxed(sine(440, 3.0), "mp3", "libmp3lame", rate)
    for cut in (13, 501, 1_333):
        waveform = decode_audio(whole[cut:], RATE)
        assert len(waveform) > 2 * RATE and abs(peak_hertz(waveform) - 440) < 2, cut
    assert late_start(b"no sound \xff\xfb\x90\x64 at all" * 900) is None


@pytest.mark.parametrize("format", ["OGG", "FLAC", "MP3"])
def test_one_sound_is_not_taken_for_two(format: str) -> None:
    data = encode(sine(), format=format)
    assert not goes_on(data)
    assert not goes_on(data + b"TAG".ljust(128, b"\0"))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 192_000])
def test_the_rate_is_converted(rate: int) -> None:
    waveform = decode_audio(encode(sine(rate=rate), rate, subtype="FLOAT"), RATE)
    assert abs(len(waveform) - RATE) <= 1
    # Away from the ends, where the filter sees the edge.
    np.testing.assert_allclose(waveform[1_000:15_000], sine()[1_000:15_000], atol=2e-3)


def test_what_cannot_be_heard_at_the_new_rate_does_not_come_back_as_something_else() -> None:
    waveform = decode_audio(encode(sine(12_000, rate=44_100), 44_100, subtype="FLOAT"), RATE)
    assert np.abs(waveform[500:-500]).max() < 1e-3


def test_limits() -> None:
    data = encode(sine(seconds=2), subtype="PCM_16")
    assert len(decode_audio(data, RATE, AudioLimits(max_bytes=len(data), max_seconds=2))) == 2 * RATE
    with pytest.raises(MediaTooLarge, match="bytes"):
        decode_audio(data, RATE, AudioLimits(max_bytes=len(data) - 1))
    with pytest.raises(MediaTooLarge, match=r"1\.9 s"):
        decode_audio(data, RATE, AudioLimits(max_seconds=1.9))
    with pytest.raises(MediaTooLarge, match="too large decoded"):
        decode_audio(data, RATE, AudioLimits(max_decoded_bytes=4 * 2 * RATE - 4))
    nine = encode(np.zeros((10, 9), np.float32))
    with pytest.raises(MediaTooLarge, match="9 channels, more than the 8 that are read"):
        decode_audio(nine, RATE)
    assert len(decode_audio(nine, RATE, AudioLimits(max_channels=9))) == 10


def test_a_small_file_of_a_long_silence_is_stopped() -> None:
    # Thirty-one minutes of silence are a few kilobytes of FLAC.
    data = encode(np.zeros(1_860 * 8_000, np.int16), 8_000, "FLAC")
    assert len(data) < 100_000
    with pytest.raises(MediaTooLarge, match="longer than the 1,800 s of ISTHMUS_MAX_AUDIO_SECONDS"):
        decode_audio(data, RATE)


def test_a_header_that_lies_about_the_length() -> None:
    data = bytearray(encode(sine(), subtype="PCM_16"))
    at = data.index(b"data") + 4
    for claim in (0xFFFF_FFFF, 0x7FFF_FFFF, 64_000):  # the first two are what a stream that was piped says
        data[at : at + 4] = claim.to_bytes(4, "little")
        assert len(decode_audio(bytes(data), RATE)) == RATE
    flac = bytearray(encode(sine(), format="FLAC"))
    flac[21:26] = (flac[21] & 0xF0 | 0x0F).to_bytes(1, "big") + b"\xff\xff\xff\xff"  # STREAMINFO: 68 billion samples
    with pytest.raises(BadMedia):
        decode_audio(bytes(flac), RATE)


def test_an_impossible_rate_is_bad() -> None:
    for rate in (999, 768_001):
        with pytest.raises(BadMedia, match="sampling rate"):
            decode_audio(encode(sine()[:100], rate), RATE)


def test_a_truncated_file() -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 3 * RATE)
    flac = encode(noise, format="FLAC")
    with pytest.raises(BadMedia, match="truncated or corrupt"):
        decode_audio(flac[: len(flac) // 2], RATE)
    for format in ("WAV", "OGG", "MP3"):  # played as far as they go
        data = encode(noise, format=format)
        whole, half = decode_audio(data, RATE), decode_audio(data[: len(data) // 2], RATE)
        assert 0.2 * len(whole) < len(half) < 0.6 * len(whole)


@pytest.mark.parametrize("format", ["WAV", "OGG"])
def test_no_samples_are_bad(format: str) -> None:
    with pytest.raises(BadMedia):
        decode_audio(encode(np.zeros(0, np.float32), format=format), RATE)


@pytest.mark.parametrize("sample", [math.nan, math.inf, -math.inf, 3e38, -1e13])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_no_numbers_are_bad(sample: float, channels: int) -> None:
    samples = np.zeros((70_000, channels), np.float32)
    samples[-1] = sample
    with pytest.raises(BadMedia, match="not finite"):
        decode_audio(encode(samples, subtype="FLOAT"), RATE)


def test_a_double_past_float32_is_bad() -> None:
    with pytest.raises(BadMedia, match="not finite"):
        decode_audio(encode(np.full(10, 1e300), subtype="DOUBLE"), RATE)


@pytest.mark.parametrize(
    "data",
    [b"", b"RIFF", b"text", b"\0" * 1_000, b"\x89PNG\r\n\x1a\n" + b"\0" * 50, encode(sine(), format="VOC")],
    ids=["empty", "RIFF", "text", "zeros", "PNG", "what the library reads and the contract does not name"],
)
def test_what_is_no_sound_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia, match="WAV, FLAC, OGG, MP3"):
        decode_audio(data, RATE)


@given(st.binary(max_size=300), st.sampled_from(["WAV", "FLAC", "OGG"]))
def test_noise_behind_a_true_header_is_a_named_error_or_a_sound(noise: bytes, format: str) -> None:
    data = encode(sine(seconds=0.01), format=format)[:44] + noise
    try:
        waveform = decode_audio(data, RATE)
    except (BadMedia, UnsupportedMedia, MediaTooLarge):
        return
    assert np.isfinite(waveform).all()


@pytest.mark.parametrize("rate", [44_100, 8_000, RATE])
@pytest.mark.parametrize("channels", [1, 2])
def test_block_by_block_is_the_same_bits_as_all_at_once(rate: int, channels: int) -> None:
    samples = np.random.default_rng(rate).uniform(-0.5, 0.5, (3 * 65_536 + 17, channels)).astype(np.float32)
    mono = samples.mean(axis=1)
    whole = mono if rate == RATE else soxr.resample(mono, rate, RATE, quality="HQ")
    assert np.array_equal(decode_audio(encode(samples, rate, subtype="FLOAT"), RATE), whole)


def test_a_decoder_that_is_sent_to_before_the_start_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    honest = encode(sine(), RATE, format="AIFF")
    for place in range(12, 60):
        for value in (0x00, 0x7F, 0x80, 0xFF):
            with suppress(InputError):
                decode_audio(honest[:place] + bytes([value]) + honest[place + 1 :], RATE)
    file = _File(b"abcdef")
    file.seek(2)
    assert (file.seek(-5), file.read()) == (2, b"cdef")
    assert "Traceback" not in capfd.readouterr().err
