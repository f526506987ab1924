"""A waveform becomes the rows that an audio tower encodes, and sounds of any length share one model call.

`patches`, `windows` and `waveforms` are the kinds of front end: each is a specification that a bundle's manifest
carries whole, and knows how to apply itself.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
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
    """Holds a sound as its tower wants it: P rows that the tower encodes one by one, and how they are averaged."""

    rows: NDArray[np.float32]
    """(P, …): patches, windows, or stretches of samples with silence past a stretch's own."""
    shares: NDArray[np.float32]
    """(P,): what part of the sound's vector each row is; they sum to 1."""
    lengths: NDArray[np.int64]
    """(P,): how much of a row is the sound's own, in the unit that the specification says."""

    def __len__(self) -> int:
        return len(self.rows)


class AudioPreprocessing(BaseModel, ABC):
    """Describes the front end of an audio tower: completely, in the bundle's manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sampling_rate: int = Field(default=16_000, ge=1_000, le=192_000)

    @property
    @abstractmethod
    def inputs(self) -> tuple[str, ...]:
        """Return the names of the graph's inputs: rows, lengths where the tower is told them, and `weights`."""

    @property
    def padded(self) -> bool:
        """Return whether a call's rows are as long as its longest: sounds are then batched by likeness of length."""
        return False

    def prepare(self, waveform: Waveform) -> Sound:
        """Turn a waveform (samples,) at the specification's rate into rows: at least one, even of no samples.

        What is silent in a sound of more than STRETCH_S is left out: the mean over 20 s of silence and a bark says
        silence.
        """
        return self.prepare_blocks((waveform,), len(waveform))

    def prepare_blocks(self, blocks: Iterable[Waveform], about: int) -> Sound:
        """Do as `prepare` with a waveform that comes in blocks, of about so many samples in all.

        Only the rows are held. The blocks are gone through a second time where a second that was taken for audible
        turns out to be silent beside a loud one long after it, or the other way round.
        """
        silence = Silence(self.sampling_rate)
        sound = self.rows_of_blocks(silence.left_out(blocks), about)
        if silence.mistaken:
            del sound  # its memory is needed
            sound = self.rows_of_blocks(silence.left_out(blocks), about)
        return sound

    @abstractmethod
    def rows_of_blocks(self, blocks: Iterable[Waveform], about: int) -> Sound:
        """Do as `prepare_blocks`, silence included; go through the blocks once."""

    @abstractmethod
    def heard(self, rows: NDArray[np.float32]) -> int:
        """Return how many samples the tower hears in each of these rows (P, …), with padding and without overlap."""

    def milliseconds(self, sound: Sound) -> int:
        """Return what a sound costs in a batch: the length of what the tower hears."""
        return round(len(sound) * self.heard(sound.rows) * 1000 / self.sampling_rate)

    def rows_in(self, seconds: float, rows: NDArray[np.float32]) -> int:
        """Return how many of these rows (P, …) are so many seconds of sound; at least one."""
        return max(1, int(seconds * self.sampling_rate) // max(1, self.heard(rows)))

    def collate(self, sounds: Sequence[Sound]) -> list[NDArray[Any]]:
        """Turn sounds into one call's arrays, in the order of `inputs`: their rows one after the other, and `weights`
        (B, ΣP).

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


def seconds(blocks: Iterable[Waveform], sampling_rate: int) -> Iterator[Waveform]:
    """Yield a waveform that comes in blocks, second by second."""
    yield from filter(len, _windows(blocks, sampling_rate, sampling_rate, 0))


def loudness(block: Waveform) -> float:
    """Return the deviation from the mean, in float64: a constant is silence, and a float file's squares may
    overflow."""
    return float(block.std(dtype=np.float64))


def audible_seconds(levels: Sequence[float]) -> NDArray[np.bool_]:
    """Return which seconds of more than STRETCH_S are not silent, by their loudness; all where there is nothing
    else."""
    heard = np.asarray(levels) > _SILENT * max(levels, default=0.0)
    return heard if len(levels) > STRETCH_S and heard.any() else np.ones(len(levels), np.bool_)


class Silence:
    """Finds the silent seconds of one sound of more than STRETCH_S: guessed as they come, known when all have come."""

    def __init__(self, sampling_rate: int) -> None:
        self._rate = sampling_rate
        self._audible: NDArray[np.bool_] | None = None
        self.mistaken = False
        """Whether the guess was wrong. Whoever goes through the blocks again gets the right seconds."""

    def left_out(self, blocks: Iterable[Waveform]) -> Iterator[Waveform]:
        """Yield the blocks without what is silent; once the guess is known to be wrong, no more of them."""
        if self._audible is not None:
            pairs = zip(seconds(blocks, self._rate), self._audible, strict=True)
            yield from (second for second, audible in pairs if audible)
            return
        levels: list[float] = []
        guesses: list[bool] = []
        beginning: list[Waveform] = []
        quietest = math.inf
        for second in seconds(blocks, self._rate):
            beginning.append(second)
            if len(levels) + len(beginning) <= STRETCH_S:
                continue  # a short sound is heard whole
            levels += map(loudness, beginning)
            loudest = max(levels)
            self.mistaken = self.mistaken or quietest <= _SILENT * loudest
            for waiting, level in zip(beginning, levels[-len(beginning) :], strict=True):
                guesses.append(level > _SILENT * loudest)
                if guesses[-1] and not self.mistaken:
                    quietest = min(quietest, level)
                    yield waiting
            beginning.clear()
        yield from beginning
        if levels:
            self._audible = audible_seconds(levels)
            self.mistaken = bool((self._audible != guesses).any())


def stretches(blocks: Iterable[Waveform], sampling_rate: int) -> Iterator[Waveform]:
    """Yield the moments of a sound, whose samples come in blocks: STRETCH_S each; a last one of under a second joins
    the one before."""
    length = int(STRETCH_S * sampling_rate)
    yield from filter(len, _windows(blocks, length, length, sampling_rate))


class Growing:
    """Holds rows (n, *shape) that arrive in parts, once: there is room for `room` of them, and more where they come."""

    def __init__(self, room: int, *shape: int) -> None:
        self._rows, self._held = np.empty((room, *shape), np.float32), 0

    def append(self, rows: NDArray[np.float32]) -> None:
        after = self._held + len(rows)
        if after > len(self._rows):
            # In place: the system moves pages, and a long sound is not held twice.
            self._rows.resize((max(after, self._held + self._held // 8), *self._rows.shape[1:]), refcheck=False)
        self._rows[self._held : after] = rows
        self._held = after

    def __len__(self) -> int:
        return self._held

    @property
    def whole(self) -> NDArray[np.float32]:
        """Return the rows as an array of their own: a view would hold what a header states and the file has not."""
        rows = self._rows[: self._held]
        return rows if 2 * self._held > len(self._rows) else rows.copy()


def gathered(blocks: Iterable[Waveform], about: int) -> Waveform:
    """Join the blocks of a waveform, of about so many samples in all."""
    samples = Growing(about + _SPARE)
    for block in blocks:
        samples.append(block)
    return samples.whole


def cut(blocks: Iterable[Waveform], window: int, hop: int, least: int) -> Iterator[Waveform]:
    """Yield stretches of at most `window` samples, one every `hop`, that cover a sound which comes in blocks; at least
    one.

    A last stretch with fewer than `least` samples that no earlier one has is left out.
    """
    windows = _windows(blocks, window, hop, 1)
    stretch, fresh = next(windows), least
    for following in windows:
        yield stretch
        stretch, fresh = following, len(following) - (window - hop)
    if fresh >= least:
        yield stretch


def _windows(blocks: Iterable[Waveform], length: int, hop: int, ahead: int) -> Iterator[Waveform]:
    """Yield stretches of `length` samples, one every `hop`, each when `ahead` more have come, and what is left."""
    parts: list[Waveform] = []
    count = 0
    for block in filter(len, blocks):
        parts.append(block)
        count += len(block)
        if count >= length + ahead:
            waiting = _joined(parts)
            while len(waiting) >= length + ahead:
                yield waiting[:length]
                waiting = waiting[hop:]
            parts, count = [waiting] if len(waiting) else [], len(waiting)
    yield _joined(parts)


def _joined(parts: Sequence[Waveform]) -> Waveform:
    """Join parts of a waveform; a single one is not copied."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])


def shares_of(lengths: Sequence[int]) -> NDArray[np.float32]:
    """Return each stretch's part of the whole; equal parts where there is nothing."""
    total = sum(lengths)
    return np.asarray([length / total if total else 1 / len(lengths) for length in lengths], np.float32)
