"""wav2vec 2.0, HuBERT and WavLM read the sound itself: their front end scales samples to unit variance."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from service.contract.sounds import AudioPreprocessing, Growing, Sound, Waveform, cut, shares_of

_EPSILON = 1e-7


class Waveforms(AudioPreprocessing):
    """Cuts samples into stretches, float32 (stretches, samples); a batch is padded with zeros to its longest.

    A sound of more than `max_samples` is cut, since attention over a stretch costs the square of its length; the
    stretches' vectors are averaged by their own lengths. With `normalise` each is brought to mean 0 and variance 1.
    """

    kind: Literal["waveform"] = "waveform"
    max_samples: int = Field(default=480_000, gt=0, le=9_600_000)
    min_samples: int = Field(default=400, gt=0, le=192_000)
    """That give the tower one frame; a shorter sound is padded with silence."""
    normalise: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_samples < self.min_samples:
            raise ValueError(f"max_samples {self.max_samples} are fewer than min_samples {self.min_samples}")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("waveforms", "lengths", "weights")

    @property
    def padded(self) -> bool:
        return True

    def rows_of_blocks(self, blocks: Iterable[Waveform], about: int) -> Sound:
        stretches = cut(blocks, self.max_samples, self.max_samples, self.min_samples)
        first, *more = itertools.islice(stretches, 2)
        if not more:
            row = self._normalised(self._padded(first, max(len(first), self.min_samples)))
            return Sound(row[None], shares_of([1]), np.array([len(row)], np.int64))
        rows, lengths = Growing(about // self.max_samples + 2, self.max_samples), list[int]()
        for stretch in itertools.chain([first], more, stretches):
            rows.append(self._padded(self._normalised(stretch), self.max_samples)[None])
            lengths.append(len(stretch))
        return Sound(rows.whole, shares_of(lengths), np.asarray(lengths, np.int64))

    def heard(self, rows: NDArray[np.float32]) -> int:
        return int(rows.shape[1])

    def _padded(self, stretch: Waveform, samples: int) -> Waveform:
        return np.pad(stretch, (0, samples - len(stretch)))

    def _normalised(self, stretch: Waveform) -> Waveform:
        if not self.normalise:
            return stretch
        return np.asarray((stretch - stretch.mean()) / np.sqrt(stretch.var() + _EPSILON), np.float32)

    def _stack(self, rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        longest = max(part.shape[1] for part in rows)
        return np.concatenate([np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in rows])
