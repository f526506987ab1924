"""A map shows a collection's vectors in the plane, for people to look at. What is near is about the same.

Laid out as UMAP does (McInnes, Healy and Melville, 2018): every item is drawn to its nearest neighbours and pushed from
others at random, from its principal components on. Two things are our own. Vectors of an image and of a text lie apart
as wholes (the modality gap), so each modality is centred first, and an item has neighbours in every modality: a map of
sounds beside a map of pictures would not show what this space is for. And each step moves all items at once, as arrays.

Of 1,309 pictures of Caltech101 beside 400 sounds, 38 % of a picture's ten nearest on the map are of its class; 8 % by
principal components alone, 41 % by scikit-learn's t-SNE, which takes four times as long and keeps the modalities apart
(docs/LOG.md).
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import faiss
import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors
from service.errors import DeadlineExceeded, NotReady, Overloaded
from service.retrieval.single_flight import Shared
from service.runtime.workers import Workers, stop_if_abandoned
from service.store import Item, Store

MOST_POINTS = 5_000
"""Largest number of points of a map, the same for every request, so that a collection has one map."""
_MOST_MAPS = 4
"""Number of collections whose maps are kept."""
_MOST_KEYS = 32

_FEWEST = 24
"""Smallest number of items for a map of neighbourhoods: with fewer, the map is their principal components."""
_OWN, _OTHER = 15, 3
"""Neighbours in an item's own modality, and in each other one."""
_A, _B = 1.895, 0.8006
"""UMAP's curve 1 / (1 + a d^2b) for a least distance of 0.01."""
_STEPS = 300
_PUSHES = 15
"""Number of random items that push an item at each step."""
_PUSH = 5.0
_FARTHEST = 4.0
"""Largest pull or push of one item on another."""

Places = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """An item on a map."""

    id: str
    modality: str
    labels: Mapping[str, str]
    """Labels by metadata key."""


@dataclass(frozen=True)
class Map:
    points: Sequence[Point]
    places: Places
    """Places (N, 2), each coordinate from -1 to 1."""
    count: int
    """Number of items in the collection, of which the map has a sample."""
    keys: Sequence[str]
    """Metadata keys that can label points, most frequent first."""

    def of_at_most(self, limit: int) -> "Map":
        """Return the map of a sample of its points, the same ones each time, where there are more."""
        if limit >= len(self.points):
            return self
        places = np.sort(np.random.default_rng(0).choice(len(self.points), limit, replace=False))
        return replace(self, points=[self.points[place] for place in places.tolist()], places=self.places[places])


def layout(vectors: Vectors, groups: Sequence[str], seed: int = 0) -> Places:
    """Place unit vectors (N, D) of N groups in the square from -1 to 1, as (N, 2). Equal inputs give equal places."""
    names = np.asarray(groups)
    around = centred(vectors, names)
    places = components(around)
    if len(places) >= _FEWEST:
        places = _settled(places, *_neighbours(around, names), np.random.default_rng(seed))
        places -= (places.max(axis=0) + places.min(axis=0)) / 2
    return places / max(float(np.abs(places).max(initial=0.0)), 1e-12)


def centred(vectors: Vectors, groups: NDArray[np.str_]) -> Vectors:
    """Centre each group on its own mean, and scale to unit length."""
    around = vectors.astype(np.float32)
    for name in np.unique(groups):
        members = groups == name
        # The mean of a small group is not meaningful: subtracting it would leave almost nothing of the group.
        if np.count_nonzero(members) > 2:
            around[members] -= around[members].mean(axis=0)
    around /= np.maximum(np.linalg.norm(around, axis=1, keepdims=True), 1e-12)
    return around


def components(vectors: Vectors) -> Places:
    """Return the first two principal components (N, 2). The longest coordinate along each is positive, so that a map
    does not turn over when an item is added."""
    if len(vectors) < 2:
        return np.zeros((len(vectors), 2))
    around = vectors.astype(np.float64)
    around -= around.mean(axis=0)
    _, axes = np.linalg.eigh(around.T @ around)
    places = around @ axes[:, -1:-3:-1]
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))  # a space of one dimension
    farthest = places[np.abs(places).argmax(axis=0), [0, 1]]
    return np.asarray(places * np.where(farthest < 0, -1.0, 1.0))


