"""An endless stream of sounds to learn from, made of log-mel spectra.

The spectra of all clips are computed once. Each step mixes them anew: powers of independent sounds add up, so mixtures,
gains, filters, speed, reverberation and noise are cheap operations on mel powers, and the teacher hears the very
spectrum that the student does ("consistent teaching", Beyer et al., 2022, arXiv 2106.05237).
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from service.contract.audio import decode_audio
from service.contract.windows import LogMelWindows, log_mel
from training.distill.recipe import DistillRecipe
from training.distill.views import batch_rows, kept

_PLAIN = 0.1
"""The share of clips that are cut out and not changed further."""
_MIXED = (0.35, 0.45, 0.20)
"""The shares of mixtures of one, two and three clips."""
_SPEEDS = tuple(np.exp(np.linspace(np.log(0.75), np.log(1.5), 11)).tolist())
_STRETCH = 1.25
_REVERBERANT, _NOISY, _WIDENED = 0.3, 0.4, 0.35
_AUDIBLE = 1e-3
"""A frame's share of a clip's loudest frame from which on it counts as sound."""


@dataclass(frozen=True)
class Spectra:
    """Log-mel spectra of clips one after the other: `frames` (F, mels) as float16, clip i from offsets[i] on."""

    frames: NDArray[np.float16]
    offsets: NDArray[np.int64]
    audible: list[NDArray[np.int64]]
    """The places of each clip's audible frames."""

    def __len__(self) -> int:
        return len(self.offsets) - 1


def cached_spectra(files: Sequence[Path], spec: LogMelWindows, work: Path) -> Spectra:
    """The spectra of whole files, memory-mapped; made where they are not there yet."""
    key = [spec.model_dump(mode="json"), *(f"{path} {path.stat().st_size}" for path in files)]

    def make() -> dict[str, NDArray[Any]]:
        made = []
        for file in tqdm(files, desc="spectra", disable=None):
            waveform = decode_audio(file.read_bytes(), spec.sampling_rate)
            waveform = np.pad(waveform, (0, max(0, spec.window_length + 1 - len(waveform))))
            made.append(log_mel(waveform, spec).astype(np.float16))
        return {"frames": np.concatenate(made), "offsets": np.cumsum([0, *map(len, made)])}

    stored = kept(work, "spectra", key, make)
    frames, offsets = stored["frames"], stored["offsets"]
    audible = []
    for start, end in itertools.pairwise(offsets):
        power = np.exp(frames[start:end].astype(np.float32)).sum(1)
        audible.append(np.flatnonzero(power >= _AUDIBLE * power.max()))
    return Spectra(frames, offsets, audible)


def batch(stored: Spectra, recipe: DistillRecipe, step: int) -> Tensor:
    """The rows (B, 1, frames, mels) of one step: a function of the step."""
    spec = recipe.preprocessing()
    rng = np.random.default_rng([recipe.seed, 1, step])
    size = recipe.train.batch_size
    first = batch_rows(len(stored), size, step, recipe.seed)
    size = len(first)
    plain = rng.random(size) < _PLAIN
    count = np.where(plain, 1, 1 + rng.choice(3, size, p=_MIXED))
    total = torch.zeros(size, spec.frames, spec.n_mels)
    for place in range(3):
        rows = np.flatnonzero(count > place)
        clips = first[rows] if place == 0 else rng.integers(len(stored), size=len(rows))
        power = _powers(stored, clips, plain[rows], spec, rng)
        if place:
            levels = power.mean((1, 2)), total[rows].mean((1, 2))
            balance = _decibels(rng, -12, 12, len(rows)) * (levels[1] + 1e-4) / (levels[0] + 1e-4)
            power = power * balance.clamp(max=1e4)[:, None, None]
        total[rows] += power
    changed = ~plain
    total[changed] = _changed(total[changed], spec, rng)
    rows_made = (torch.log(total + spec.floor) - spec.mean) / spec.std
    return rows_made[:, None].contiguous()


