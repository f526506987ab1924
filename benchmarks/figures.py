"""A measurement and how it is told."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Given = TypeVar("Given")


@dataclass(frozen=True)
class Figure:
    """One number; its name is its key in the JSON object."""

    name: str
    value: float
    unit: str
    n: int
    """Requests that it was measured on."""


def latency(name: str, ask: Callable[[Given], object], inputs: Iterable[Given]) -> list[Figure]:
    """Median and 95th percentile, in milliseconds, of asking once per input, one after the other."""
    taken = []
    for each in inputs:
        started = time.perf_counter()
        ask(each)
        taken.append(1_000 * (time.perf_counter() - started))
    median, p95 = np.percentile(taken, [50, 95])
    return [
        Figure(f"{name}_median_ms", round(float(median), 2), "ms", len(taken)),
        Figure(f"{name}_p95_ms", round(float(p95), 2), "ms", len(taken)),
    ]
