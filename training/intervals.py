"""Bootstrapped 95 % intervals of means over evaluated items (Efron, 1979; percentile method)."""

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000


def interval(values: NDArray[np.floating], groups: NDArray[np.int64] | None = None, seed: int = 0) -> list[float]:
    """The 95 % interval of the mean of values (N,), as [low, high], rounded to two digits.

    `groups` (N,) names what is drawn together: the captions of one photograph are no independent samples. Raises
    ValueError where there is no value.
    """
    if not len(values):
        raise ValueError("an interval of no values")
    members = np.arange(len(values)) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(members.max()) + 1
    sums, sizes = np.bincount(members, values, count), np.bincount(members, minlength=count)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    low, high = np.percentile((weights @ sums) / (weights @ sizes), [2.5, 97.5])
    return [round(float(low), 2), round(float(high), 2)]
