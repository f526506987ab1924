"""Batches that are drawn in a thread while a step is at its own."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Draws the batches of the next `count` steps, in their order, beside the step that is at work."""

    def __init__(self, draw: Callable[[int], T], steps: int, count: int = 1) -> None:
        self._draw, self._steps, self._count = draw, steps, count
        self._pool = ThreadPoolExecutor(1, "batches")
        self._waiting: dict[int, Future[T]] = {}
        self.waited_s = 0.0

    def take(self, step: int) -> T:
        """Return the batch of a step. Steps are taken one after the other."""
        for later in range(step, max(step + 1, min(step + 1 + self._count, self._steps))):
            if later not in self._waiting:
                self._waiting[later] = self._pool.submit(self._draw, later)
        began = time.perf_counter()
        batch = self._waiting.pop(step).result()
        self.waited_s += time.perf_counter() - began
        return batch

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
