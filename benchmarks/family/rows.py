"""The rows: what each system adds, and the function that measures whether it does here.

A function is registered for one or more rows by `@row(number, system, proof)`, takes the Lab and returns an Outcome. A
row without a function fails, since nothing shows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from training.measure.intervals import interval

if TYPE_CHECKING:
    from benchmarks.family.lab import Lab

Verdict = Literal["holds", "settled", "fails", "none"]
SYSTEMS = 78
NOTHING_TO_TAKE = {57: "Croc", 69: "EVE", 76: "VL-GPT"}


@dataclass(frozen=True)
class Outcome:
    """Holds what a row measured."""

    figure: str
    """What was measured in words, with every number that the verdict stands on."""
    interval: list[float] | None
    """95 % of the figure that decides; None where the proof is an equality."""
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    number: int
    system: str
    proof: str
    measure: "Callable[[Lab], Outcome]"


ROWS: dict[int, Row] = {}


def row(number: int, system: str, proof: str) -> "Callable[[Callable[[Lab], Outcome]], Callable[[Lab], Outcome]]":
    """Register a function as the proof of a row. Several decorators give one function several rows."""

    def register(measure: "Callable[[Lab], Outcome]") -> "Callable[[Lab], Outcome]":
        if number in ROWS or number in NOTHING_TO_TAKE:
            raise ValueError(f"row {number} has its proof already")
        ROWS[number] = Row(number, system, proof, measure)
        return measure

    return register


def gain(
    better: NDArray[Any], base: NDArray[Any], groups: NDArray[np.int64] | None = None
) -> tuple[float, list[float]]:
    """The mean of the paired differences of two arrays (N,), and its bootstrapped 95 % interval over items."""
    differences = np.asarray(better, np.float64) - np.asarray(base, np.float64)
    return round(float(differences.mean()), 2), interval(differences, groups)


def shown(name: str, value: float, bounds: Sequence[float], unit: str = "points") -> str:
    return f"{name} {value:+.2f} {unit} ({bounds[0]:+.2f} to {bounds[1]:+.2f})"


def tried(gained: Sequence[float], control: Sequence[float]) -> Verdict:
    """The verdict of a fair try, from two intervals of gains: of the idea, and of a control that must be seen.

    An idea without a clear gain is settled only where the same test sees a gain that is known to be there.
    """
    if gained[0] > 0:
        return "holds"
    return "settled" if control[0] > 0 else "fails"


def holds(condition: bool) -> Verdict:
    return "holds" if condition else "fails"
