"""A handful of examples shifts a label's vector; labels without examples stay where they are."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors, l2_normalise

STRENGTH = 1.0
ROWS = 256
"""Number of inputs whose similarities to all labels are in memory at once."""


def shifts(vectors: Vectors, owners: NDArray[np.int64], labels: int) -> Vectors:
    """Return each label's shift (L, D): what its own examples add to the common part of all; zeros without any.

    `vectors` (N, D) are the examples' unit vectors and `owners` (N,) the labels they belong to. The mean of a label's
    examples less the mean of those means: the gap between modalities, which all examples share, drops out, so that a
    label with examples gains nothing on one without.
    """
    sums, counts = _sums(vectors, owners, labels)
    having = counts > 0
    prototypes = sums[having] / counts[having, None]
    result = np.zeros_like(sums)
    result[having] = STRENGTH * (prototypes - prototypes.mean(axis=0))
    return np.asarray(result, np.float32)


def shifted(label_vectors: Vectors, shift: Vectors) -> Vectors:
    """Return label vectors (L, D) moved by their shifts, at unit length; those without a shift stay exact."""
    moved = np.flatnonzero(shift.any(axis=1))
    result = label_vectors.copy()
    result[moved] = l2_normalise(label_vectors[moved].astype(np.float64) + shift[moved])
    return result


def own_similarities(
    vectors: Vectors, owners: NDArray[np.int64], label_vectors: Vectors
) -> Iterator[NDArray[np.float64]]:
    """Yield each example's similarities to every label (N, L), with its own label as it would be without that
    example; some rows at a time, because all of them may take hundreds of megabytes."""
    sums, counts = _sums(vectors, owners, len(label_vectors))
    having = counts > 0
    middle = (sums[having] / counts[having, None]).mean(axis=0)
    wide = vectors.astype(np.float64)
    moved = shifted(label_vectors, shifts(vectors, owners, len(label_vectors))).astype(np.float64)
    for start in range(0, len(wide), ROWS):
        similarities = wide[start : start + ROWS] @ moved.T
        for place, owner in enumerate(owners[start : start + ROWS], start=start):
            vector = label_vectors[owner].astype(np.float64)
            if counts[owner] > 1:
                others_mean = (sums[owner] - wide[place]) / (counts[owner] - 1)
                vector = l2_normalise(vector + STRENGTH * (others_mean - middle)).astype(np.float64)
            similarities[place - start, owner] = wide[place] @ vector
        yield similarities


def _sums(vectors: Vectors, owners: NDArray[np.int64], labels: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    sums = np.zeros((labels, vectors.shape[1]))
    np.add.at(sums, owners, vectors.astype(np.float64))
    return sums, np.bincount(owners, minlength=labels)
