"""A real tower that waits to be released, and counts the rows it was given."""

import threading
from typing import Any

import numpy as np

from service.engine.towers import Arrays
from tests.conftest import DEADLINE_S as WAIT_S


class Slow:
    def __init__(self, tower: Any, *, held: bool = False) -> None:
        self.tower, self.rows = tower, 0
        self.provider, self.precision, self.choice = tower.provider, tower.precision, None
        self.entered, self.released = threading.Event(), threading.Event()
        if not held:
            self.released.set()

    def run(self, arrays: Arrays) -> np.ndarray:
        self.entered.set()
        assert self.released.wait(WAIT_S)
        return self._vectors(arrays)

    def _vectors(self, arrays: Arrays) -> np.ndarray:
        vectors = self.tower.run(arrays)
        self.rows += len(vectors)
        return vectors


class Stuck(Slow):
    """Lets so many rows through, and then waits to be released."""

    def __init__(self, tower: Any, rows: int) -> None:
        super().__init__(tower, held=True)
        self._free = rows

    def run(self, arrays: Arrays) -> np.ndarray:
        return self._vectors(arrays) if self.rows < self._free else super().run(arrays)