def _powers(
    stored: Spectra, clips: NDArray[np.int64], plain: NDArray[np.bool_], spec: LogMelWindows, rng: np.random.Generator
) -> Tensor:
    """Mel powers (N, frames, mels) of stretches of clips, which begin anew where a clip ends, at other speeds."""
    frames = np.arange(spec.frames)
    made = np.empty((len(clips), spec.frames, spec.n_mels), np.float32)
    for row, clip in enumerate(clips):
        start, end = stored.offsets[clip], stored.offsets[clip + 1]
        audible = stored.audible[clip]
        within = rng.choice(audible) if rng.random() < 0.9 else rng.integers(end - start)
        pace = 1.0 if plain[row] else _STRETCH ** rng.uniform(-1, 1)
        first = 0 if end - start <= spec.frames and plain[row] else within - rng.integers(spec.frames)
        at = first + (frames * pace).astype(np.int64)
        made[row] = stored.frames[start + at % (end - start)]
    power = (torch.from_numpy(made).exp_() - spec.floor).clamp_(min=0)
    speeds = rng.integers(len(_SPEEDS), size=len(clips))
    for speed in np.unique(speeds):
        rows = np.flatnonzero((speeds == speed) & ~plain)
        power[rows] = power[rows] @ _moved(_SPEEDS[speed], spec)
    widened = np.flatnonzero((rng.random(len(clips)) < _WIDENED) & ~plain)
    if len(widened):
        copied = power[widened] @ _octave_up(spec)
        power[widened] += copied * _decibels(rng, -24, -3, len(widened))[:, None, None]
    return power


def _changed(power: Tensor, spec: LogMelWindows, rng: np.random.Generator) -> Tensor:
    """Reverberation, a filter, noise and a gain, each drawn anew for every row of powers (N, frames, mels)."""
    size, frames, mels = power.shape
    wet = np.flatnonzero(rng.random(size) < _REVERBERANT)
    if len(wet):
        seconds = np.exp(rng.uniform(np.log(0.1), np.log(1.2), len(wet)))
        time = np.arange(frames) * spec.hop_length / spec.sampling_rate
        decay = torch.from_numpy(np.exp(-13.8 * time[None] / seconds[:, None]).astype(np.float32))
        decay = decay / decay.sum(1, keepdim=True)
        echo = torch.fft.irfft(
            torch.fft.rfft(power[wet], 2 * frames, dim=1) * torch.fft.rfft(decay, 2 * frames, dim=1)[:, :, None],
            2 * frames,
            dim=1,
        )[:, :frames]
        power[wet] += echo.clamp_(min=0) * _decibels(rng, -10, 6, len(wet))[:, None, None]
    bands = np.linspace(0, 1, mels)
    waves = np.cos(np.pi * np.arange(1, 6)[:, None] * bands[None])  # smooth over the bands
    curve = (rng.normal(0, 3.0, (size, 5)) @ waves).clip(-15, 15)
    power = power * torch.from_numpy(10 ** (curve / 10)).float()[:, None, :]
    noisy = np.flatnonzero(rng.random(size) < _NOISY)
    if len(noisy):
        tilt = rng.uniform(-5, 1, (len(noisy), 1))  # nepers from the lowest band to the highest
        colour = torch.from_numpy(np.exp(tilt * bands[None] + rng.normal(0, 0.3, (len(noisy), mels)))).float()
        level = (power[noisy].mean((1, 2)) + 1e-5) * _decibels(rng, -45, 0, len(noisy))
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        grain = torch.empty(len(noisy), frames, mels).exponential_(generator=generator)
        power[noisy] += grain * (colour * (level / colour.mean(1))[:, None])[:, None, :]
    return power * _decibels(rng, -25, 8, size)[:, None, None]


def _decibels(rng: np.random.Generator, low: float, high: float, count: int) -> Tensor:
    """Factors of power, evenly spread in decibels."""
    return torch.from_numpy(10 ** (rng.uniform(low, high, count) / 10)).float()


def _centres(spec: LogMelWindows) -> NDArray[np.float64]:
    """The frequency in hertz at the middle of each band of Kaldi's scale."""
    lowest, highest = (1127 * np.log1p(edge / 700) for edge in (spec.f_min, spec.f_max))
    return np.asarray(700 * np.expm1(np.linspace(lowest, highest, spec.n_mels + 2)[1:-1] / 1127))


@functools.cache
def _moved(factor: float, spec: LogMelWindows) -> Tensor:
    """(mels, mels): what the bands' powers become when every frequency is multiplied by `factor`."""
    hertz = _centres(spec)
    place = np.interp(hertz / factor, hertz, np.arange(spec.n_mels), left=-1, right=-1)
    matrix = np.zeros((spec.n_mels, spec.n_mels), np.float32)
    for band, source in enumerate(place):
        if source >= 0:
            low = min(int(source), spec.n_mels - 2)
            matrix[low, band], matrix[low + 1, band] = 1 - (source - low), source - low
    return torch.from_numpy(matrix)


@functools.cache
def _octave_up(spec: LogMelWindows) -> Tensor:
    """Return what is an octave lower as content of the bands above 7.5 kHz, which clips of 16 kHz lack."""
    return _moved(2.0, spec) * torch.from_numpy(_centres(spec) > 7_500).float()
