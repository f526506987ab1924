"""Bootstrapped 95 % intervals of means over evaluated items (Efron, 1979; percentile method)."""

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
_DRAWN = 2**22  # numbers of resampled items at a time


def interval(
    values: NDArray[np.floating],
    groups: NDArray[np.int64] | None = None,
    seed: int = 0,
    classes: NDArray[np.int64] | None = None,
) -> list[float]:
    """The 95 % interval of the mean of values (N,), as [low, high], rounded to two digits.

    `groups` (N,) names what is drawn together: the captions of one photograph are no independent samples. With
    `classes` (N,) it is the interval of the mean of the classes' means, each drawn anew with as many items as it has.
    Raises ValueError where there is no value.
    """
    if not len(values):
        raise ValueError("an interval of no values")
    rng = np.random.default_rng(seed)
    if classes is None:
        members = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
        means = _resampled(
            np.bincount(members, values).astype(np.float64), np.bincount(members).astype(np.float64), rng
        )
    else:
        parts = [values[classes == label] for label in np.unique(classes)]
        means = np.mean([_resampled(part, np.ones(len(part)), rng) for part in parts], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return [round(float(low), 2), round(float(high), 2)]


def _resampled(
    sums: NDArray[np.floating], sizes: NDArray[np.floating], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Means of resamples of groups with these sums and sizes."""
    count, means = len(sums), []
    block = max(1, _DRAWN // count)
    for start in range(0, _RESAMPLES, block):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(block, _RESAMPLES - start))
        means.append((weights @ sums) / (weights @ sizes))
    return np.concatenate(means)
