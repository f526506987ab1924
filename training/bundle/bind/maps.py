"""The closed-form map from one space of unit vectors into another, fitted on the same texts in both."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import l2_normalise

Floats = NDArray[np.float32]
_HELD_OUT = 10  # every tenth text judges the map
_JUDGED = 2000  # bounds the cost of judging


@dataclass(frozen=True)
class Map:
    """x ↦ x @ weight + bias, (N, A) → (N, B), brought to unit length."""

    weight: Floats
    bias: Floats

    def __call__(self, vectors: Floats) -> Floats:
        return l2_normalise(vectors @ self.weight + self.bias)


@dataclass(frozen=True)
class Fit:
    map: Map
    cosine: float
    """Mean cosine between mapped and true vectors of texts that the map was not fitted on."""
    recall: float
    """How often, in percent, the nearest true vector of such a text is its own."""


def fit(source: Floats, target: Floats) -> Fit:
    """Return the map from source (N, A) to target (N, B), whose rows are one text each, judged on every tenth text."""
    held_out = np.arange(len(source)) % _HELD_OUT == _HELD_OUT - 1
    rotation = procrustes(source[~held_out], target[~held_out])
    mapped, true = rotation(source[held_out][:_JUDGED]), target[held_out][:_JUDGED]
    similarity = mapped @ true.T
    true_pairs = similarity.diagonal()
    nearest = (similarity >= true_pairs[:, None]).sum(1) == 1
    return Fit(rotation, float(true_pairs.mean()), float(nearest.mean() * 100))


def procrustes(source: Floats, target: Floats) -> Map:
    """A rotation with one scale between centred vectors: angles inside the source space stay as they are.

    Schönemann 1966; where the lengths differ its matrix is semi-orthogonal.
    """
    (x, mean_x), (y, mean_y) = _centred(source), _centred(target)
    u, values, v = np.linalg.svd(x.T @ y, full_matrices=False)
    weight = u @ v * (values.sum() / (x**2).sum())
    return Map(weight.astype(np.float32), (mean_y - mean_x @ weight).astype(np.float32))


def _centred(vectors: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = vectors.mean(0, dtype=np.float64)
    return vectors - mean, mean
