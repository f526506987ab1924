"""A request's stages are timed under the names of the Server-Timing header."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from service.runtime import tracing

# The middleware sets a dictionary for each request; tasks that the request starts share it.
stages: ContextVar[dict[str, float] | None] = ContextVar("stages", default=None)


def record(stage: str, seconds: float) -> None:
    """Record a stage's time. Inputs of one request run side by side, so a stage's time is its longest, not its sum."""
    durations = stages.get()
    if durations is not None:
        durations[stage] = max(seconds, durations.get(stage, 0.0))


@contextmanager
def timed(stage: str) -> Iterator[Callable[[], float]]:
    """Record the time of the block; yields a function that returns the seconds so far."""
    start_s = time.perf_counter()
    try:
        with tracing.stage(stage):
            yield lambda: time.perf_counter() - start_s
    finally:
        record(stage, time.perf_counter() - start_s)
