"""Chance is measured by how well a bank of queries fits the items of a collection.

A sample of each part's vectors is compared with the bank, and what is kept of it is one number for each query, so that
a search pays little for it. They are taken anew once the part has changed by an eighth.
"""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors
from service.store.index import View
from service.store.rows import SlotReader

SAMPLE = 1_024
"""Items of a modality that are compared with the bank."""
_NEAREST, _EVERY = 8, 4
"""An item's rivals are the mean of so many nearest of every fourth query of the bank."""


@dataclass(frozen=True)
class Background:
    """Says how well the queries of a bank fit the items of one modality."""

    count: int
    """Number of the items, moments included."""
    best: NDArray[np.float32]
    """For each query of the bank (Q,), the best fit to an item of the sample."""
    sample: int
    """Number of items in the sample."""
    growth: float
    """How much better the best fit becomes where there are e times as many items."""

    @property
    def fits(self) -> NDArray[np.float32]:
        """Return for each query of the bank (Q,) the best fit to be expected among all the items."""
        return self.best + np.float32(self.growth * math.log(max(1.0, self.count / self.sample)))


@dataclass(frozen=True)
class _Kept:
    rows: int
    dead: int
    queries: Vectors
    background: Background


class Backgrounds:
    """Keeps the backgrounds of a store's parts. Any thread may ask."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], _Kept] = {}
        self._changing = threading.Lock()

    def forget(self, collection: int) -> None:
        with self._changing:
            self._kept = {part: kept for part, kept in self._kept.items() if part[0] != collection}

    def of(
        self, collection: int, views: Mapping[str, View], queries: Vectors, reader: SlotReader
    ) -> dict[str, Background]:
        """Return, by modality, the background of every part of a collection that holds something."""
        backgrounds = {}
        for modality, view in views.items():
            living = view.count - view.dead
            if not living:
                continue
            last = self._kept.get((collection, modality))
            changes = 0 if last is None else abs(view.count - last.rows) + abs(view.dead - last.dead)
            if last is None or last.queries is not queries or changes > last.rows / 8:
                last = _Kept(view.count, view.dead, queries, _measured(view, queries, reader))
                with self._changing:
                    self._kept[collection, modality] = last
            backgrounds[modality] = replace(last.background, count=living)
        return backgrounds


def together(
    of_items: Mapping[str, Background], of_moments: Mapping[str, Background] | None = None
) -> dict[str, Background]:
    """Return the backgrounds of items and of their moments as one: an item fits as well as its best moment does."""
    joint = dict(of_items)
    for modality, moments in (of_moments or {}).items():
        items = of_items.get(modality)
        if items is None:
            joint[modality] = moments
            continue
        count = items.count + moments.count
        joint[modality] = Background(count, np.maximum(items.fits, moments.fits), count, 0.0)
    return joint


def _measured(view: View, queries: Vectors, reader: SlotReader) -> Background:
    rows = np.flatnonzero(view.alive)
    if len(rows) > SAMPLE:
        rows = rows[np.unique(np.random.default_rng(0).integers(0, len(rows), SAMPLE))]
    return measured(queries, reader.vectors(view.slots[rows])[1])


def rivals(queries: Vectors, vectors: Vectors) -> NDArray[np.float32]:
    """Return how similar the best of a bank's queries (Q, D) are to each item (N, D): a fit is measured by it (N,)."""
    scores = vectors @ queries[::_EVERY].T
    nearest = min(_NEAREST, scores.shape[1])
    mean: NDArray[np.float32] = np.partition(scores, -nearest, axis=1)[:, -nearest:].mean(axis=1)
    return mean


def measured(queries: Vectors, vectors: Vectors) -> Background:
    """Return the background of items with these vectors (N, D): a query of the bank is no rival of itself."""
    scores = queries @ vectors.T
    scores_of_rivals = scores[::_EVERY]
    nearest = min(_NEAREST, len(scores_of_rivals) - 1)
    top = np.sort(np.partition(scores_of_rivals, -nearest - 1, axis=0)[-nearest - 1 :], axis=0)
    total = top[1:].sum(axis=0)
    fits = scores - total / nearest
    fits[::_EVERY] -= np.where(scores_of_rivals >= top[1], (top[0] - scores_of_rivals) / nearest, 0)
    best, part = fits.max(axis=1), fits[:, ::4]
    more = math.log(fits.shape[1] / part.shape[1])
    growth = float((best - part.max(axis=1)).mean()) / more if more else 0.0
    return Background(len(vectors), best, len(vectors), growth)
