"""Judgements of results teach the searches of a collection: they learn a head of low rank, which moves queries.

A query q moves by Σ w_c(q) s_c over the judged queries c, and stored vectors stay as they are. Both factors are
regularised least squares in closed form:

- The shift s_c gives what is relevant the score of the best items and what is not the score of an average one, while
  the scores of a sample of the collection's items are to stay. It is no longer than a query is.
- The weights w_c give each judged query 1 for itself, and 0 for the others and for a guard: a bank of everyday queries,
  bare and in the bundle's templates. What a weight still gives to any query of the guard is then taken off it, and the
  weights of a query add up to 1 at most.

So whatever was judged, no query of the guard moves that is not like a judged one itself.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial, wraps
from time import monotonic
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Manifest
from service.contract.vectors import Vectors, l2_normalise
from service.engine.embedder import Embedder
from service.errors import InvalidRequest, NotFound
from service.retrieval.chance import background_texts, text_vectors
from service.retrieval.single_flight import SingleFlight
from service.schemas.feedback import MOST_JUDGEMENTS, MOST_QUERIES
from service.store import Item, Store
from service.store.schema import now

P = ParamSpec("P")
T = TypeVar("T")

MOST_VERSIONS = 20
"""Largest number of versions of a collection: of more, the oldest that is not in use is deleted."""
SAME = 0.63
"""Cosine similarity, where that of unrelated queries is 0, from which on a query of the guard is a judged query in
other words. This and the constants of `fit` are chosen on ESC-50's folds 1 and 2 and on Caltech101's training
photographs (docs/LOG.md)."""

_REPEATED = 0.99
"""Cosine similarity from which on a query is one that was judged before."""
_SAMPLE = 1_024
_BEST, _MARGIN = 5, 0.1
"""What is relevant is to score more than the mean of so many best, by so much."""
_FEATURES, _BANK, _MIXED = 10.0, 1.0, 0.01
"""Penalties, relative to a mean variance: of a shift, of the weights, and of the weights' being 1 and 0."""
RECORDS = ".feedback/"
"""Beginning of the names of records: no name that a client may give begins with a dot."""
_RECHECKED_S, _REMEMBERED = 5.0, 256
"""Seconds after which the record is looked up again where other processes share the store; and of how many collections
it is kept."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Judgement:
    """A query as a unit vector (D,), and the ids of items that were found for it."""

    query: Vectors
    relevant: Sequence[str]
    not_relevant: Sequence[str]


@dataclass(frozen=True)
class Judged:
    """The judgements of a version: of queries (C, D) and of items (N, D), each of which names its query."""

    queries: Vectors
    items: Vectors
    ids: Sequence[str]
    modalities: Sequence[str]
    owners: Sequence[int]
    relevant: Sequence[bool]

    def with_more(self, judgements: Sequence[Judgement], items: dict[str, Item]) -> "Judged":
        """Return these judgements and newer ones, which count where both are of the same query and item."""
        queries = list(self.queries)
        rows = dict(zip(zip(self.owners, self.ids, strict=True), self._rows(), strict=True))
        for judgement in judgements:
            alike = [float(query @ judgement.query) for query in queries]
            owner = int(np.argmax(alike)) if alike and max(alike) >= _REPEATED else len(queries)
            queries += [judgement.query] * (owner == len(queries))
            for ids, relevant in ((judgement.relevant, True), (judgement.not_relevant, False)):
                for id in ids:
                    vector = items[id].vector
                    assert vector is not None
                    rows[owner, id] = (vector, items[id].modality, relevant)
        vectors, modalities, verdicts = zip(*rows.values(), strict=True)
        owners, ids = zip(*rows, strict=True)
        return Judged(np.stack(queries), np.stack(vectors), ids, modalities, owners, verdicts)

    def _rows(self) -> list[tuple[Vectors, str, bool]]:
        return list(zip(self.items, self.modalities, self.relevant, strict=True))


@dataclass(frozen=True)
class Head:
    """Moves queries by keys (C, D) and floors (C,), which make the weights of a query, and shifts (C, D)."""

    keys: Vectors
    floors: Vectors
    shifts: Vectors

    def weights(self, queries: Vectors) -> Doubles:
        """Return the weights (Q, C) of the shifts for unit vectors (Q, D): 0 to 1, and 1 at most together."""
        weights = np.clip(queries.astype(np.float64) @ self.keys.T - self.floors, 0, 1)
        return np.asarray(weights / np.maximum(1, weights.sum(axis=1, keepdims=True)))

    def moved(self, queries: Vectors) -> Vectors:
        """Return unit vectors (Q, D) as they are to be searched with; what the head does not concern stays exact."""
        weights = self.weights(queries)
        concerned = weights.any(axis=1)
        result = queries.copy()
        if concerned.any():
            result[concerned] = l2_normalise(queries[concerned] + weights[concerned] @ self.shifts)
        return result


def fit(judged: Judged, sample: Sequence[Item], guard: Vectors) -> Head:
    """Return the head that judgements teach, for a collection of which these items are a sample."""
    queries, items = judged.queries.astype(np.float64), judged.items.astype(np.float64)
    kinds = np.array([*(item.modality for item in sample), *judged.modalities])
    vectors = np.stack([*(item.vector for item in sample if item.vector is not None), *judged.items]).astype(np.float64)
    middles = {kind: vectors[kinds == kind].mean(axis=0) for kind in set(kinds.tolist())}
    around = vectors - np.stack([middles[kind] for kind in kinds.tolist()])
    metric = np.linalg.inv(_penalised(around.T @ around / len(around), _FEATURES))
    owners, relevant = np.array(judged.owners), np.array(judged.relevant)
    shifts = np.zeros_like(queries)
    for place, query in enumerate(queries):
        rows = np.flatnonzero(owners == place).tolist()
        scores_by_kind = {kind: np.sort(vectors[kinds == kind] @ query) for kind in middles}
        best = np.array([scores_by_kind[judged.modalities[row]][-_BEST:].mean() + _MARGIN for row in rows])
        average = np.array([scores_by_kind[judged.modalities[row]].mean() for row in rows])
        scores = items[rows] @ query
        gains = np.where(relevant[rows], np.maximum(0, best - scores), np.minimum(0, average - scores))
        features = items[rows] - np.stack([middles[judged.modalities[row]] for row in rows])
        pull = metric @ features.T @ np.linalg.solve(features @ metric @ features.T + np.eye(len(rows)), gains)
        shifts[place] = pull / max(1.0, float(np.linalg.norm(pull)))
    keys, floors = _weights(queries, guard.astype(np.float64))
    return Head(*(np.asarray(array, np.float32) for array in (keys, floors, shifts)))


def _weights(queries: Doubles, guard: Doubles) -> tuple[Doubles, Doubles]:
    """Return keys (C, D) and floors (C,) of queries (C, D): key · query - floor is 1 for itself and at most 0 for what
    the guard (G, D) holds besides the queries."""
    middle = guard.mean(axis=0)
    unrelated = float(middle @ middle)  # what two queries have in common anyway: 0.8 and more in some spaces
    alike = ((guard @ queries.T).max(axis=1) - unrelated) / max(1 - unrelated, 1e-6)
    unlike = guard[alike < SAME]
    whitened = np.linalg.solve(_penalised(unlike.T @ unlike / max(1, len(unlike)), _BANK), queries.T)
    kernel = queries @ whitened
    keys = np.linalg.solve(_penalised(kernel, _MIXED), whitened.T)
    floors = np.maximum(0, unlike @ keys.T).max(axis=0, initial=0)
    room = (keys * queries).sum(axis=1) - floors
    safe = np.where(room > 0, room, np.inf)  # what the guard leaves no room for has no weight
    return keys / safe[:, None], floors / safe


def _penalised(square: Doubles, penalty: float) -> Doubles:
    return np.asarray(square + penalty * max(float(np.trace(square)) / len(square), 1e-12) * np.eye(len(square)))


@dataclass(frozen=True)
class Version:
    number: int
    created: str
    judgements: int
    queries: int


@dataclass(frozen=True)
class Versions:
    """Lists what a collection was taught, newest last, and names the version that its searches use."""

    current: int | None = None
    last: int = 0
    versions: tuple[Version, ...] = ()

    def get(self, number: int) -> Version:
        """Raises NotFound."""
        for version in self.versions:
            if version.number == number:
                return version
        raise NotFound(f"no version {number} of the feedback: GET /feedback lists those there are")


def _to_the_end(change: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Let a change end whose client goes away: searches must see what the store has."""

    @wraps(change)
    async def shielded(*args: P.args, **options: P.kwargs) -> T:
        return await asyncio.shield(change(*args, **options))

    return shielded


