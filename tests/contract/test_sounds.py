"""Sounds in blocks: the same rows as of the whole waveform, in the memory of the rows."""

import itertools
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import field_media as media
from service.contract.audio import AudioLimits, Recording, hear
from service.contract.patches import LogMelPatches, log_mel_patches
from service.contract.sounds import AudioPreprocessing, Silence, cut, stretches
from service.contract.waveforms import Waveforms
from service.contract.windows import LogMelWindows, log_mel

RATE = 8_000
SMALL: dict[str, Any] = {"sampling_rate": RATE, "f_max": 4_000.0, "n_mels": 16, "hop_length": 320}
WINDOWS = LogMelWindows(**SMALL, samples=5 * RATE, frames=125)
FUSION: dict[str, Any] = {"samples": 5 * RATE, "frames": 100, "long": "fusion", "lengths": False}
SPECS: dict[str, AudioPreprocessing] = {
    "windows": WINDOWS,
    "overlapping": WINDOWS.model_copy(update={"centred": False, "frames": 124, "preemphasis": 0.97}),
    "fusion": LogMelWindows(**SMALL, **FUSION),
    "fusion of a sound that is pre-emphasised": LogMelWindows(
        **SMALL, **FUSION, preemphasis=0.97, preemphasis_of="sound"
    ),
    "patches": LogMelPatches(**SMALL),
    "waveforms": Waveforms(sampling_rate=RATE, max_samples=10 * RATE),
}


def noise(seconds: float, loudness: float = 0.1, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, loudness, round(seconds * RATE)).astype(np.float32)


