"""Waveform → what an audio tower is fed; and sounds of any length → one model call.

`patches`, `windows` and `waveforms` are the kinds of front end: each is a specification that a bundle's manifest
carries whole, and knows how to apply itself.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Waveform = NDArray[np.float32]

STRETCH_S = 10.0
"""A longer sound has moments of this length, and what is silent in it has no part in its vector."""
_SILENT = 1e-2
"""A second is silent where it deviates from its mean by so much of what the loudest one does: 40 dB below."""
_SPARE = 4_096
"""Samples of room beside those that a header states: a resampler rounds, and has a delay."""


@dataclass(frozen=True, eq=False)
class Sound:
    """A sound as its tower wants it: P rows that the tower encodes one by one, and how they are averaged."""

    rows: NDArray[np.float32]
    """(P, …): patches, windows, or stretches of samples with silence past a stretch's own."""
    shares: NDArray[np.float32]
    """(P,): what part of the sound's vector each row is; they sum to 1."""
    lengths: NDArray[np.int64]
    """(P,): how much of a row is the sound's own, in the unit that the specification says."""

    def __len__(self) -> int:
        return len(self.rows)


class AudioPreprocessing(BaseModel, ABC):
    """The front end of an audio tower; complete, and carried by the bundle's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampling_rate: int = Field(default=16_000, ge=1_000, le=192_000)

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs: rows, lengths where the tower is told them, and `weights`."""

    @property
    def padded(self) -> bool:
        """Whether a call's rows are as long as its longest: sounds are then batched by likeness of length."""
        return False

    def prepare(self, waveform: Waveform) -> Sound:
        """Waveform (samples,) at the specification's rate → rows. At least one, even of no samples.

        What is silent in a sound of more than STRETCH_S is left out: the mean over 20 s of silence and a bark says
        silence.
        """
        return self.rows_of(audible(waveform, self.sampling_rate))

    @abstractmethod
    def rows_of(self, waveform: Waveform) -> Sound:
        """As `prepare`, silence included."""

    def prepare_blocks(self, blocks: Iterator[Waveform], about: int) -> Sound:
        """As `prepare`, of a waveform that comes in blocks, of about so many samples in all."""
        return self.prepare(gathered(blocks, about))

    @abstractmethod
    def heard(self, rows: NDArray[np.float32]) -> int:
        """Samples that the tower hears in each of these rows (P, …), padding included and overlap left out."""

    def milliseconds(self, sound: Sound) -> int:
        """What a sound costs in a batch: the length of what the tower hears."""
        return round(len(sound) * self.heard(sound.rows) * 1000 / self.sampling_rate)

    def rows_in(self, seconds: float, rows: NDArray[np.float32]) -> int:
        """How many of these rows (P, …) are so many seconds of sound; at least one."""
        return max(1, int(seconds * self.sampling_rate) // max(1, self.heard(rows)))

    def collate(self, sounds: Sequence[Sound]) -> list[NDArray[Any]]:
        """Sounds → one call's arrays, in the order of `inputs`: their rows one after the other, and `weights` (B, ΣP).

        `weights @ features` is each sound's weighted mean over its own rows, so sounds of any length share a call.
        """
        weights = np.zeros((len(sounds), sum(map(len, sounds))), np.float32)
        start = 0
        for row, sound in enumerate(sounds):
            weights[row, start : start + len(sound)] = sound.shares
            start += len(sound)
        arrays: list[NDArray[Any]] = [self._stack([sound.rows for sound in sounds])]
        if len(self.inputs) == 3:
            arrays.append(np.concatenate([sound.lengths for sound in sounds]))
        return [*arrays, weights]

    def _stack(self, rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        return rows[0] if len(rows) == 1 else np.concatenate(rows)  # ten minutes are not copied


def audible(waveform: Waveform, sampling_rate: int) -> Waveform:
    """A sound of more than STRETCH_S without its silent seconds; a shorter one, or one that is silent throughout, as it
    is."""
    if len(waveform) <= STRETCH_S * sampling_rate:
        return waveform
    blocks = list(seconds(iter([waveform]), sampling_rate))
    heard = audible_seconds([loudness(block) for block in blocks])
    if heard.all():
        return waveform
    return np.concatenate([block for block, kept in zip(blocks, heard, strict=True) if kept])


def seconds(blocks: Iterator[Waveform], sampling_rate: int) -> Iterator[Waveform]:
    """A waveform that comes in blocks, second by second."""
    waiting = np.zeros(0, np.float32)
    for block in blocks:
        waiting = np.concatenate([waiting, block]) if len(waiting) else block
        whole = len(waiting) // sampling_rate * sampling_rate
        for start in range(0, whole, sampling_rate):
            yield waiting[start : start + sampling_rate]
        waiting = waiting[whole:]
    if len(waiting):
        yield waiting


def loudness(block: Waveform) -> float:
    """The deviation from the mean, in float64: a constant is silence, and the squares of a float file may overflow."""
    return float(block.std(dtype=np.float64))


def audible_seconds(levels: Sequence[float]) -> NDArray[np.bool_]:
    """Which seconds of a sound of more than STRETCH_S are not silent, by their loudness; all where there is nothing
    else."""
    heard = np.asarray(levels) > _SILENT * max(levels, default=0.0)
    return heard if len(levels) > STRETCH_S and heard.any() else np.ones(len(levels), np.bool_)


def stretches(samples: int, sampling_rate: int) -> list[tuple[int, int]]:
    """The moments of a sound, as (first, last) samples: STRETCH_S each; a last one of under a second joins the one
    before."""
    length = int(STRETCH_S * sampling_rate)
    starts = list(range(0, samples, length))
    if len(starts) > 1 and samples - starts[-1] < sampling_rate:
        starts.pop()
    return list(itertools.pairwise([*starts, samples]))


class _Growing:
    """Samples that arrive in blocks, held once: there is room for what a header states, and more where it lies."""

    def __init__(self, room: int) -> None:
        self._samples, self._held = np.empty(room, np.float32), 0

    def append(self, block: Waveform) -> None:
        after = self._held + len(block)
        if after > len(self._samples):
            self._samples = np.concatenate([self._samples[: self._held], np.empty(max(after, self._held), np.float32)])
        self._samples[self._held : after] = block
        self._held = after

    @property
    def whole(self) -> Waveform:
        """A view would hold what a header states and the file has not."""
        samples = self._samples[: self._held]
        return samples if 2 * self._held > len(self._samples) else samples.copy()


def gathered(blocks: Iterator[Waveform], about: int) -> Waveform:
    """Blocks of a waveform, of about so many samples in all, as one."""
    samples = _Growing(about + _SPARE)
    for block in blocks:
        samples.append(block)
    return samples.whole


def cut(samples: int, window: int, hop: int, least: int) -> list[tuple[int, int]]:
    """Stretches (start, length) of at most `window` samples, one every `hop`, that cover a sound.

    A last stretch with fewer than `least` samples that no earlier one has is left out.
    """
    count = 1 + -(-max(0, samples - window) // hop)
    if count > 1 and samples - ((count - 2) * hop + window) < least:
        count -= 1
    return [(start, min(window, samples - start)) for start in range(0, count * hop, hop)]


def shares_of(lengths: Sequence[int]) -> NDArray[np.float32]:
    """Each stretch's part of the whole; equal parts where there is nothing."""
    total = sum(lengths)
    return np.asarray([length / total if total else 1 / len(lengths) for length in lengths], np.float32)