class Feedback:
    """Keeps the versions of each collection in the store: records like label sets, of names that no client can give."""

    def __init__(self, embedder: Embedder, store: Store) -> None:
        self._embedder, self._store = embedder, store
        self._guard: Vectors | None = None
        self._once = SingleFlight[Vectors]()
        self._heads: dict[str, tuple[float, Version | None, Head | None]] = {}
        """By collection: when it was looked up, the version in use and its head."""
        self._changes = 0
        self._locks = WeakValueDictionary[str, asyncio.Lock]()
        """By collection: who judges one does not keep others from changing theirs."""

    async def head(self, collection: str) -> tuple[int, Head] | None:
        """Return the version that searches of a collection use, and its head; None where there is none."""
        looked_up, version, head = self._heads.get(collection, (None, None, None))
        if looked_up is None or (self._store.shared and monotonic() - looked_up > _RECHECKED_S):
            changes, versions = self._changes, await self.versions(collection)
            # A version is told by its time, too: after all were deleted, numbers begin anew.
            current = None if versions.current is None else versions.get(versions.current)
            if current != version:
                try:
                    head = None if current is None else (await self._read(collection, current.number))[1]
                except NotFound:  # deleted between the two reads
                    return None
                version = current
            if changes == self._changes:  # else it is used once, and looked up again
                self._heads.pop(collection, None)
                self._heads[collection] = monotonic(), version, head
            while len(self._heads) > _REMEMBERED:
                self._heads.pop(next(iter(self._heads)))
        return None if version is None or head is None else (version.number, head)

    async def versions(self, collection: str) -> Versions:
        try:
            record = (await self._store.label_set(_record(collection))).definition
        except NotFound:
            return Versions()
        return Versions(record["current"], record["last"], tuple(Version(**version) for version in record["versions"]))

    @_to_the_end
    async def teach(self, collection: str, judgements: Sequence[Judgement]) -> tuple[Version, int]:
        """Make a version of the judgements and those of the current one, and use it. Return it, and how many of its
        queries cannot be told from those of the guard, so that nothing was learned from them.

        Raises NotFound (collection, item), InvalidRequest where it would be more than a version holds.
        """
        ids = {id for judgement in judgements for id in (*judgement.relevant, *judgement.not_relevant)}
        sample, _ = await self._store.sample(collection, _SAMPLE)
        items = {id: await self._store.get(collection, id, with_vector=True) for id in sorted(ids)}
        if self._guard is None:
            self._guard = await self._once(lambda: text_vectors(self._embedder, guard_texts(self._embedder.manifest)))
        guard = self._guard
        async with self._alone(collection):
            await self._store.collection(collection)  # it may have been dropped while the guard was embedded
            versions = await self.versions(collection)
            earlier = _NONE if versions.current is None else (await self._read(collection, versions.current))[0]
            judged = earlier.with_more(judgements, items)
            if len(judged.ids) > MOST_JUDGEMENTS or len(judged.queries) > MOST_QUERIES:
                raise InvalidRequest(
                    f"judgements: a version holds {MOST_JUDGEMENTS:,} items and {MOST_QUERIES} queries at most, with "
                    "those it is built on: go back to an earlier one (PUT /feedback) to build on that"
                )
            head = await self._embedder.in_worker(partial(fit, judged, sample, guard))
            await self._store.collection(collection)
            version = Version(versions.last + 1, now(), len(judged.ids), len(judged.queries))
            definition = {name: list(getattr(judged, name)) for name in ("ids", "modalities", "owners", "relevant")}
            definition["floors"] = head.floors.tolist()
            vectors = {"queries": judged.queries, "items": judged.items, "keys": head.keys, "shifts": head.shifts}
            await self._store.put_label_set(_record(collection, version.number), definition, vectors)
            history = [*versions.versions, version]
            oldest = next((candidate for candidate in history if candidate.number != versions.current), version)
            if len(history) > MOST_VERSIONS:
                history.remove(oldest)
            await self._write(collection, Versions(version.number, version.number, tuple(history)))
            if len(history) == MOST_VERSIONS and oldest not in history:
                await self._forget(_record(collection, oldest.number))
        learned = head.weights(judged.queries)[np.arange(version.queries), np.arange(version.queries)] > 0
        return version, int(np.count_nonzero(~learned))

    @_to_the_end
    async def use(self, collection: str, number: int | None) -> Versions:
        """Let searches use a version, or none. Raises NotFound."""
        async with self._alone(collection):
            await self._store.collection(collection)
            versions = await self.versions(collection)
            if number is not None:
                versions.get(number)
            versions = replace(versions, current=number)
            if versions.versions:
                await self._write(collection, versions)
        return versions

    @_to_the_end
    async def delete(self, collection: str, number: int | None = None) -> None:
        """Delete a version, or all; searches that used it use none. Raises NotFound where that version is not there."""
        async with self._alone(collection):
            versions = await self.versions(collection)
            deleted = versions.versions if number is None else (versions.get(number),)
            remaining = tuple(version for version in versions.versions if version not in deleted)
            current = versions.current if versions.current in {version.number for version in remaining} else None
            if remaining:
                await self._write(collection, Versions(current, versions.last, remaining))
            else:
                await self._forget(_record(collection))
                self._changed(collection)
            for version in deleted:
                await self._forget(_record(collection, version.number))

    def _alone(self, collection: str) -> asyncio.Lock:
        """Return the lock of a collection's versions, which is there for as long as somebody has it or waits for it."""
        return self._locks.setdefault(collection, asyncio.Lock())

    async def _write(self, collection: str, versions: Versions) -> None:
        await self._store.put_label_set(_record(collection), asdict(versions), {})
        self._changed(collection)

    def _changed(self, collection: str) -> None:
        self._changes += 1
        self._heads.pop(collection, None)

    async def _forget(self, record: str) -> None:
        with suppress(NotFound):
            await self._store.delete_label_set(record)

    async def _read(self, collection: str, number: int) -> tuple[Judged, Head]:
        record = await self._store.label_set(_record(collection, number))
        stored, vectors = record.definition, record.vectors
        lists = (stored[name] for name in ("ids", "modalities", "owners", "relevant"))
        judged = Judged(vectors["queries"], vectors["items"], *lists)
        return judged, Head(vectors["keys"], np.array(stored["floors"], np.float32), vectors["shifts"])


_EMPTY = np.empty((0, 0), np.float32)
_NONE = Judged(_EMPTY, _EMPTY, (), (), (), ())


def _record(collection: str, number: int | None = None) -> str:
    return f"{RECORDS}{collection}" + ("" if number is None else f"/{number}")


def guard_texts(manifest: Manifest) -> list[str]:
    """Return the queries of the guard: those of the bank, bare and in the bundle's first template of each modality."""
    templates = ["{}", *(of[0] for of in manifest.templates.values() if of)]
    return [template.replace("{}", text) for template in templates for text in background_texts()]