def starts(samples: int, window: int, hop: int, least: int) -> list[int]:
    """Return where the stretches of a sound of so many samples begin, by the definition of `cut`."""
    count = 1 + -(-max(0, samples - window) // hop)
    if count > 1 and samples - ((count - 2) * hop + window) < least:
        count -= 1
    return list(range(0, count * hop, hop))


def rows_of_whole(spec: AudioPreprocessing, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """A sound's rows, made of the waveform at once."""
    if isinstance(spec, LogMelPatches):
        return log_mel_patches(waveform, spec)
    if isinstance(spec, Waveforms):
        parts = [waveform[at:][: spec.max_samples] for at in starts(len(waveform), *[spec.max_samples] * 2, 400)]
        rows = [(part - part.mean()) / np.sqrt(part.var() + 1e-7) for part in parts]
        return np.stack([np.pad(row, (0, len(rows[0]) - len(row))) for row in rows])
    assert isinstance(spec, LogMelWindows)
    if spec.long == "fusion" and len(waveform) > spec.samples:
        mel = log_mel(waveform, spec)
        thirds = np.array_split(np.arange(len(mel) - spec.frames + 1), 3)
        middles = [mel[third[len(third) // 2] :][: spec.frames] for third in thirds]
        return spec._scaled(np.stack([middles[0], *middles]))[None]
    hop = spec.samples if spec.centred else spec.samples - spec.window_length + spec.hop_length
    places = starts(len(waveform), spec.samples, hop, spec.window_length)
    return spec._scaled(np.stack([spec._window(waveform[at:][: spec.samples]) for at in places])[:, None])


def audible(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """A sound of more than ten seconds without those that are 40 dB below the loudest."""
    seconds = [waveform[at : at + RATE] for at in range(0, len(waveform), RATE)]
    loudest = max(second.std(dtype=np.float64) for second in seconds)
    return np.concatenate([second for second in seconds if second.std(dtype=np.float64) > 0.01 * loudest])


SOUNDS = {
    "even": noise(61.7),
    "silence before": np.concatenate([np.zeros(20 * RATE, np.float32), noise(5)]),
    "silence between": np.concatenate([noise(12), noise(9, 1e-5), noise(7.3), np.zeros(3 * RATE, np.float32)]),
    "a constant": np.concatenate([np.full(15 * RATE, 0.3, np.float32), noise(3)]),
    # Each of these is guessed wrongly at first.
    "a second that is silent beside a later one": np.concatenate([noise(30, 1e-4), noise(5, 0.3), noise(4, 1e-4)]),
    "one that is silent only beside the last": np.concatenate([noise(14, 0.002), noise(14, 0.01), noise(2.5, 0.9)]),
}


@pytest.mark.parametrize("name", SOUNDS)
@pytest.mark.parametrize("kind", SPECS)
def test_a_long_sound_in_blocks_has_the_rows_of_the_whole(kind: str, name: str) -> None:
    spec, waveform = SPECS[kind], SOUNDS[name]
    heard = audible(waveform)
    assert (len(heard) < len(waveform)) == (name != "even")
    whole = rows_of_whole(spec, heard)
    shown = slice(1, None) if kind.startswith("fusion") else slice(None)  # but for the whole that is shrunk
    for about in (len(waveform), 0, 1_800 * RATE):
        sound = spec.prepare_blocks(np.array_split(waveform, 37), about)
        if kind.startswith("fusion") and len(heard) > 5 * RATE:
            assert sound.rows.shape == whole.shape
            assert np.abs(sound.rows[:, shown] - whole[:, shown]).max() < 1e-6
            assert np.array_equal(sound.rows, spec.rows_of_blocks((heard,), len(heard)).rows)
        else:
            np.testing.assert_allclose(sound.rows, np.broadcast_to(whole, sound.rows.shape), atol=1e-6)
        assert sound.shares.sum() == pytest.approx(1) and len(sound.shares) == len(sound.lengths) == len(sound)


@given(
    st.lists(st.integers(0, 300), max_size=8),
    st.integers(2, 200),
    st.integers(1, 200),
    st.integers(1, 100),
)
def test_stretches_of_blocks_are_those_of_the_whole(sizes: list[int], window: int, hop: int, least: int) -> None:
    hop = min(hop, window)
    whole = np.arange(sum(sizes), dtype=np.float32)
    blocks = np.split(whole, np.cumsum(sizes)[:-1]) if sizes else []
    expected = [whole[at : at + window] for at in starts(len(whole), window, hop, least)]
    found = list(cut(iter(blocks), window, hop, least))
    assert [each.tolist() for each in found] == [each.tolist() for each in expected]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, []), (10.0, [10.0]), (10.9, [10.9]), (31.0, [10.0, 10.0, 10.0, 1.0])]
)
def test_moments_cover_a_sound(seconds: float, expected: list[float]) -> None:
    whole = noise(seconds)
    for blocks in ([whole], np.array_split(whole, 13)):
        parts = list(stretches(blocks, RATE))
        assert [len(part) / RATE for part in parts] == expected
        assert np.array_equal(np.concatenate([*parts, whole[:0]]), whole)


def test_what_is_guessed_rightly_is_decoded_once() -> None:
    passes = 0

    class Blocks:
        def __init__(self, waveform: NDArray[np.float32]) -> None:
            self._waveform = waveform

        def __iter__(self) -> Iterator[NDArray[np.float32]]:
            nonlocal passes
            passes += 1
            return iter(np.array_split(self._waveform, 50))

    for name, waveform in SOUNDS.items():
        passes = 0
        WINDOWS.prepare_blocks(Blocks(waveform), len(waveform))
        assert passes == (2 if "silent beside" in name or "only beside" in name else 1), name


def test_silence_throughout_is_heard_and_a_short_sound_is_heard_whole() -> None:
    for waveform in (np.zeros(25 * RATE, np.float32), np.concatenate([noise(1), np.zeros(9 * RATE, np.float32)])):
        silence = Silence(RATE)
        blocks = list(silence.left_out([waveform]))
        again = list(silence.left_out([waveform])) if silence.mistaken else blocks
        assert np.array_equal(np.concatenate(again), waveform)


def long_file(seconds: int) -> bytes:
    """A small WAV of 1,000 Hz, of noise that a pause of four seconds follows, and so on."""
    samples = np.random.default_rng(0).integers(0, 256, seconds * 1_000, dtype=np.uint8)
    samples[np.arange(len(samples)) // 1_000 % 20 >= 16] = 128
    return media.riff((b"fmt ", media.wave(bits=8, rate=1_000)), (b"data", samples.tobytes()))


@pytest.mark.parametrize("kind", ["windows", "fusion", "patches", "waveforms"])
def test_a_sound_of_half_an_hour_is_not_held(kind: str) -> None:
    spec, data = SPECS[kind], long_file(1_800)
    hear(long_file(1), RATE, AudioLimits(), spec.prepare_blocks)
    tracemalloc.start()
    try:
        sound = hear(data, RATE, AudioLimits(), spec.prepare_blocks)[0]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    rows = sound.rows.nbytes if sound.rows.flags.c_contiguous else sound.rows.nbytes / 2  # patches share their frames
    if kind == "fusion":
        rows = 1_550 * RATE / 320 * 16 * 4  # the spectrum that is shrunk
    assert 1_440 < len(sound.rows) * spec.heard(sound.rows) / RATE < 1_640 or kind == "fusion"
    assert peak < 1.35 * rows + 25e6  # of blocks, and of the spectra of a thousand frames


def test_a_recording_is_gone_through_as_often_as_wanted_and_ends_with_the_right_mix() -> None:
    sound = media.source(1)
    data = media.written(np.stack([sound, -sound], 1), subtype="FLOAT")
    recording = Recording(data, media.RATE)
    assert abs(recording.about - len(sound)) < 2
    first, second, third = (np.concatenate(list(recording)) for _ in range(3))
    assert not first.any() and np.array_equal(second, sound) and np.array_equal(second, third)
    half = list(itertools.islice(recording, 1))
    assert len(half) == 1 and np.array_equal(np.concatenate(list(recording)), sound)
