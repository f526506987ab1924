"""Waveform → log-mel patches, float32 (patches, 1, frames, mels): the front end of YAMNet."""

import functools
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from service.contract.sounds import AudioPreprocessing, Growing, Sound, Waveform

_BLOCK_FRAMES = 1024
_SIDE_BY_SIDE_S = 600.0
"""Length up to which a sound's patches lie side by side; those of a longer one share the frames in which they
overlap."""


class LogMelPatches(AudioPreprocessing):
    """Short overlapping patches of a log-mel spectrum.

    The spectrum is the magnitude of a short-time Fourier transform (periodic Hann window, frames not centred),
    mapped through an HTK-scale triangular mel filter bank; the features are log(mel + log_offset), cut into patches
    of `patch_frames` frames every `patch_hop_frames`. This is the front end of YAMNet (Plakal & Ellis, 2020).
    """

    kind: Literal["log_mel_patches"] = "log_mel_patches"
    window_length: int = Field(default=400, gt=0, le=16_384)
    hop_length: int = Field(default=160, gt=0, le=16_384)
    fft_length: int = Field(default=512, gt=0, le=16_384)
    n_mels: int = Field(default=64, gt=0, le=512)
    f_min: float = Field(default=125.0, ge=0)
    f_max: float = Field(default=7_500.0, gt=0)
    log_offset: float = Field(default=0.001, gt=0)
    patch_frames: int = Field(default=96, gt=0, le=4_096)
    patch_hop_frames: int = Field(default=48, gt=0, le=4_096)

    @model_validator(mode="after")
    def _consistent(self) -> "LogMelPatches":
        if self.fft_length < self.window_length:
            raise ValueError(f"fft_length {self.fft_length} is shorter than window_length {self.window_length}")
        if not self.f_min < self.f_max <= self.sampling_rate / 2:
            raise ValueError(f"f_min {self.f_min:g} and f_max {self.f_max:g} are not a band below half the rate")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("patches", "weights")

    def rows_of_blocks(self, blocks: Iterable[Waveform], about: int) -> Sound:
        patches = _cut(_features(blocks, about, self), self)
        count = len(patches)
        if count * self.heard(patches) <= _SIDE_BY_SIDE_S * self.sampling_rate:
            patches = np.ascontiguousarray(patches)
        frames: NDArray[np.int64] = np.full(count, self.patch_frames, np.int64)
        return Sound(patches, np.full(count, 1.0 / count, np.float32), frames)

    def heard(self, rows: NDArray[np.float32]) -> int:
        return self.patch_hop_frames * self.hop_length


def log_mel_patches(waveform: Waveform, spec: LogMelPatches) -> NDArray[np.float32]:
    """Return the patches, float32 (patches, 1, patch_frames, n_mels), of a waveform (samples,) at the spec's rate; at
    least one.

    The end is padded with silence to a whole number of patch hops, so that no sample is left out.
    """
    return np.ascontiguousarray(_cut(_features((waveform,), len(waveform), spec), spec))


def _cut(features: NDArray[np.float32], spec: LogMelPatches) -> NDArray[np.float32]:
    """Cut frames (frames, n_mels) into patches (patches, 1, patch_frames, n_mels), a view."""
    patches = np.lib.stride_tricks.sliding_window_view(features, spec.patch_frames, axis=0)
    return patches[:: spec.patch_hop_frames].transpose(0, 2, 1)[:, None]


def _features(blocks: Iterable[Waveform], about: int, spec: LogMelPatches) -> NDArray[np.float32]:
    """Return the frames of a waveform in blocks, (frames, n_mels), up to a whole number of patch hops."""
    window, mel = _periodic_hann(spec.window_length), _htk_mel(spec)
    features = Growing(_frames_of(about, spec), spec.n_mels)
    waiting, total = np.zeros(0, np.float32), 0

    def take(count: int) -> None:
        """Turn the first frames of what waits into features."""
        nonlocal waiting
        reach = (count - 1) * spec.hop_length + spec.window_length
        samples = waiting[:reach]
        samples = np.pad(samples, (0, reach - len(samples)))
        frames = np.lib.stride_tricks.sliding_window_view(samples, spec.window_length)[:: spec.hop_length]
        spectrum = np.abs(np.fft.rfft(frames * window, n=spec.fft_length))
        features.append(np.log(spectrum.astype(np.float32) @ mel + np.float32(spec.log_offset)))
        waiting = waiting[count * spec.hop_length :]

    # A long sound's spectrum, or the sound itself, is not held.
    reach = (_BLOCK_FRAMES - 1) * spec.hop_length + spec.window_length
    for block in blocks:
        total += len(block)
        waiting = np.concatenate([waiting, block]) if len(waiting) else block
        while len(waiting) >= reach:
            take(_BLOCK_FRAMES)
    count = _frames_of(total, spec)
    while len(features) < count:
        take(min(_BLOCK_FRAMES, count - len(features)))
    return features.whole


def _frames_of(samples: int, spec: LogMelPatches) -> int:
    """Return how many frames the patches of so many samples have together."""
    patch = (spec.patch_frames - 1) * spec.hop_length + spec.window_length
    hop = spec.patch_hop_frames * spec.hop_length
    return spec.patch_frames + -(-max(0, samples - patch) // hop) * spec.patch_hop_frames


@functools.lru_cache(maxsize=8)
def _periodic_hann(length: int) -> NDArray[np.float32]:
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _htk_mel(spec: LogMelPatches) -> NDArray[np.float32]:
    """Return triangular filters (fft_length // 2 + 1, n_mels), linear on the HTK mel scale; the DC bin is left out."""

    def hertz_to_mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(1127.0 * np.log1p(hertz / 700.0))

    bins = hertz_to_mel(np.linspace(0.0, spec.sampling_rate / 2, spec.fft_length // 2 + 1))[:, None]
    lowest, highest = hertz_to_mel(np.array([spec.f_min, spec.f_max]))
    edges = np.linspace(lowest, highest, spec.n_mels + 2)
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0.0, np.minimum(rise, fall))
    filters[0] = 0.0
    return np.asarray(filters, dtype=np.float32)
