"""Similarity of two sets of token vectors: the late interaction of FILIP, and optimal transport as in UNITER.

Both are functions of one query's tokens (N, D) and the tokens of many items (M_i, D), all of unit length, and give one
score per item: for two sets of one token each it is their cosine similarity.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors

_PROXIMAL_STEPS = 50
_PROXIMAL_WEIGHT = 0.5


def maxsim(query: Vectors, items: Sequence[Vectors]) -> NDArray[np.float64]:
    """Return the mean over the query's tokens of the similarity to the item's nearest token (FILIP, arXiv
    2111.07783, eq. 4)."""
    similar, present = _similarities(query, items)
    return np.asarray(np.where(present[:, None], similar, -np.inf).max(axis=2).mean(axis=1))


def transport(query: Vectors, items: Sequence[Vectors]) -> NDArray[np.float64]:
    """Return the similarity under the cheapest transport of the query's tokens onto the item's: 1 - Σ plan · (1 -
    similarity).

    Both sides spread their weight evenly. The plan is that of IPOT, the proximal point method (arXiv 1802.04307) that
    UNITER (arXiv 1909.11740, section 3.2) aligns words and regions by: 50 steps of weight 0.5, one Sinkhorn iteration
    each.
    """
    similar, present = _similarities(query, items)
    rows = len(query)
    columns = present.sum(axis=1, keepdims=True)  # (B, 1)
    share = present / columns  # (B, M), 0 past an item's own tokens
    kernel = np.exp((similar - 1) / _PROXIMAL_WEIGHT) * present[:, None]
    plan = np.ones_like(kernel) * present[:, None]
    scale = share.copy()
    for _ in range(_PROXIMAL_STEPS):
        current = kernel * plan
        left = 1 / rows / np.einsum("bnm,bm->bn", current, scale)
        scale = share / np.where(present, np.einsum("bnm,bn->bm", current, left), 1)
        plan = left[:, :, None] * current * scale[:, None]
    return np.asarray(1 - (plan * (1 - similar)).sum(axis=(1, 2)))


def _similarities(query: Vectors, items: Sequence[Vectors]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return similarities (B, N, M) with every item padded to the longest, and the mask of its own tokens (B, M)."""
    counts = np.array([len(item) for item in items])
    present = np.arange(counts.max())[None] < counts[:, None]
    padded = np.zeros((*present.shape, query.shape[1]), np.float32)
    padded[present] = np.concatenate(items)
    return np.einsum("nd,bmd->bnm", query, padded, optimize=True).astype(np.float64), present
