"""The measures again, as their papers write them: whole kernels, one loop per row."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hsic(k: Array, m: Array) -> float:
    """Song et al. (JMLR 13, 2012), equation 5, with explicit matrices."""
    n = len(k)
    k, m, ones = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
    both = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return float((both - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3)))


def biased_cka(x: Array, y: Array) -> float:
    """Kornblith et al. (arXiv 1905.00414): the plain estimator."""
    x, y = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(x.T @ y) ** 2
    return float(cross / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def cka(k: Array, m: Array) -> float:
    return hsic(k, m) / float(np.sqrt(hsic(k, k) * hsic(m, m)))


def rbf(x: Array, share: float) -> Array:
    distances = np.array([[np.sum((a - b) ** 2) for b in x] for a in x])
    median = np.sqrt(np.median(distances[np.triu_indices(len(x), 1)]))
    return np.exp(-distances / (2 * (share * median) ** 2))


def neighbours(x: Array, k: int) -> list[list[int]]:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    result = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        result.append(sorted(others, key=lambda j: -float(unit[i] @ unit[j]))[:k])
    return result


def mutual_knn(x: Array, y: Array, k: int) -> float:
    """Huh et al. (arXiv 2405.07987)."""
    both = zip(neighbours(x, k), neighbours(y, k), strict=True)
    return float(np.mean([len(set(a) & set(b)) / k for a, b in both]))


def left_out(x: Array, y: Array, k: int) -> float:
    """Return how often one's own y is nearer than another's to the mean y of one's k nearest in x; one direction."""
    unit = y / np.linalg.norm(y, axis=1, keepdims=True)
    unit = unit - unit.mean(0)
    wins = []
    for i, near in enumerate(neighbours(x, k)):
        predicted = np.mean([unit[j] for j in near], axis=0)
        wins += [float(unit[i] @ predicted > unit[j] @ predicted) for j in range(len(x)) if j != i]
    return float(np.mean(wins))


def votes(x: Array, labels: NDArray[np.int64], k: int) -> list[int]:
    result = []
    for near in neighbours(x, k):
        seen = [int(labels[j]) for j in near]
        result.append(max(seen, key=lambda label: (seen.count(label), -seen.index(label))))
    return result
