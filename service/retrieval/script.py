"""Films by script: steps that are to follow one another are matched to the moments of each item, in order.

The best match is found by dynamic programming, as two sequences are aligned (Needleman and Wunsch, 1970): a step takes
one moment or none, a later step a later moment, and any time may pass between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from service.contract.vectors import Vectors
from service.store import Item, Moment, Shown


@dataclass(frozen=True)
class Match:
    """Says how an item follows a script."""

    id: str
    score: float
    """Power mean (exponent 1/2) over the steps of how far their moments' similarities are above the mean of all moments
    that are compared."""
    steps: Sequence[tuple[Moment, float] | None]
    """The moment of each step with its cosine similarity; None for a step that no moment was taken for."""


@dataclass(frozen=True)
class Followed:
    item: Item
    match: Match
    shown: Shown | None
    """The item's preview, where it was asked for and exists."""


def follow(steps: Vectors, moments: Mapping[str, Sequence[Moment]], count: int) -> list[Match]:
    """Return the `count` items that follow the steps (S, D) best, best first, from their moments by item id.

    Similarities of pictures and of sounds to a text lie at levels of their own, so that each counts by how far it is
    above the mean of its kind; its square root, so that one scene that fits very well does not stand for another that
    is not there (docs/LOG.md, 2026-12-01). A step without a moment counts as an average one.
    """
    flat = [moment for of in moments.values() for moment in of]
    if not flat:
        return []
    similarities = steps @ np.stack([_vector(moment) for moment in flat]).T
    modalities = np.array([moment.modality for moment in flat])
    gains = np.zeros(similarities.shape)
    for modality in set(modalities):
        columns = modalities == modality
        part = similarities[:, columns]
        gains[:, columns] = np.sqrt(np.maximum(0.0, part - part.mean(1, keepdims=True)))
    matches = []
    first = 0
    for id, of in moments.items():
        last = first + len(of)
        total, places = aligned(gains[:, first:last], np.array([(moment.start + moment.end) / 2 for moment in of]))
        ranking = [
            None if place is None else (of[place], float(similarities[step, first + place]))
            for step, place in enumerate(places)
        ]
        matches.append(Match(id, (total / len(steps)) ** 2, ranking))
        first = last
    return sorted(matches, key=lambda match: -match.score)[:count]


def aligned(gains: np.ndarray, times: np.ndarray) -> tuple[float, list[int | None]]:
    """Return the largest sum of gains (S, M) of steps and moments, and the moment of each step, None for none: later
    steps have moments at later times (M,)."""
    count, order = len(gains), np.argsort(times, kind="stable")
    gains, times = gains[:, order], times[order]
    earlier = np.searchsorted(times, times)  # how many moments are before each
    best = np.zeros((count + 1, len(times) + 1))
    """Of the first s steps among the first m moments."""
    for step in range(count):
        taking = np.concatenate(([0.0], gains[step] + best[step][earlier]))
        best[step + 1] = np.maximum.accumulate(np.maximum(best[step], taking))
    places: list[int | None] = []
    among = len(times)
    for step in reversed(range(count)):
        while among and best[step + 1][among] == best[step + 1][among - 1]:
            among -= 1
        if best[step + 1][among] == best[step][among]:
            places.append(None)
        else:
            places.append(int(order[among - 1]))
            among = int(earlier[among - 1])
    return float(best[count][-1]), places[::-1]


def _vector(moment: Moment) -> Vectors:
    assert moment.vector is not None
    return moment.vector
