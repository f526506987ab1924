"""Bytes to patches: decoded, averaged, resampled, checked; the features against a slow reference in float64."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import load_file

from service.contract.audio import (
    AudioLimits,
    AudioPreprocessing,
    _htk_mel,
    _periodic_hann,
    decode_audio,
    log_mel_patches,
    pack_patches,
)
from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia

RATE = 16_000
YAMNET = AudioPreprocessing()
PATCH, HOP = 95 * 160 + 400, 48 * 160  # samples


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
    opposed = decode_audio(encode(np.stack([left, -left], axis=1), subtype="FLOAT"), RATE)
    assert not opposed.any()


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 192_000])
def test_the_rate_is_converted(rate: int) -> None:
    waveform = decode_audio(encode(sine(rate=rate), rate, subtype="FLOAT"), RATE)
    assert abs(len(waveform) - RATE) <= 1
    # Away from the ends, where the filter sees the edge.
    np.testing.assert_allclose(waveform[1_000:15_000], sine()[1_000:15_000], atol=2e-3)


def test_what_cannot_be_heard_at_the_new_rate_does_not_come_back_as_something_else() -> None:
    waveform = decode_audio(encode(sine(12_000, rate=44_100), 44_100, subtype="FLOAT"), RATE)
    assert np.abs(waveform[500:-500]).max() < 1e-3


def test_one_sample_at_a_higher_rate_is_still_a_patch() -> None:
    waveform = decode_audio(encode(sine()[:1], 44_100), RATE)
    assert log_mel_patches(waveform, YAMNET).shape == (1, 1, 96, 64)


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
    with pytest.raises(MediaTooLarge, match="8 channels"):
        decode_audio(nine, RATE)
    assert len(decode_audio(nine, RATE, AudioLimits(max_channels=9))) == 10


def test_a_small_file_of_a_long_silence_is_stopped() -> None:
    # Eleven minutes of silence are a few kilobytes of FLAC.
    data = encode(np.zeros(660 * 8_000, np.int16), 8_000, "FLAC")
    assert len(data) < 100_000
    with pytest.raises(MediaTooLarge, match="600 s"):
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


def test_the_loudest_samples_have_finite_features() -> None:
    waveform = decode_audio(encode(np.full(PATCH, 9e11, np.float32), subtype="FLOAT"), RATE)
    assert np.isfinite(log_mel_patches(waveform, YAMNET)).all()


@pytest.mark.parametrize("data", [b"", b"RIFF", b"text", b"\0" * 1_000, b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_what_is_no_sound_is_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia, match="WAV, FLAC, OGG, MP3"):
        decode_audio(data, RATE)


def test_a_format_that_the_library_reads_and_the_contract_does_not_name_is_unsupported() -> None:
    with pytest.raises(UnsupportedMedia):
        decode_audio(encode(sine(), format="VOC"), RATE)


@given(st.binary(max_size=300), st.sampled_from(["WAV", "FLAC", "OGG"]))
def test_noise_behind_a_true_header_is_a_named_error_or_a_sound(noise: bytes, format: str) -> None:
    data = encode(sine(seconds=0.01), format=format)[:44] + noise
    try:
        waveform = decode_audio(data, RATE)
    except (BadMedia, UnsupportedMedia, MediaTooLarge):
        return
    assert np.isfinite(waveform).all()


def slow_log_mel(waveform: NDArray[np.float32], frame: int) -> list[float]:
    """One frame's features by the definitions, in float64 and by loops: DFT, HTK mel triangles, logarithm."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    samples = [float(waveform[frame * 160 + n]) * (0.5 - 0.5 * math.cos(2 * math.pi * n / 400)) for n in range(400)]
    time = np.arange(400)
    magnitudes = [abs(np.sum(samples * np.exp(-2j * np.pi * k * time / 512))) for k in range(257)]
    edges = [mel(125.0) + i * (mel(7_500.0) - mel(125.0)) / 65 for i in range(66)]
    features = []
    for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
        energy = 0.0
        for k in range(1, 257):
            at = mel(k * RATE / 512)
            energy += magnitudes[k] * max(0.0, min((at - low) / (centre - low), (high - at) / (high - centre)))
        features.append(math.log(energy + 0.001))
    return features


