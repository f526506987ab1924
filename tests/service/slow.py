"""A real tower that waits to be released, and counts the rows it was given."""

import threading
from typing import Any

import numpy as np

from service.engine.towers import Arrays

WAIT_S = 20.0


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
        vectors = self.tower.run(arrays)
        self.rows += len(vectors)
        return vectors
