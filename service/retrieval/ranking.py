"""Pure functions over a ranking: fusing two of them, removing near-duplicates, making it diverse."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors
from service.runtime.workers import stop_if_abandoned

FUSION_K = 60
"""Constant of reciprocal rank fusion, as Cormack, Clarke and Büttcher (SIGIR 2009) chose it."""

_ROUNDING = 1e-6
"""Largest deviation from 1 of the float32 inner product of two equal unit vectors."""


def fuse(rankings: Sequence[Sequence[str]], weights: Sequence[float]) -> dict[str, float]:
    """Return reciprocal rank fusion: ids → Σ weight / (60 + rank), ranks from 1, over the rankings that hold the id."""
    fused: dict[str, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for place, id in enumerate(ranking, start=1):
            fused[id] = fused.get(id, 0.0) + weight / (FUSION_K + place)
    return fused


def distinct(vectors: Vectors, similarity: float) -> list[int]:
    """Return the places, in order, of the unit vectors (N, D) that are not as near as `similarity` to one kept before.

    Equal content makes equal vectors, so that a similarity of 1 leaves out exact repetitions.
    """
    places: list[int] = []
    kept_vectors = np.empty_like(vectors)
    for place, vector in enumerate(vectors):
        stop_if_abandoned()
        if not places or float((kept_vectors[: len(places)] @ vector).max()) < similarity - _ROUNDING:
            kept_vectors[len(places)] = vector
            places.append(place)
    return places


def diverse(relevance: NDArray[np.floating], vectors: Vectors, trade: float, count: int) -> list[int]:
    """Return the places of `count` items by maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).

    Each is the one with the largest trade · relevance - (1 - trade) · (largest similarity to those already taken); the
    first is the most relevant. Relevance (N,), unit vectors (N, D); 1 for `trade` orders by relevance alone.
    """
    is_free = np.ones(len(vectors), bool)
    nearest = np.zeros(len(vectors))
    places: list[int] = []
    while len(places) < min(count, len(vectors)):
        stop_if_abandoned()
        gain = trade * relevance - (1 - trade) * nearest if places else relevance
        best = int(np.argmax(np.where(is_free, gain, -np.inf)))
        places.append(best)
        is_free[best] = False
        similar = (vectors @ vectors[best]).astype(np.float64)
        nearest = similar if len(places) == 1 else np.maximum(nearest, similar)
    return places
