"""How alike the items of a collection are to queries that mean nothing: what chance gives.

A sample of each part's vectors is compared with background queries, and what is kept of it are three numbers, so that a
search pays nothing for them. They are taken anew once the part has changed by an eighth.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from service.contract.vectors import Vectors
from service.store.index import View
from service.store.rows import SlotReader

SAMPLE = 512
"""Items of a modality that are compared with the background queries."""
LEAST = 16
"""Fewer items than this say nothing about chance."""


@dataclass(frozen=True)
class Background:
    """Similarities of background queries to the items of one modality."""

    count: int
    """Number of the items, moments included."""
    centre: float
    """Median similarity."""
    spread: float
    """Standard deviation, of those below the median: above it some are alike for a reason."""


@dataclass(frozen=True)
class _Kept:
    rows: int
    dead: int
    queries: Vectors
    background: Background


class Backgrounds:
    """The backgrounds of a store's parts. Any thread may ask."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, str], _Kept] = {}
        self._changing = threading.Lock()

    def forget(self, collection: int) -> None:
        with self._changing:
            self._kept = {part: kept for part, kept in self._kept.items() if part[0] != collection}

    def of(
        self, collection: int, views: Mapping[str, View], queries: Vectors, reader: SlotReader
    ) -> dict[str, Background]:
        """Return, by modality, the background of every part of a collection that has enough items."""
        backgrounds = {}
        for modality, view in views.items():
            living = view.count - view.dead
            if living < LEAST:
                continue
            stored = self._kept.get((collection, modality))
            changed = 0 if stored is None else abs(view.count - stored.rows) + abs(view.dead - stored.dead)
            if stored is None or stored.queries is not queries or changed > stored.rows / 8:
                stored = _Kept(view.count, view.dead, queries, _measured(view, queries, reader))
                with self._changing:
                    self._kept[collection, modality] = stored
            centre, spread = stored.background.centre, stored.background.spread
            backgrounds[modality] = Background(living, centre, spread)
        return backgrounds


def together(
    of_items: Mapping[str, Background], of_moments: Mapping[str, Background] | None = None
) -> dict[str, Background]:
    """Return the backgrounds of items and of their moments as one: an item is as alike as its best moment is."""
    merged = dict(of_items)
    for modality, moments in (of_moments or {}).items():
        items = of_items.get(modality, moments)
        count = moments.count + (items.count if modality in of_items else 0)
        share = moments.count / count
        merged[modality] = Background(
            count,
            share * moments.centre + (1 - share) * items.centre,
            share * moments.spread + (1 - share) * items.spread,
        )
    return merged


def _measured(view: View, queries: Vectors, reader: SlotReader) -> Background:
    rows = np.flatnonzero(view.alive)
    if len(rows) > SAMPLE:
        rows = rows[np.unique(np.random.default_rng(0).integers(0, len(rows), SAMPLE))]
    return measured(queries, reader.vectors(view.slots[rows])[1])


def measured(queries: Vectors, vectors: Vectors) -> Background:
    """Return the background of items with these vectors (N, D)."""
    scores = queries @ vectors.T
    centre = float(np.median(scores))
    below = scores[scores < centre] - centre
    return Background(len(vectors), centre, float(np.sqrt(np.mean(below**2))) if below.size else 0.0)
