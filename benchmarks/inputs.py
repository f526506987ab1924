"""Generated inputs: no two alike, and none like those of an earlier run, so that no cache answers for the model."""

import numpy as np

from service.contract.vectors import Vectors

_WORDS = (
    *("dog", "cat", "woman", "child", "boat", "street", "river", "violin", "engine", "thunder", "bridge", "the", "a"),
    *("small", "red", "old", "runs", "plays", "sleeps", "beside", "under", "with", "near"),
)


class Inputs:
    def __init__(self) -> None:
        self._rng = np.random.default_rng()  # unseeded: Redis, where one is configured, outlives a run

    def text(self) -> str:
        """A sentence of twelve words and a number."""
        return f"{' '.join(self._rng.choice(_WORDS, 12))} {self._rng.integers(10**9)}"

    def vectors(self, count: int, dimensions: int) -> Vectors:
        """(count, dimensions) float32, of no particular length."""
        return self._rng.standard_normal((count, dimensions), dtype=np.float32)