def _neighbours(vectors: Vectors, groups: NDArray[np.str_]) -> tuple[NDArray[np.int64], NDArray[np.int64], Places]:
    """Return pairs of neighbours (E,), (E,) and the strengths of their bonds (E,), 0 to 1."""
    where = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    pairs, weights = [], []
    for first in where:
        for second in where:
            same = first is second
            # With few items, take few neighbours: otherwise every item would be a neighbour of every other.
            count = min(_OWN if same else _OTHER, max(1, len(second) // 5), len(second) - same) + same
            if count <= same:
                continue
            near, neighbours = faiss.knn(vectors[first], vectors[second], count, metric=faiss.METRIC_INNER_PRODUCT)
            heads, tails = np.broadcast_to(first[:, None], neighbours.shape), second[neighbours]
            is_other = heads != tails
            apart = np.where(is_other, near.max(axis=1, where=is_other, initial=-1, keepdims=True) - near, 0)
            spread = apart.sum(axis=1, keepdims=True) / np.maximum(is_other.sum(axis=1, keepdims=True), 1)
            pairs.append((heads * len(vectors) + tails)[is_other])
            weights.append(np.exp(-np.maximum(apart, 0) / np.maximum(spread, 1e-9))[is_other])
    heads, tails = np.divmod(np.concatenate(pairs), len(vectors))
    ordered = np.minimum(heads, tails) * len(vectors) + np.maximum(heads, tails)
    unique, place = np.unique(ordered, return_inverse=True)
    # Either of the two may call the other its neighbour: 1 - (1 - w)(1 - w').
    strengths = 1 - np.exp(np.bincount(place, np.log1p(-0.999 * np.concatenate(weights))))
    return unique // len(vectors), unique % len(vectors), strengths


def _settled(
    start: Places, heads: NDArray[np.int64], tails: NDArray[np.int64], weights: Places, random: np.random.Generator
) -> Places:
    count = len(start)
    # Add a tiny noise: otherwise identical items are in one place, and nothing moves them apart.
    places = start * (3 / max(float(start.std()), 1e-12)) + random.normal(0, 1e-3, start.shape)
    degree = np.bincount(heads, weights, count) + np.bincount(tails, weights, count)
    pushed = np.repeat(np.arange(count), _PUSHES)
    for step in range(_STEPS):
        stop_if_abandoned()
        between = places[heads] - places[tails]
        square = np.maximum((between**2).sum(axis=1), 1e-12)
        strength = 2 * _A * _B * square ** (_B - 1) / (1 + _A * square**_B) * weights
        pull = np.clip(strength[:, None] * between, -_FARTHEST, _FARTHEST)
        pushers = random.integers(0, count, len(pushed))
        between = places[pushed] - places[pushers]
        square = (between**2).sum(axis=1)
        strength = 2 * _B / ((0.001 + square) * (1 + _A * square**_B))
        push = np.clip(strength[:, None] * between, -_FARTHEST, _FARTHEST).reshape(count, _PUSHES, 2).mean(axis=1)
        force = _PUSH * degree[:, None] * push
        for axis in (0, 1):
            force[:, axis] += np.bincount(tails, pull[:, axis], count) - np.bincount(heads, pull[:, axis], count)
        calm = (1 - step / _STEPS) / np.sqrt(1 + degree)
        places += np.clip(calm[:, None] * force, -2, 2)
    return places


class Maps:
    """Maps of a store's collections. One is computed at a time, in a thread of its own, once per state of the store.

    It is given up when the last who waits for it goes away. Who has waited for `wait_s` is answered with
    DeadlineExceeded, and then it is made all the same, for who asks again.
    """

    def __init__(self, store: Store, wait_s: float | None = None) -> None:
        self._store, self._wait_s = store, wait_s
        self._thread = Workers("map")
        self._made: dict[str, tuple[str, Map]] = {}
        self._making: tuple[tuple[str, str], Shared[Map]] | None = None
        """The collection and the version of it that a map is being made of, and the map."""
        self._seconds = 1.0
        """Duration of the last map, in seconds."""
        self._closed = False

    async def map(self, collection: str, limit: int) -> Map:
        """Return a map of at most `limit` items, the same ones until something is written.

        Raises NotFound, Overloaded while another map is being made, DeadlineExceeded, and NotReady after close.
        """
        version = await self._store.version(collection)
        made_from, latest = self._made.get(collection, (None, None))
        if latest is None or made_from != version:
            latest = await self._awaited(collection, version)
        return latest.of_at_most(limit)

    def close(self) -> None:
        """Answer everyone who waits for a map with NotReady."""
        self._closed = True
        if self._making is not None:
            self._making[1].task.cancel()
        self._thread.close(wait=False)

    async def _awaited(self, collection: str, version: str) -> Map:
        if self._making is None or self._making[1].given_up:
            self._making = (collection, version), Shared(self._make(collection, version))
        elif self._making[0] != (collection, version):
            raise Overloaded(
                "another map is being made, and they are made one at a time",
                retry_after_s=max(1, math.ceil(self._seconds)),
            )
        try:
            return await self._making[1].outcome(self._wait_s)
        except TimeoutError:
            raise DeadlineExceeded("the map is still being made: ask for it again in a while") from None

    async def _make(self, collection: str, version: str) -> Map:
        began = time.monotonic()
        try:
            items, count = await self._store.sample(collection, MOST_POINTS)
            result = await self._thread.run(lambda: _mapped(items, count))
        except asyncio.CancelledError:
            if self._closed:
                raise NotReady("the server is shutting down") from None
            raise
        self._seconds = time.monotonic() - began
        self._made.pop(collection, None)
        self._made[collection] = version, result
        while len(self._made) > _MOST_MAPS:
            self._made.pop(next(iter(self._made)))
        return result


def _mapped(items: Sequence[Item], count: int) -> Map:
    vectors = [item.vector for item in items if item.vector is not None]
    stacked = np.stack(vectors) if vectors else np.empty((0, 2), np.float32)
    places = layout(stacked, [item.modality for item in items])
    points = [Point(item.id, item.modality, _labels(item.metadata)) for item in items]
    counts = Counter(key for point in points for key in point.labels)
    return Map(points, places, count, [key for key, _ in counts.most_common(_MOST_KEYS)])


def _labels(metadata: Mapping[str, object]) -> dict[str, str]:
    labels = ((key, label(metadata, key)) for key in metadata)
    return {key: text for key, text in labels if text is not None}


def label(metadata: Mapping[str, object], key: str) -> str | None:
    """Return a value that can be a point's label: a text, a number or a truth value."""
    value = metadata.get(key)
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)[:80] if isinstance(value, str | int | float) else None
