"""Vectors like those of a trained space: clusters, and inside each a few directions that matter and some noise.

Vector number i is the same whatever number is asked for with it. Topics are drawn with unequal frequencies, as in the
world: the largest thousandth of them holds about a twentieth of the vectors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.contract.vectors import Vectors, l2_normalise

_CHUNK = 20_000
_DIRECTIONS = 24
_SPREAD, _NOISE = 0.8, 0.3
QUERIES = 10**9
"""The number from which on vectors serve as queries: none of them is stored."""


@dataclass(frozen=True)
class Clustered:
    dimensions: int
    clusters: int = 1_000

    def chunks(self, first: int, count: int) -> Iterator[tuple[int, Vectors, list[dict[str, Any]]]]:
        """Number of the first, unit vectors (n, D), and their metadata; `first` is a multiple of the chunk's size."""
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((self.clusters, self.dimensions), dtype=np.float32)
        directions = rng.standard_normal((_DIRECTIONS, self.dimensions), dtype=np.float32) / np.float32(
            _DIRECTIONS**0.5
        )
        frequency = 1 / np.sqrt(np.arange(1, self.clusters + 1))
        frequency /= frequency.sum()
        for start in range(first, first + count, _CHUNK):
            rng = np.random.default_rng([1, start])
            of = rng.choice(self.clusters, _CHUNK, p=frequency)
            along = rng.standard_normal((_CHUNK, _DIRECTIONS), dtype=np.float32) @ directions
            noise = rng.standard_normal((_CHUNK, self.dimensions), dtype=np.float32)
            taken = min(_CHUNK, first + count - start)
            vectors = l2_normalise((centres[of] + _SPREAD * along + _NOISE * noise)[:taken])
            yield start, vectors, [_metadata(start + place, int(of[place])) for place in range(taken)]

    def vectors(self, first: int, count: int) -> Vectors:
        return np.concatenate([vectors for _, vectors, _ in self.chunks(first, count)])


def _metadata(number: int, cluster: int) -> dict[str, Any]:
    return {"hundredth": number % 100, "tenth": f"part {number % 10}", "even": number % 2 == 0, "topic": cluster}
