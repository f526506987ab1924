"""Measure how alike two representations of the same things are, by pure functions that `select.streaming` feeds.

- Linear and RBF centred kernel alignment (Kornblith et al., arXiv 1905.00414) with the unbiased HSIC of Song et al.
  (JMLR 13, 2012), which Murphy et al. (arXiv 2405.01012) call debiased CKA: the plain estimator is high for
  independent features wherever they are wide and the pairs few.
- Mutual k-nearest-neighbour overlap (Huh et al., arXiv 2405.07987).
- Leave-one-out kNN (LOOK, arXiv 2110.06014), as a vote over labels and, where there are only captions, as a prediction
  of the other side.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass
class Moments:
    """Sums over pairs of rows from which the unbiased linear HSIC follows exactly, in one pass over blocks.

    With K = X Xᵀ and L = Y Yᵀ without their diagonals, r = |x|² and s = |y|² per row:

        tr K L = |Xᵀ Y|² - Σ r s        1ᵀ K 1 = |Σ x|² - Σ r
        1ᵀ K L 1 = Σx · XᵀY Σy - Σx · Σ x s - Σ r y · Σy + Σ r s

    The estimate does not depend on where the origin is; `origins` near the means keep the differences exact.
    """

    origins: tuple[Doubles, Doubles]
    count: int = 0
    sums: list[Doubles | float] = field(default_factory=list)

    def add(self, x: Floats, y: Floats) -> None:
        """Take in rows (n, d) and (n, e) of the same pairs."""
        x64, y64 = x - self.origins[0], y - self.origins[1]
        r, s = (x64**2).sum(1), (y64**2).sum(1)
        new: list[Doubles | float] = [
            x64.sum(0), y64.sum(0), x64.T @ y64, x64.T @ s, r @ y64, float(r.sum()), float(s.sum()), float(r @ s)
        ]  # fmt: skip
        self.sums = [old + value for old, value in zip(self.sums, new, strict=True)] if self.count else new
        self.count += len(x)

    def hsic(self) -> float:
        """The unbiased estimate from the rows so far, four at least."""
        x, y, xy, xs, ry, r, s, rs = self.sums
        trace = (np.asarray(xy) ** 2).sum() - rs
        totals = (x @ x - r) * (y @ y - s)  # type: ignore[operator]
        both = x @ xy @ y - x @ xs - ry @ y + rs  # type: ignore[operator]
        return unbiased(float(trace), float(totals), float(both), self.count)


def unbiased(trace: float, totals: float, both: float, n: int) -> float:
    """Song et al., equation 5, from tr K L, (1ᵀ K 1)(1ᵀ L 1) and 1ᵀ K L 1 of kernels with empty diagonals."""
    return (trace + totals / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))


def u_centred(kernel: Floats) -> Floats:
    """A kernel (n, n) so centred that HSIC is the inner product over n (n - 3) (Székely & Rizzo, 2014).

    The result has an empty diagonal and rows that sum to zero.
    """
    n = len(kernel)
    kernel = kernel.copy()
    np.fill_diagonal(kernel, 0.0)
    means = kernel.sum(0, dtype=np.float64) / (n - 2)
    shift = means.sum() / (n - 1)
    kernel -= (means[:, None] + means - shift).astype(kernel.dtype)
    np.fill_diagonal(kernel, 0.0)
    return kernel


def squared_distances(x: Floats) -> Floats:
    """(n, n) of rows (n, d)."""
    x = x - x.mean(0)
    lengths = (x**2).sum(1)
    return np.maximum(lengths[:, None] + lengths - 2 * (x @ x.T), 0.0)


def median_distance(x: Floats) -> float:
    """Returns the median distance over all pairs of different rows."""
    return float(np.sqrt(np.median(squared_distances(x)[np.triu_indices(len(x), 1)])))


def rbf_kernel(x: Floats, width: float) -> Floats:
    """exp(-|x - x'|² / 2 width²) of rows (n, d)."""
    kernel: Floats = np.exp(squared_distances(x) / np.float32(-2 * width**2))
    return kernel


def nearer(scores: Floats, rows: Rows, best: tuple[Floats, Rows], k: int) -> tuple[Floats, Rows]:
    """The k best per query of `best` and of new similarities (q, n) to `rows`. Ties at place k go to either."""
    all_scores = np.concatenate([best[0], scores], axis=1)
    all_rows = np.concatenate([best[1], np.broadcast_to(rows, scores.shape)], axis=1)
    if all_scores.shape[1] <= k:
        return all_scores, all_rows
    order = np.argpartition(all_scores, -k, axis=1)[:, -k:]
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)


def overlap(first: Rows, second: Rows) -> float:
    """Mutual kNN: mean share of the k neighbours (q, k) of a query that both sides name."""
    return float((first[:, :, None] == second[:, None, :]).any(2).mean())


def vote(labels: Rows) -> Rows:
    """The label that most of a query's neighbours (q, k, nearest first) have; of equals, the nearest one's."""
    counts = (labels[:, :, None] == labels[:, None, :]).sum(2)
    return np.take_along_axis(labels, counts.argmax(1)[:, None], 1)[:, 0]
