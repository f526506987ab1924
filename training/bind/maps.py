"""Closed-form maps from one space of unit vectors into another, fitted on the same texts in both."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import l2_normalise

Floats = NDArray[np.float32]
Kind = Literal["procrustes", "ridge"]
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
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
    kind: Kind
    penalty: float
    """Of ridge; 0 for Procrustes."""
    cosine: float
    """Mean cosine between mapped and true vectors of texts that the map was not fitted on."""
    recall: float
    """How often, in percent, the nearest true vector of such a text is its own."""


def fit(source: Floats, target: Floats, kind: Kind) -> Fit:
    """The map from source (N, A) to target (N, B), rows being one text each, judged on every tenth text.

    Ridge takes the penalty that is best there.
    """
    held = np.arange(len(source)) % _HELD_OUT == _HELD_OUT - 1
    candidates = PENALTIES if kind == "ridge" else (0.0,)
    fits = []
    for penalty in candidates:
        found = (
            ridge(source[~held], target[~held], penalty)
            if kind == "ridge"
            else procrustes(source[~held], target[~held])
        )
        mapped, true = found(source[held][:_JUDGED]), target[held][:_JUDGED]
        similarity = mapped @ true.T
        own = similarity.diagonal()
        nearest = (similarity >= own[:, None]).sum(1) == 1
        fits.append(Fit(found, kind, penalty, float(own.mean()), float(nearest.mean() * 100)))
    return max(fits, key=lambda each: each.cosine)


def procrustes(source: Floats, target: Floats) -> Map:
    """A rotation with one scale between centred vectors: angles inside the source space stay as they are.

    Schönemann 1966; where the lengths differ its matrix is semi-orthogonal.
    """
    (x, mean_x), (y, mean_y) = _centred(source), _centred(target)
    u, values, v = np.linalg.svd(x.T @ y, full_matrices=False)
    return _map(u @ v * (values.sum() / (x**2).sum()), mean_x, mean_y)


def ridge(source: Floats, target: Floats, penalty: float) -> Map:
    """Least squares between centred vectors; the penalty counts in mean variances of a source dimension."""
    (x, mean_x), (y, mean_y) = _centred(source), _centred(target)
    covariance = x.T @ x
    covariance[np.diag_indices_from(covariance)] += penalty * covariance.trace() / len(covariance)
    return _map(np.linalg.solve(covariance, x.T @ y), mean_x, mean_y)


def _centred(vectors: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = vectors.mean(0, dtype=np.float64)
    return vectors - mean, mean


def _map(weight: NDArray[Any], mean_x: NDArray[np.float64], mean_y: NDArray[np.float64]) -> Map:
    return Map(weight.astype(np.float32), (mean_y - mean_x @ weight).astype(np.float32))
