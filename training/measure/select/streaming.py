"""Measure every pair of candidates in passes over blocks of rows: what is held does not grow with the pairs.

Linear CKA is exact whatever the number of rows. RBF-CKA divides HSIC estimates that are averaged over random batches
(Nguyen et al., arXiv 2010.15327): each is unbiased, so that the batch only sets the noise. The kNN measures take all
rows as neighbours, of as many queries as are asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from training.measure.select.candidates import SelectError
from training.measure.select.measures import (
    Doubles,
    Moments,
    median_distance,
    nearer,
    overlap,
    rbf_kernel,
    u_centred,
    vote,
)
from training.measure.select.sides import Floats, Rows, Side, blocks

Bar = tqdm
MEASURES = ("cka", "rbf_cka", "mutual_knn", "loo_knn")
_WIDTH = 0.8
"""The width of the RBF kernel, in medians of the distance."""
_MEDIAN_ROWS = 1000


@dataclass(frozen=True)
class Sizes:
    """Says how much is looked at, and at once."""

    neighbours: int = 10
    queries: int = 2000
    batch: int = 1024
    block: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class Alignment:
    """Says how alike a media and a text candidate are. Higher is more alike throughout."""

    media: str
    text: str
    cka: float
    """Debiased; 1 for the same features up to rotation and scale, about 0 for independent ones."""
    rbf_cka: float
    mutual_knn: float
    """0 … 1; independent features share k / (N - 1) of their neighbours."""
    loo_knn: float
    """How often an item's own partner is nearer than another's to what its k neighbours' partners say: chance 0.5."""


def compare(media: Sequence[Side], texts: Sequence[Side], sizes: Sizes = Sizes()) -> list[Alignment]:
    """All measures of every pair of a media and a text side over the same N rows. Raises SelectError.

    Every row of every side is read four times in all, `block` or `batch` at a time.
    """
    sides = [*media, *texts]
    rows, least = len(sides[0]), max(4, sizes.neighbours + 2)
    if rows < least:
        raise SelectError(f"{rows} rows are too few: k {sizes.neighbours} needs {least}")
    with tqdm(total=rows * (2 + 2 * len(sides)), desc="compare", unit="row", unit_scale=True) as bar:
        linear = _linear(media, texts, sizes, bar)
        radial = _radial(sides, sizes, bar)
        queries = drawn(rows, sizes)
        near = [nearest(side, queries, sizes, bar) for side in sides]
        left_out = _left_out(sides, len(media), queries, near, sizes, bar)
    return [
        Alignment(
            media=first.name,
            text=second.name,
            cka=float(linear[i, j]),
            rbf_cka=float(radial[i, len(media) + j]),
            mutual_knn=overlap(near[i].rows, near[len(media) + j].rows),
            loo_knn=float(left_out[i, j]),
        )
        for i, first in enumerate(media)
        for j, second in enumerate(texts)
    ]


def accuracy(side: Side, labels: Rows, sizes: Sizes = Sizes()) -> float:
    """Leave-one-out kNN: share of the queries whose neighbours' vote is their label; `labels` (N,) per row."""
    queries = drawn(len(side), sizes)
    with tqdm(total=len(side), desc=f"vote {side.name}", unit="row", unit_scale=True) as bar:
        near = nearest(side, queries, sizes, bar)
    return float((vote(labels[near.rows]) == labels[queries]).mean())


def drawn(rows: int, sizes: Sizes) -> Rows:
    """The queries: all rows, or so many at random, in order."""
    if rows <= sizes.queries:
        return np.arange(rows)
    return np.sort(np.random.default_rng(sizes.seed).choice(rows, sizes.queries, replace=False))


@dataclass(frozen=True)
class Nearest:
    rows: Rows
    """(q, k): every query's nearest other rows by cosine, nearest first."""
    mean: Floats
    """(d,): of all rows' directions."""


def nearest(side: Side, queries: Rows, sizes: Sizes, bar: Bar) -> Nearest:
    """Neighbours of `queries` among all rows but themselves, in one pass. Raises SelectError."""
    asked = side.directions(queries)
    best = np.zeros((len(queries), 0), np.float32), np.zeros((len(queries), 0), np.int64)
    total = np.zeros(asked.shape[1])
    for index in blocks(len(side), sizes.block):
        directions = side.directions(index)
        total += directions.sum(0, dtype=np.float64)
        scores = asked @ directions.T
        scores[queries[:, None] == index] = -np.inf
        best = nearer(scores, index, best, sizes.neighbours)
        bar.update(len(index))
    order = np.lexsort((best[1], -best[0]))
    return Nearest(np.take_along_axis(best[1], order, 1), (total / len(side)).astype(np.float32))


