"""Exact nearest neighbours in memory, one index per collection, derived from the rows in SQLite."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import faiss
import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors

Keys = NDArray[np.int64]


class ReadWriteLock:
    """Any number of readers, or one writer; a waiting writer goes before new readers, so searches cannot starve it."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._writing = False
        self._writers_waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._writing and not self._writers_waiting)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        with self._condition:
            self._writers_waiting += 1
            self._condition.wait_for(lambda: not self._writing and not self._readers)
            self._writers_waiting -= 1
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()


class Index:
    """The vectors of one collection under their row keys.

    One flat index per modality: a search restricted to a modality scans only that part, and is still exact.
    Searches and changes may come from any thread.
    """

    kind = "flat"

    def __init__(self, dimensions: int, parts: dict[str, faiss.IndexIDMap] | None = None) -> None:
        self._dimensions = dimensions
        self._parts = parts or {}
        self._lock = ReadWriteLock()

    def put(self, modality: str, keys: Keys, vectors: Vectors, replaced: Keys) -> None:
        """Set the vectors (N, D) of N distinct keys in one step; `replaced` are those keys that were held before."""
        with self._lock.writing():
            self._remove(replaced)
            part = self._parts.get(modality)
            if part is None:
                part = self._parts[modality] = faiss.IndexIDMap(faiss.IndexFlatIP(self._dimensions))
            part.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), keys)

    def remove(self, keys: Keys) -> None:
        with self._lock.writing():
            self._remove(keys)

    def _remove(self, keys: Keys) -> None:
        for part in self._parts.values():
            if part.ntotal and keys.size:
                part.remove_ids(faiss.IDSelectorBatch(keys))

    def keys(self) -> Keys:
        """Every key held, sorted."""
        with self._lock.reading():
            held = [faiss.vector_to_array(part.id_map) for part in self._parts.values()]
        return np.sort(np.concatenate([np.empty(0, np.int64), *held]))

    def search(
        self, queries: Vectors, count: int, modalities: Sequence[str] | None = None, among: Keys | None = None
    ) -> list[list[tuple[int, float]]]:
        """The `count` best (key, inner product) for each of the queries (Q, D), best first, exactly.

        `among` restricts the search to these keys. Equal scores come in the order of the keys.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if among is not None and among.size == 0:
            return [[] for _ in queries]
        # The selector travels with the call: searches with different filters run at once over the same index.
        parameters = None
        if among is not None:
            selector = faiss.IDSelectorBatch(among)
            parameters = faiss.SearchParameters()
            parameters.sel = selector
        found_scores: list[NDArray[np.float32]] = []
        found_keys: list[Keys] = []
        with self._lock.reading():
            for modality, part in self._parts.items():
                if part.ntotal and (modalities is None or modality in modalities):
                    scores, keys = part.search(queries, min(count, part.ntotal), params=parameters)
                    found_scores.append(scores)
                    found_keys.append(keys)
        if not found_keys:
            return [[] for _ in queries]
        scores, keys = np.concatenate(found_scores, axis=1), np.concatenate(found_keys, axis=1)
        results = []
        for row_scores, row_keys in zip(scores, keys, strict=True):
            order = np.lexsort((row_keys, -row_scores))
            order = order[row_keys[order] >= 0][:count]  # FAISS fills missing places with -1
            results.append(list(zip(row_keys[order].tolist(), row_scores[order].tolist(), strict=True)))
        return results

    @contextmanager
    def frozen(self) -> Iterator[dict[str, faiss.IndexIDMap]]:
        """The parts by modality, unchanged until the block ends."""
        with self._lock.reading():
            yield dict(self._parts)
