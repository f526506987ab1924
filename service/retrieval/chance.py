"""How likely a match is mere chance: told from what queries that mean nothing find in the same collection.

The similarities of such queries to the items of one kind are close to normal, so that the tail says how many of N items
would be as alike by chance: E = N · P(similarity ≥ score), as BLAST says it of sequences (Karlin and Altschul, 1990).
Each kind has its own centre and spread, which puts photographs and recordings on one scale.
"""

import math
import random
import string
from collections.abc import Sequence

import numpy as np

from service.contract.vectors import Vectors
from service.engine.embedder import Embedder
from service.engine.inputs import Embedded, Text, raise_first
from service.retrieval.single_flight import SingleFlight
from service.store import Background

MOST_EXPECTED = 0.2
"""A best match that so many items would reach by chance is none. Chosen on Flickr8k's dev and train photographs,
Corel5k's train split and ESC-50's folds 1 to 4 (docs/LOG.md, 2026-11-30)."""
_QUERIES, _SHORTEST, _LONGEST = 64, 4, 11
_LEAST_SPREAD = 1e-3
_SMALLEST = 1e-300


def background_texts() -> list[str]:
    """Return the background queries: words of random letters, always the same."""
    drawn = random.Random(0)
    return [
        "".join(drawn.choices(string.ascii_lowercase, k=drawn.randint(_SHORTEST, _LONGEST))) for _ in range(_QUERIES)
    ]


class BackgroundQueries:
    """The vectors of the background queries, which are embedded when they are first needed."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._vectors: Vectors | None = None
        self._once = SingleFlight[Vectors]()

    async def vectors(self) -> Vectors:
        """Return the vectors (N, D), always the same array. The bundle embeds texts."""
        if self._vectors is None:
            self._vectors = await self._once(self._embed)
        return self._vectors

    async def _embed(self) -> Vectors:
        if self._vectors is not None:
            return self._vectors
        results = await self._embedder.embed(list(map(Text, background_texts())), admit_unknown=True)
        raise_first(results)
        return np.stack([result.vector for result in results if isinstance(result, Embedded)])


def log_expected(similarity: float, background: Background | None) -> float | None:
    """Return the logarithm of how many items of the kind would be as alike by chance, if it can be judged."""
    if background is None:
        return None
    distance = (similarity - background.centre) / max(background.spread, _LEAST_SPREAD)
    return math.log(background.count) + math.log(max(math.erfc(distance / math.sqrt(2)) / 2, _SMALLEST))


def confidence(similarity: float, background: Background | None) -> float | None:
    """Return the chance that not one item of the kind would be as alike by chance, 0 to 1."""
    logarithm = log_expected(similarity, background)
    return None if logarithm is None else math.exp(-math.exp(logarithm))


def nothing(confidences: Sequence[float | None]) -> bool | None:
    """Return whether results with these confidences are no better than chance; None where none can be judged."""
    judged = [confidence for confidence in confidences if confidence is not None]
    if confidences and not judged:
        return None
    return max(judged, default=0.0) < math.exp(-MOST_EXPECTED)