def _linear(media: Sequence[Side], texts: Sequence[Side], sizes: Sizes, bar: Bar) -> Doubles:
    """Debiased linear CKA (media, texts)."""
    sides = [*media, *texts]
    first = next(blocks(len(sides[0]), sizes.block))
    origins = [side.rows(first).mean(0, dtype=np.float64) for side in sides]
    texts_from = len(media)
    which = [(i, i) for i in range(len(sides))]
    which += [(i, j) for i in range(texts_from) for j in range(texts_from, len(sides))]
    moments = {(i, j): Moments((origins[i], origins[j])) for i, j in which}
    for index in blocks(len(sides[0]), sizes.block):
        values = [side.rows(index) for side in sides]
        for side, rows_of in zip(sides, values, strict=True):
            if not np.isfinite(rows_of).all():
                raise SelectError(f"the features of {side.name} hold NaN or infinity")
        for (i, j), sums in moments.items():
            sums.add(values[i], values[j])
        bar.update(len(index))
    own_hsic = [moments[i, i].hsic() for i in range(len(sides))]
    _refuse_constant(sides, own_hsic)
    return np.array(
        [
            [moments[i, j].hsic() / np.sqrt(own_hsic[i] * own_hsic[j]) for j in range(texts_from, len(sides))]
            for i in range(texts_from)
        ]
    )


def _radial(sides: Sequence[Side], sizes: Sizes, bar: Bar) -> Doubles:
    """Debiased CKA of RBF kernels (sides, sides): HSIC of all sides in each batch is one product of centred kernels."""
    count = len(sides[0])
    order = np.random.default_rng(sizes.seed).permutation(count)
    widths = [_WIDTH * median_distance(side.rows(order[:_MEDIAN_ROWS])) for side in sides]
    for side, width in zip(sides, widths, strict=True):
        if width == 0:
            raise SelectError(f"{side.name} gives most items one vector: it has no distance to set a kernel's width by")
    total = np.zeros((len(sides), len(sides)))
    batches = np.array_split(order, max(1, count // sizes.batch))
    for batch in batches:
        n = len(batch)
        kernels = [u_centred(rbf_kernel(side.rows(batch), w)) for side, w in zip(sides, widths, strict=True)]
        stacked = np.stack([kernel.ravel() for kernel in kernels])
        total += (stacked @ stacked.T).astype(np.float64) / (n * (n - 3)) / len(batches)
        bar.update(n)
    _refuse_constant(sides, list(total.diagonal()))
    spread = np.sqrt(total.diagonal())
    return total / (spread[:, None] * spread)


def _left_out(
    sides: Sequence[Side], media: int, queries: Rows, near: Sequence[Nearest], sizes: Sizes, bar: Bar
) -> Doubles:
    """Leave-one-out kNN (media, texts), mean of the two directions.

    A query's k neighbours on one side predict its other side: the mean of their partners' centred directions. Counted
    is how many of all other rows are less like that prediction than the query's own partner; ties count half.
    """
    wins = np.zeros((media, len(sides) - media))
    for t, target in enumerate(sides):
        sources = range(media, len(sides)) if t < media else range(media)
        centre = near[t].mean
        truth = target.directions(queries) - centre
        predicted = [_predicted(target, centre, near[source].rows) for source in sources]
        true_scores = [(prediction * truth).sum(1, keepdims=True) for prediction in predicted]
        for index in blocks(len(target), sizes.block):
            gallery = target.directions(index) - centre
            others = queries[:, None] != index
            for source, prediction, score in zip(sources, predicted, true_scores, strict=True):
                scores = prediction @ gallery.T
                won = ((scores < score) & others).sum() + 0.5 * ((scores == score) & others).sum()
                wins[(t, source - media) if t < media else (source, t - media)] += won
            bar.update(len(index))
    return wins / (2 * len(queries) * (len(sides[0]) - 1))


def _predicted(target: Side, centre: Floats, near: Rows) -> Floats:
    """Mean centred direction (q, d) of the rows (q, k), a few queries at a time."""
    return np.concatenate(
        [
            target.directions(part.ravel()).reshape(*part.shape, -1).mean(1) - centre
            for part in np.array_split(near, max(1, len(near) // 256))
        ]
    )


def _refuse_constant(sides: Sequence[Side], variances: Sequence[float]) -> None:
    for side, hsic in zip(sides, variances, strict=True):
        if not hsic > 0:
            raise SelectError(f"{side.name} gives every item nearly the same vector: nothing can be aligned with it")
