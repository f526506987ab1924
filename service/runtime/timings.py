"""Durations of a request's stages, named as in the Server-Timing header."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from service.runtime import tracing

# The middleware sets a dictionary for each request; tasks that the request starts share it.
stages: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)


def record(stage: str, seconds: float) -> None:
    """Record a stage's time. Inputs of one request run side by side, so a stage's time is its longest, not its sum."""
    seen = stages.get()
    if seen is not None:
        seen[stage] = max(seconds, seen.get(stage, 0.0))


@contextmanager
def timed(stage: str) -> Iterator[Callable[[], float]]:
    """Record the time of the block; yields a function that returns the seconds so far."""
    started = time.perf_counter()
    try:
        with tracing.stage(stage):
            yield lambda: time.perf_counter() - started
    finally:
        record(stage, time.perf_counter() - started)
