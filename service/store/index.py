"""The vectors and metadata of one collection in memory, derived from the rows in SQLite.

A collection has a part per modality, so that a search for images alone costs what images cost. A part numbers its rows
in the order of their slots (the number that every write of a vector gets, and that is never used again). Rows
0 … n - 1 are in an index of the collection's kind once there is one; the rest, in blocks of plain vectors, are searched
one by one. A row that was deleted or replaced stays, dead, until the index is built anew.

Searches take no lock: they work on the views that were current when they began, and what a view shows never changes.
"""

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import Vectors
from service.runtime.workers import stop_if_abandoned
from service.store.columns import Columns, Growing, Marks, Mask, differing, marked
from service.store.filters import Filter
from service.store.kinds import Effort, IndexRequest, IndexSnapshot, IndexSpec, Keys, Rules, graph_rather_than_scan
from service.store.records import Records
from service.store.rows import SlotReader

_BLOCK = 2**22
"""Numbers in a block: 16 MiB."""
_TOGETHER = 8
"""Smallest number of queries for which FAISS searches with all cores."""
_MOST = 0.9
"""Share of an index's rows: a filter that lets more of them through is ignored while the graph is walked."""
_FEW = 1_024
"""Largest number of allowed rows whose stored vectors are all compared, in place of an index's codes."""
_MOST_EQUAL = 4_096
"""Largest number of rows of a block that are put in order because they are as near as the last of the results."""
_NOTHING = np.empty(0, np.int64)

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """Shows a part at one moment."""

    slots: Keys
    """Slots in ascending order."""
    marks: tuple[Mask, ...]
    """Which rows live, in blocks: see `alive`."""
    dead: int
    columns: Columns
    records: Records
    """Records by row; like the vectors, they may cover more rows than the view."""
    built: IndexSnapshot | None
    blocks: tuple[Vectors, ...]
    """The vectors (rows per block, D) of the rows after those of `built`, the last block not full."""

    @property
    def count(self) -> int:
        return len(self.slots)

    @property
    def indexed(self) -> int:
        return 0 if self.built is None else self.built.count

    @cached_property
    def alive(self) -> Mask:
        """Return which rows live."""
        return marked(self.marks, 0, self.count)

    def head(self, count: int) -> "View":
        """Return a view of the first rows, at most `count`."""
        alive = self.alive[:count]
        return replace(self, slots=self.slots[:count], dead=int(len(alive) - np.count_nonzero(alive)))


class Found(NamedTuple):
    slot: int
    score: float
    """Inner product."""
    modality: str
    record: bytes
    """Record of the item; empty where it is not in memory."""


