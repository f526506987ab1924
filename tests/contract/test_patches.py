"""YAMNet's front end against a slow reference in float64."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors.numpy import load_file

from service.contract.audio import decode_audio
from service.contract.patches import LogMelPatches, _htk_mel, log_mel_patches
from service.contract.windows import hann
from tests.contract.test_audio import RATE, encode, sine

YAMNET = LogMelPatches()
PATCH, HOP = 95 * 160 + 400, 48 * 160  # samples


def test_one_sample_at_a_higher_rate_is_still_a_patch() -> None:
    waveform = decode_audio(encode(sine()[:1], 44_100), RATE)
    assert log_mel_patches(waveform, YAMNET).shape == (1, 1, 96, 64)


def test_the_loudest_samples_have_finite_features() -> None:
    waveform = decode_audio(encode(np.full(PATCH, 9e11, np.float32), subtype="FLOAT"), RATE)
    assert np.isfinite(log_mel_patches(waveform, YAMNET)).all()


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
    np.testing.assert_allclose(hann(400), published["window"], atol=1e-6)


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
    # 1,024 frames are a block, and 4,096 four: the patch across the seam equals the patch of that stretch alone.
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
    sounds = [YAMNET.prepare(rng.uniform(-1, 1, n * RATE).astype(np.float32)) for n in (1, 4, 2)]
    patches, weights = YAMNET.collate(sounds)
    assert patches.shape == (sum(map(len, sounds)), 1, 96, 64) and weights.shape == (3, len(patches))
    assert patches.dtype == weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    means = (weights @ patches.reshape(len(patches), -1)).reshape(3, 1, 96, 64)
    for mean, sound in zip(means, sounds, strict=True):
        np.testing.assert_allclose(mean, sound.rows.mean(axis=0), atol=1e-5)


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
        LogMelPatches.model_validate(values)