@pytest.mark.parametrize("hertz", [200.0, 1_000.0, 5_000.0])
def test_golden_features_of_a_sine(hertz: float) -> None:
    waveform = sine(hertz, 1.5)
    patches = log_mel_patches(waveform, YAMNET)
    assert patches.dtype == np.float32 and patches.flags.c_contiguous
    for frame in (0, 50):
        np.testing.assert_allclose(patches[0, 0, frame], slow_log_mel(waveform, frame), atol=1e-3)
    # The second patch begins 48 frames after the first.
    np.testing.assert_array_equal(patches[1, 0, :48], patches[0, 0, 48:])
    np.testing.assert_allclose(patches[1, 0, 2], slow_log_mel(waveform, 50), atol=1e-3)


def test_the_filters_and_the_window_are_those_of_yamnet(data_root: Path) -> None:
    published = load_file(data_root / "encoders/yamnet/frontend.safetensors")
    np.testing.assert_allclose(_htk_mel(YAMNET), published["mel"], atol=1e-6)
    np.testing.assert_allclose(_periodic_hann(400), published["window"], atol=1e-6)


@pytest.mark.parametrize(
    ("samples", "patches"),
    [(0, 1), (1, 1), (PATCH, 1), (PATCH + 1, 2), (PATCH + HOP, 2), (PATCH + HOP + 1, 3), (PATCH + 10 * HOP, 11)],
)
def test_no_sample_is_left_out(samples: int, patches: int) -> None:
    assert log_mel_patches(np.zeros(samples, np.float32), YAMNET).shape == (patches, 1, 96, 64)


def test_the_last_sample_counts() -> None:
    quiet = np.zeros(PATCH + 1_000, np.float32)
    clicked = quiet.copy()
    clicked[-1] = 1.0
    assert not np.array_equal(log_mel_patches(quiet, YAMNET), log_mel_patches(clicked, YAMNET))


def test_silence_is_the_logarithm_of_the_offset() -> None:
    np.testing.assert_allclose(log_mel_patches(np.zeros(10, np.float32), YAMNET), math.log(0.001), rtol=1e-6)


def test_a_long_sound_in_blocks_is_the_same_as_in_one() -> None:
    # 4,096 frames are a block: the patch across the seam equals the patch of that stretch alone.
    waveform = np.random.default_rng(0).uniform(-1, 1, 4_500 * 160).astype(np.float32)
    patches = log_mel_patches(waveform, YAMNET)
    start = 84  # frames 4,032 to 4,127
    alone = log_mel_patches(waveform[start * HOP : start * HOP + PATCH], YAMNET)
    assert len(alone) == 1
    np.testing.assert_allclose(patches[start], alone[0], atol=1e-5)


@given(arrays(np.float32, st.integers(0, 3_000), elements=st.floats(-1, 1, width=32)))
def test_features_are_finite_and_never_below_silence(waveform: NDArray[np.float32]) -> None:
    patches = log_mel_patches(waveform, YAMNET)
    assert patches.shape == (1, 1, 96, 64)
    assert np.isfinite(patches).all() and patches.min() >= math.log(0.001) - 1e-4


def test_packed_patches_average_to_each_sound() -> None:
    rng = np.random.default_rng(0)
    sounds = [rng.standard_normal((n, 1, 3, 2)).astype(np.float32) for n in (1, 4, 2)]
    patches, weights = pack_patches(sounds)
    assert patches.shape == (7, 1, 3, 2) and weights.shape == (3, 7)
    assert patches.dtype == weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    means = (weights @ patches.reshape(7, -1)).reshape(3, 1, 3, 2)
    for mean, sound in zip(means, sounds, strict=True):
        np.testing.assert_allclose(mean, sound.mean(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"fft_length": 256}, "fft_length 256"),
        ({"f_max": 8_001.0}, "f_max 8001"),
        ({"f_min": 7_500.0}, "f_min 7500"),
        ({"sampling_rate": 8_000}, "half the rate"),
        ({"log_offset": 0.0}, "log_offset"),
        ({"hop": 1}, "hop"),
    ],
)
def test_a_spec_is_checked(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        AudioPreprocessing.model_validate(values)
