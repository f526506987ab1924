"""The project's only rules of unit length and truncation stand here."""

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


def l2_normalise(vectors: NDArray[np.floating]) -> Vectors:
    """Scale each row of (..., D) to Euclidean length 1, as float32.

    Raises ValueError for a row that has no direction: all zeros, NaN or infinite.
    """
    # float64 on the way: a float32 sum of squares overflows from 1.8e19 on.
    wide = np.asarray(vectors, dtype=np.float64)
    peak = np.abs(wide).max(axis=-1, keepdims=True, initial=0.0)
    if not np.all(np.isfinite(peak)) or np.any(peak == 0.0):
        raise ValueError("a vector has no direction: it is zero, NaN or infinite")
    wide = wide / peak
    unit = wide / np.sqrt((wide * wide).sum(axis=-1, keepdims=True))
    return np.asarray(unit, dtype=np.float32)


def truncate(vectors: NDArray[np.floating], dimensions: int) -> Vectors:
    """Keep the first `dimensions` of (..., D), then renormalise (Matryoshka, arXiv 2205.13147)."""
    width = vectors.shape[-1]
    if not 1 <= dimensions <= width:
        raise ValueError(f"dimensions must be between 1 and {width}, not {dimensions}")
    if dimensions == width:
        return np.asarray(vectors, dtype=np.float32)
    return l2_normalise(vectors[..., :dimensions])
