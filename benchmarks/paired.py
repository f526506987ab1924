"""Runs that are compared take turns, round after round, so that what slows the machine slows both."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Measured = TypeVar("Measured")
_WIDTH = 34


def take_turns(contenders: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Return what each gave in each round; every other round goes the other way round."""
    results: dict[str, list[Measured]] = {name: [] for name in contenders}
    for turn in range(rounds):
        order = list(contenders)
        for name in order if turn % 2 == 0 else reversed(order):
            results[name].append(contenders[name]())
    return results


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def say(name: str, **figures: object) -> None:
    """A line for people, at once: a part takes minutes."""
    told = "  ".join(
        f"{key} {value:,.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
    )
    print(f"  {name:{_WIDTH}}{told}", flush=True)
