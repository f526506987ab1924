"""The front end of YAMNet turns a waveform into log-mel patches, float32 (patches, 1, frames, mels)."""

import functools
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from service.contract.sounds import AudioPreprocessing, Growing, Sound, Waveform
from service.contract.windows import check_spectrum, framed, hann, mel_filters

_SIDE_BY_SIDE_S = 600.0
"""Length up to which a sound's patches lie side by side; those of a longer one share the frames in which they
overlap."""


class LogMelPatches(AudioPreprocessing):
    """Cuts a log-mel spectrum into short overlapping patches.

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
        check_spectrum(self.fft_length, self.window_length, self.f_min, self.f_max, self.sampling_rate)
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
    window, mel = hann(spec.window_length).astype(np.float32), _htk_mel(spec)
    features = Growing(_frames_of(about, spec), spec.n_mels)
    # A long sound's spectrum, or the sound itself, is not held.
    for frames in framed(_with_silence(blocks, spec), spec.window_length, spec.hop_length):
        spectrum = np.abs(np.fft.rfft(frames * window, n=spec.fft_length))
        features.append(np.log(spectrum.astype(np.float32) @ mel + np.float32(spec.log_offset)))
    return features.whole


def _with_silence(blocks: Iterable[Waveform], spec: LogMelPatches) -> Iterator[Waveform]:
    """Yield the blocks, and the silence that fills the last patch."""
    total = 0
    for block in blocks:
        total += len(block)
        yield block
    yield np.zeros((_frames_of(total, spec) - 1) * spec.hop_length + spec.window_length - total, np.float32)


def _frames_of(samples: int, spec: LogMelPatches) -> int:
    """Return how many frames the patches of so many samples have together."""
    patch = (spec.patch_frames - 1) * spec.hop_length + spec.window_length
    hop = spec.patch_hop_frames * spec.hop_length
    return spec.patch_frames + -(-max(0, samples - patch) // hop) * spec.patch_hop_frames


@functools.lru_cache(maxsize=8)
def _htk_mel(spec: LogMelPatches) -> NDArray[np.float32]:
    """Return triangular filters (fft_length // 2 + 1, n_mels), linear on the HTK mel scale; the DC bin is left out."""
    filters = mel_filters(spec.n_mels, spec.f_min, spec.f_max, spec.fft_length, spec.sampling_rate, "kaldi")
    return np.asarray(np.vstack([np.zeros(spec.n_mels), filters[1:]]), np.float32)