class _Part:
    """Holds the mutable state that views are made of. It is used under the lock of its index."""

    def __init__(self, dimensions: int) -> None:
        self._dimensions = dimensions
        self._block_rows = max(64, _BLOCK // dimensions)
        self.slots = Growing(np.int64)
        self.alive = Marks()
        self.dead = 0
        self.columns = Columns()
        self.records = Records()
        self.built: IndexSnapshot | None = None
        self.blocks: list[Vectors] = []

    def append(self, slots: Keys, metadata: Sequence[Mapping[str, Any]], records: Sequence[bytes]) -> None:
        """Append rows whose vectors are stored next."""
        first = len(self.slots.held())
        self.columns.extend(range(first, first + len(metadata)), metadata)
        self.records.extend(records)
        self.slots.extend(slots)
        self.alive.extend(np.ones(len(slots), np.bool_))

    def begin(self, built: IndexSnapshot, slots: Keys) -> None:
        """Start from a built index, all of whose rows are dead until they are put."""
        self.built = built
        self.records.leave(len(slots))
        self.slots.extend(slots)
        self.alive.extend(np.zeros(len(slots), np.bool_))
        self.dead = len(slots)

    def store(self, vectors: Vectors, count: int) -> None:
        """Store the vectors of rows that follow `held` others in the blocks."""
        while len(vectors):
            place = count % self._block_rows
            if place == 0:
                self.blocks.append(np.empty((self._block_rows, self._dimensions), np.float32))
            chunk = vectors[: self._block_rows - place]
            self.blocks[-1][place : place + len(chunk)] = chunk
            count += len(chunk)
            vectors = vectors[len(chunk) :]

    def kill(self, slots: Keys) -> bool:
        """Return whether any was here."""
        own_slots = self.slots.held()
        rows = np.searchsorted(own_slots, slots)
        rows = rows[rows < len(own_slots)]
        rows = rows[np.isin(own_slots[rows], slots)]
        return self.end(np.unique(rows))

    def end(self, rows: Keys) -> bool:
        """Mark rows, ascending, as dead; return whether any of them lived."""
        ended = self.alive.set(rows, False)
        self.dead += ended
        return ended > 0

    def carry_over(self, kept: Keys | None, base: int, before: View, now: View, stored: int) -> int:
        """Add what was written between two views of another part, of whose first `base` rows this one has those that
        are `kept`, and all later ones; or, where that is None, the vectors alone. Return how many vectors the blocks
        have now, which was `stored`."""
        later = np.arange(before.count, now.count)
        if kept is not None:
            ended = differing(before.marks, now.marks, before.count)
            of_kept = ended[ended < base]
            places = np.searchsorted(kept, of_kept)
            is_there = places < len(kept)
            is_there[is_there] = kept[places[is_there]] == of_kept[is_there]
            first = len(self.slots.held())
            self.slots.extend(now.slots[later])
            self.alive.extend(alive := marked(now.marks, before.count, now.count))
            self.dead += len(later) - int(np.count_nonzero(alive))
            self.end(np.concatenate([places[is_there], ended[ended >= base] - base + len(kept)]))
            self.columns.append(now.columns, before.count, np.arange(first, first + len(later)))
            self.records.extend(now.records.get(later))
        for batch in _rest(now, before.count - now.indexed):
            self.store(batch, stored)
            stored += len(batch)
        return stored

    def view(self) -> View:
        blocks = tuple(self.blocks)
        return View(self.slots.held(), self.alive.held(), self.dead, self.columns, self.records, self.built, blocks)


class Index:
    """Holds the parts of one collection. Searches and changes may come from any thread."""

    def __init__(self, dimensions: int, request: IndexRequest | None = None) -> None:
        self.dimensions = dimensions
        self.index_request = request or IndexRequest()
        self._parts: dict[str, _Part] = {}
        self._views: Mapping[str, View] = {}
        self._changing = threading.Lock()

    def put(
        self,
        modality: str,
        slots: Keys,
        vectors: Vectors,
        metadata: Sequence[Mapping[str, Any]],
        records: Sequence[bytes],
        replaced: Keys = _NOTHING,
    ) -> None:
        """Add rows under new slots, greater than any before, in one step with the end of those they replace."""
        with self._changing:
            views = self._without(replaced)
            part = self._parts.setdefault(modality, _Part(self.dimensions))
            view = part.view()
            part.append(slots, metadata, records)
            part.store(vectors, view.count - view.indexed)
            self._views = {**views, modality: part.view()}

    def remove(self, slots: Keys) -> None:
        with self._changing:
            self._views = self._without(slots)

    def _without(self, slots: Keys) -> dict[str, View]:
        views = dict(self._views)
        for modality, part in self._parts.items():
            if slots.size and part.kill(slots):
                views[modality] = part.view()
        return views

    def load(self, modality: str, built: IndexSnapshot, slots: Keys, rows: tuple[Columns, Records] | None) -> None:
        """Begin a part with an index over these slots, perhaps with their metadata and records. They are dead until
        revive() marks the live ones."""
        part = self._parts[modality] = _Part(self.dimensions)
        part.begin(built, slots)
        if rows is not None:
            part.columns, part.records = rows
        self._views = {**self._views, modality: part.view()}

    def revive(
        self,
        modality: str,
        slots: Keys,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        records: Sequence[bytes] = (),
    ) -> Mask:
        """Mark slots, ascending, as live, with their metadata and records unless these are there; return which of them
        the index has."""
        part = self._parts.get(modality)
        part_slots = _NOTHING if part is None else part.slots.held()
        rows = np.searchsorted(part_slots, slots)
        is_known = rows < len(part_slots)
        is_known[is_known] = part_slots[rows[is_known]] == slots[is_known]
        if part is not None and is_known.any():
            part.alive.set(rows[is_known], True)
            part.dead -= int(np.count_nonzero(is_known))
            if metadata is not None:
                places = np.flatnonzero(is_known).tolist()
                part.columns.extend(rows[is_known].tolist(), [metadata[place] for place in places])
                part.records.set(rows[is_known], [records[place] for place in places])
            self._views = {**self._views, modality: part.view()}
        return is_known

    def slots(self, views: Mapping[str, View] | None = None) -> Keys:
        """Return every live slot of the current views or of the given ones, ascending."""
        live = [view.slots[view.alive] for view in (self._views if views is None else views).values()]
        return np.sort(np.concatenate([_NOTHING, *live]))

    def matching(self, filter: Filter, reader: SlotReader, views: Mapping[str, View] | None = None) -> Keys:
        """Return the slots whose metadata pass, ascending, of the views of now or of those given."""
        views = self._views if views is None else views
        selected = [view.slots[select(view, filter, reader)] for view in views.values()]
        return np.sort(np.concatenate([_NOTHING, *selected]))

    def views(self) -> Mapping[str, View]:
        return self._views

    def switch(
        self, modality: str, before: View, built: IndexSnapshot | None, vectors: Iterable[Vectors], kept: Keys | None
    ) -> None:
        """Serve the rows `kept` of the view `before`, in that order, or all of them, from a new index, or from vectors
        where it is None.

        What was added and removed since then is carried over. Only one thread may switch.
        """
        # What takes long is made before writes have to wait, and most of what was written meanwhile.
        new, kept = _Part(self.dimensions), None if kept is not None and len(kept) == before.count else kept
        new.built = built
        if kept is not None:
            numbers = np.full(before.count, -1, np.int64)
            numbers[kept] = np.arange(len(kept))
            new.columns, new.records = before.columns.kept(numbers), before.records.kept(kept)
            new.slots.extend(before.slots[kept])
            new.alive.extend(before.alive[kept])
            new.dead = len(kept) - int(np.count_nonzero(before.alive[kept]))
        stored = 0
        for batch in vectors if built is None else ():
            new.store(batch, stored)
            stored += len(batch)
        seen = self._views[modality]
        stored = new.carry_over(kept, before.count, before, seen, stored)
        with self._changing:
            old = self._parts[modality]
            new.carry_over(kept, before.count, seen, old.view(), stored)
            if kept is None:
                new.slots, new.alive, new.dead = old.slots, old.alive, old.dead
                new.columns, new.records = old.columns, old.records
            self._parts[modality] = new
            self._views = {**self._views, modality: new.view()}

    def search(
        self,
        queries: Vectors,
        count: int,
        reader: SlotReader,
        *,
        modalities: Sequence[str] | None = None,
        filter: Filter | None = None,
        effort: Effort | None = None,
        views: Mapping[str, View] | None = None,
        by_modality: bool = False,
    ) -> list[list[Found]]:
        """Return the `count` best for each of the queries (Q, D), best first, in these views or the present ones.

        Equal scores come in the order of the slots. With a filter there are as many as pass, up to `count`. With
        `by_modality` there are `count` of each modality, one after the other.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        # Set for this thread's searches alone. Few queries gain nothing from a second thread, and would wait for it.
        faiss.omp_set_num_threads(1 if len(queries) < _TOGETHER else os.cpu_count())
        effort = effort or Effort()
        views = self._views if views is None else views
        views = {name: view for name, view in views.items() if modalities is None or name in modalities}
        results = [
            (name, view, scores, rows)
            for name, view in views.items()
            for scores, rows in _search(view, queries, count, filter, effort, reader)
        ]
        parts = [[result for result in results if result[0] == name] for name in views] if by_modality else [results]
        return [[hit for part in parts for hit in _best(query, part, count)] for query in range(len(queries))]

    def behind(self, rules: Rules) -> bool:
        """Return whether more vectors wait in memory for an index than the rules allow."""
        for view in self._views.values():
            if view.count - view.indexed > rules.waiting_at_most:
                present = view.built.spec.kind if view.built else "flat"
                if rules.choose(self.index_request, view.count - view.dead, self.dimensions, present).kind != "flat":
                    return True
        return False

    def plan(self, rules: Rules) -> "tuple[str, View, IndexSpec, bool] | None":
        """Return a part whose index is to change, its view, the index to have, and whether adding to it does."""
        for modality, view in self._views.items():
            built, living = view.built, view.count - view.dead
            spec = rules.choose(self.index_request, living, self.dimensions, built.spec.kind if built else "flat")
            if built is None:
                if spec.kind == "hnsw":
                    return modality, view.head(rules.step), spec, False
                if spec.kind != "flat":
                    return modality, view, spec, False
                if view.dead > max(rules.dead_share * view.count, rules.graph_from) or view.dead == view.count > 0:
                    return modality, view, spec, False  # without those that are gone
                continue
            many = max(rules.dead_share * built.count, rules.graph_from)
            dead = view.dead if view.dead <= many else built.count - np.count_nonzero(view.alive[: built.count])
            trained = built.spec.kind != "hnsw" or built.spec.precision == "int8"
            outgrown = trained and living > rules.outgrown * built.trained
            if spec != built.spec or outgrown or dead > many:
                return modality, view, spec, False
            if view.count - built.count >= rules.rest_least(built.count):
                return modality, view.head(max(2 * built.count, built.count + rules.step)), spec, True
        return None


def _rest(view: View, start: int) -> Iterable[Vectors]:
    """Yield the vectors in a view's blocks from the number `start` on."""
    stored = view.count - view.indexed
    for number, block in enumerate(view.blocks):
        first = number * len(block)
        batch = block[max(0, start - first) : stored - first]
        if len(batch):
            yield batch


def _best(query: int, results: "Sequence[tuple[str, View, Scores, Keys]]", count: int) -> list[Found]:
    """Return one query's best results from scores and rows (Q, N) of every part or block; row -1 is none."""
    candidates = [(scores[query], rows[query], view.slots) for _, view, scores, rows in results]
    if len(candidates) == 1:  # as below, in fewer steps
        [(scores, rows, slots)] = candidates
        candidate_slots, origins = slots[rows], None
    elif not candidates:
        return []
    else:
        scores, rows = (np.concatenate([candidate[place] for candidate in candidates]) for place in (0, 1))
        candidate_slots = np.concatenate([slots[numbers] for _, numbers, slots in candidates])
        origins = np.repeat(np.arange(len(candidates)), [len(rows) for _, rows, _ in candidates])
    order = np.lexsort((candidate_slots, -scores))
    order = order[rows[order] >= 0][:count]
    rows, own_slots, own_scores = rows[order], candidate_slots[order].tolist(), scores[order].tolist()
    if origins is None:
        name, view, _, _ = results[0]
        return list(map(Found, own_slots, own_scores, repeat(name), view.records.get(rows)))
    best: list[Found] = []
    for slot, score, row, origin in zip(own_slots, own_scores, rows, origins[order].tolist(), strict=True):
        name, view, _, _ = results[origin]
        best.append(Found(slot, score, name, view.records.get(row[None])[0]))
    return best


def _search(
    view: View, queries: Vectors, count: int, filter: Filter | None, effort: Effort, reader: SlotReader
) -> list[tuple[Scores, Keys]]:
    """Return scores and row numbers (Q, N), unordered, of the index and of each block; row -1 is no result."""
    allowed = view.alive if view.dead or filter is not None else None
    if filter is not None:
        allowed = select(view, filter, reader)
    results = []
    if view.built is not None:
        results.append(_in_index(view, view.built, queries, count, allowed, effort, reader))
    stored, first = view.count - view.indexed, view.indexed
    for block in view.blocks:
        stop_if_abandoned()
        length = min(len(block), stored - (first - view.indexed))
        mask = None if allowed is None else allowed[first : first + length]
        if length and (mask is None or mask.any()):
            scores, rows = _nearest(block[:length], queries, count, mask)
            results.append((scores, np.where(rows < 0, -1, rows + first)))
        first += length
    return results


def select(view: View, filter: Filter, reader: SlotReader) -> Mask:
    """Return the rows that are live and pass the filter."""

    def scan(rows: Keys, text: str) -> Iterable[tuple[int, Mapping[str, Any]]]:
        for slot, metadata in reader.metadata(view.slots[rows], text):
            yield int(np.searchsorted(view.slots, slot)), metadata

    return view.columns.select(filter, view.alive, scan)


def _nearest(vectors: Vectors, queries: Vectors, count: int, allowed: Mask | None) -> tuple[Scores, Keys]:
    """Return scores and places (Q, ≥ count) of the nearest of vectors (N, D), best first; place -1 is no result.

    Which of equal scores are among the best is FAISS's choice: so as many more are returned, up to `_MOST_EQUAL`, as
    are equal to the last.
    """
    depth = min(count + 1, len(vectors))
    while True:
        scores, places = _best_of(vectors, queries, depth, allowed)
        more = min(4 * depth, len(vectors), max(_MOST_EQUAL, count))
        if depth <= count or more <= depth or not (scores[:, count - 1] == scores[:, -1])[places[:, -1] >= 0].any():
            return scores, places
        depth = more


def _best_of(vectors: Vectors, queries: Vectors, count: int, allowed: Mask | None) -> tuple[Scores, Keys]:
    scores = np.empty((len(queries), count), np.float32)
    places = np.empty((len(queries), count), np.int64)
    bits = None if allowed is None else np.packbits(allowed, bitorder="little")
    selector = () if bits is None else (faiss.IDSelectorBitmap(bits),)
    pointers = (faiss.swig_ptr(array) for array in (queries, vectors))
    sizes = (vectors.shape[1], len(queries), len(vectors), count)
    faiss.knn_inner_product(*pointers, *sizes, faiss.swig_ptr(scores), faiss.swig_ptr(places), *selector)
    return scores, places


def _in_index(
    view: View,
    built: IndexSnapshot,
    queries: Vectors,
    count: int,
    allowed: Mask | None,
    effort: Effort,
    reader: SlotReader,
) -> tuple[Scores, Keys]:
    """Return scores and row numbers (Q, ≤ count), unordered."""
    if allowed is not None:
        allowed = allowed[: built.count]
    selected = built.count if allowed is None else int(np.count_nonzero(allowed))
    count = min(count, selected)
    if not count:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    if allowed is not None and selected <= _FEW and not built.spec.exact_scores:
        every = np.flatnonzero(allowed)
        return _scored_again(view, queries, np.tile(every, (len(queries), 1)), count, reader)
    nominees = min(selected, built.nominees(count, effort))
    if selected == built.count and not effort.exact:  # as below, in fewer steps
        scores, rows = built.nominate(queries, nominees, allowed, 1.0, effort)
        if (rows[:, :count] >= 0).all():
            return (scores, rows) if built.spec.exact_scores else _scored_again(view, queries, rows, count, reader)
    share = selected / built.count
    if built.spec.kind == "hnsw" and allowed is not None and share < _MOST and not effort.exact:
        shares = built.shares_around(queries, allowed)
        scanned = [
            not graph_rather_than_scan(selected, built.count, effort, nominees, share) for share in shares.tolist()
        ]
    else:
        shares = np.full(len(queries), share)
        scanned = [effort.exact] * len(queries)
    scores = np.full((len(queries), nominees), -np.inf, np.float32)
    rows = np.full((len(queries), nominees), -1, np.int64)
    looked, left = np.flatnonzero(scanned), np.flatnonzero(~np.array(scanned))
    if left.size:
        around = min(share, float(shares[left].min()))
        scores[left], rows[left] = built.nominate(queries[left], nominees, allowed, around, effort)
        # Where a query's neighbourhood holds too few allowed vectors, all allowed vectors are compared.
        looked = np.concatenate([looked, left[(rows[left][:, :count] < 0).any(axis=1)]])
    if looked.size:
        scores[looked], rows[looked] = built.scan(queries[looked], nominees, allowed)
    if built.spec.exact_scores:
        return scores, rows
    return _scored_again(view, queries, rows, count, reader)


def _scored_again(view: View, queries: Vectors, rows: Keys, count: int, reader: SlotReader) -> tuple[Scores, Keys]:
    """Return the `count` best of the nominated rows (Q, N), by their stored vectors."""
    slots, vectors = reader.vectors(np.unique(view.slots[rows[rows >= 0]]))
    scores = np.full(rows.shape, -np.inf, np.float32)
    for query, (row_scores, row_numbers) in enumerate(zip(scores, rows, strict=True)):
        row_slots = view.slots[np.maximum(row_numbers, 0)]
        places = np.searchsorted(slots, row_slots)
        is_there = (row_numbers >= 0) & (places < len(slots))
        is_there[is_there] = slots[places[is_there]] == row_slots[is_there]
        row_scores[is_there] = vectors[places[is_there]] @ queries[query]
    rows = np.where(np.isinf(scores), -1, rows)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(scores, best, axis=1), np.take_along_axis(rows, best, axis=1)
