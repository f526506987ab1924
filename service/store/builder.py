"""The thread that builds indexes: it works on what searches do not see, and switches when it is done."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait

import numpy as np

from service.contract.vectors import Vectors
from service.store import huge_pages, kinds
from service.store.index import Index, View
from service.store.kinds import IndexSnapshot, IndexSpec, Keys, Rules
from service.store.rows import SlotReader

_BATCH = 4_096
"""Vectors read at a time."""
_NICE = 5
_AFTER_FAILURE_S = 60.0
_CLOSING_S = 10.0
_KEEPING_UP_S = 0.2
"""Seconds between two looks at what came while an index is built anew."""
_SAVED_FROM = 17 / 16
"""An index that has grown by less since it was saved is not saved again at once: each time all of it is written."""

_log = logging.getLogger(__name__)


class Builder:
    """Builds the indexes of a store in a thread of its own."""

    def __init__(
        self,
        indexes: Callable[[], Mapping[int, Index]],
        reader: Callable[[int, bool], SlotReader],
        keep: Callable[[int, str, IndexSnapshot | None, Keys], None],
        rules: Rules,
    ) -> None:
        """Start the thread. `indexes` returns the present indexes by collection, `reader` a reader of a collection for
        this thread, or for the one that trains, and `keep` saves the index of a collection's modality, or forgets it
        where it is None."""
        self._indexes, self._reader, self._keep, self._rules = indexes, reader, keep, rules
        self._changed = threading.Condition()
        self._work = True
        self._closing = False
        self._idle = False
        self._failed: float | None = None
        self._saved: dict[tuple[int, str], int] = {}
        """Sizes of the indexes that were saved last, by part."""
        self._unsaved: dict[tuple[int, str], tuple[IndexSnapshot, Keys]] = {}
        """Indexes that grew by little since, with their slots: saved once there is nothing to build."""
        self.building: tuple[int, str] | None = None
        """The part whose index is being built: collection, modality."""
        self._thread = threading.Thread(target=self._run, name="store-builder", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Note that something was written: an index may have to be built."""
        with self._changed:
            self._work = True
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Return whether there is nothing to build, now or within the time. False where building failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (self._idle and not self._work), timeout_s)
            return self._idle and not self._work and self._failed is None

    @property
    def behind(self) -> bool:
        """Return whether writes come faster than indexes take them in; False where building failed."""
        return self._failed is None and any(index.behind(self._rules) for index in list(self._indexes().values()))

    def close(self) -> None:
        """Stop. A half-built index is given up; training cannot be stopped, and ends with the process."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(_CLOSING_S)

    def _run(self) -> None:
        # Searches and writes go first. On Linux a thread has a niceness of its own, and FAISS's threads inherit it.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        self._give_pages()
        while True:
            with self._changed:
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closing or self._work)
                if self._closing:
                    return
                self._work, self._idle = False, False
            if self._failed is not None and time.monotonic() < self._failed + _AFTER_FAILURE_S:
                continue
            try:
                while not self._closing and self._step():
                    pass
                self._failed = None
            except Exception:
                # Vectors without an index are compared one by one: slower, but correct.
                _log.exception("an index could not be built; the next write after a minute tries again")
                self._failed = time.monotonic()
            finally:
                self.building = None

    def _give_pages(self) -> None:
        """Give pages to the indexes that existed at the start; later ones have them before they come into use."""
        try:
            for index in list(self._indexes().values()):
                for view in index.views().values():
                    if view.built is not None:
                        huge_pages.give(view.built.index, self._stopped)
        except Exception:
            _log.exception("an index stays in small pages: it is searched all the same")

    def _step(self) -> bool:
        """Build the first index that is needed, and return whether there was one."""
        for collection, index in list(self._indexes().items()):
            plan = index.plan(self._rules)
            if plan is not None:
                modality, view, spec, more = plan
                self.building = (collection, modality)
                start_s = time.monotonic()
                reader = self._reader(collection, False)
                rows: Keys | None = None  # all of them
                if spec.kind == "flat":
                    rows = np.flatnonzero(view.alive)
                    vectors = _in_blocks(view, rows) if view.built is None else list(_batches(view, rows, reader))
                    self._unsaved.pop((collection, modality), None)  # the numbers of its rows are gone
                    index.switch(modality, view, None, vectors, rows)
                    self._keep(collection, modality, None, view.slots[rows])
                    return True
                if more and view.built is not None:
                    built = self._extended(view, view.built, reader)
                else:
                    built, view, rows = self._built_anew(collection, index, modality, view, spec)
                if built is None:
                    return False
                huge_pages.give(built.index, self._stopped)
                index.switch(modality, view, kinds.on_gpu(built), [], rows)
                _log.info(
                    "an index was built",
                    extra={
                        "fields": {
                            "collection": collection,
                            "modality": modality,
                            "kind": built.spec.kind,
                            "vectors": built.count,
                            "seconds": round(time.monotonic() - start_s, 1),
                        }
                    },
                )
                part, slots = (collection, modality), view.slots if rows is None else view.slots[rows]
                if more and built.count < _SAVED_FROM * self._saved.get(part, 0):
                    self._unsaved[part] = (built, slots)
                else:
                    self._save(part, built, slots)
                return True
        while self._unsaved and not self._closing:
            part, (built, slots) = self._unsaved.popitem()
            self._save(part, built, slots)
        return False

    def _save(self, part: tuple[int, str], built: IndexSnapshot, slots: Keys) -> None:
        self._unsaved.pop(part, None)
        self._keep(*part, built, slots)
        self._saved[part] = built.count

    def _extended(self, view: View, built: IndexSnapshot, reader: SlotReader) -> IndexSnapshot | None:
        return kinds.extend(built, _batches(view, np.arange(built.count, view.count), reader), self._stopped)

    def _built_anew(
        self, collection: int, index: Index, modality: str, view: View, spec: IndexSpec
    ) -> tuple[IndexSnapshot | None, View, Keys]:
        """Build an index of the live rows of a view; return it with the view and the rows that it is of.

        Meanwhile the index that is there takes in what is written: the vectors that wait in memory stay few.
        """
        rows = np.flatnonzero(view.alive)
        # Two, each with its own connection: from Python 3.12 on, threads that share one get rows of each other.
        reader, training = self._reader(collection, False), self._reader(collection, True)
        sample, batches = _sampler(view, rows, training), _batches(view, rows, training)
        making: Future[IndexSnapshot | None] = Future()

        def make() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            try:
                making.set_result(kinds.build(spec, index.dimensions, len(rows), sample, batches, self._stopped))
            except BaseException as error:
                making.set_exception(error)

        # A daemon, unlike the threads of an executor: the process does not wait for it to end.
        threading.Thread(target=make, name="store-training", daemon=True).start()
        while wait([making], _KEEPING_UP_S).not_done:
            now = index.views()[modality]
            if now.built is not None and now.count - now.indexed >= self._rules.rest_least(now.indexed):
                more = now.head(max(2 * now.indexed, now.indexed + self._rules.step))
                if (extended := self._extended(more, now.built, reader)) is None:
                    break
                huge_pages.give(extended.index, self._stopped)
                index.switch(modality, more, extended, [], None)
        built = making.result()
        now = index.views()[modality]
        if built is None or now.indexed <= view.count:
            return built, view, rows
        # What the other index took in is in memory no more.
        taken_in = np.arange(view.count, now.indexed)
        extended_index = kinds.extend(built, _batches(now, taken_in, reader), self._stopped, copy=False)
        return extended_index, now.head(now.indexed), np.concatenate([rows, taken_in])

    def _stopped(self) -> bool:
        return self._closing


def _in_blocks(view: View, rows: Keys) -> Iterator[Vectors]:
    """Yield the vectors of these rows, ascending, of a view that has all of them in memory."""
    for number, block in enumerate(view.blocks):
        yield block[rows[rows // len(block) == number] % len(block)]


def _batches(view: View, rows: Keys, reader: SlotReader) -> Iterator[Vectors]:
    """Yield the vectors of these rows, as they are stored. A row that was deleted meanwhile is zeros, and dead."""
    for start in range(0, len(rows), _BATCH):
        yield _vectors(view, rows[start : start + _BATCH], reader)


def _vectors(view: View, rows: Keys, reader: SlotReader) -> Vectors:
    row_slots = view.slots[rows]
    slots, vectors = reader.vectors(row_slots)
    if len(slots) == len(row_slots):
        return vectors
    all_vectors = np.zeros((len(row_slots), vectors.shape[1]), np.float32)
    all_vectors[np.searchsorted(row_slots, slots)] = vectors
    return all_vectors


def _sampler(view: View, rows: Keys, reader: SlotReader) -> Callable[[int], Vectors]:
    def sample(count: int) -> Vectors:
        subset = np.sort(np.random.default_rng(0).choice(rows, count, replace=False)) if count < len(rows) else rows
        return np.concatenate(list(_batches(view, subset, reader)))

    return sample
