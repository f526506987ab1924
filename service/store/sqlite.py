"""The store of one process has durable rows in SQLite, and indexes in memory that are derived from them."""

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from service.contract.bundle import Manifest
from service.contract.vectors import Vectors
from service.errors import InvalidRequest, NotFound, NotReady
from service.runtime.disk import Disk
from service.store import (
    background,
    browsing,
    keywords,
    labels,
    moments,
    previews,
    rows,
    schema,
    snapshot,
    writes,
)
from service.store import search as searches
from service.store.background import Background, Backgrounds
from service.store.browsing import Facets, Order
from service.store.builder import Builder
from service.store.columns import reads_rows
from service.store.files import OpenFiles, hold
from service.store.filters import Filter
from service.store.index import Index
from service.store.interface import Hit, Part, Store, VectorSearch
from service.store.items import Collection, Entry, Item, Metadata, Moment, Preview
from service.store.keywords import KeywordSearch
from service.store.kinds import IndexRequest, IndexSnapshot, IndexSpec, Keys, Rules
from service.store.labels import LabelSet, ListedLabelSet
from service.store.previews import Shown
from service.store.readers import Readers, reason
from service.store.rows import SlotReader
from service.store.search import Replaced, Seen
from service.store.writer import BEHIND, Change, Configure, Drop, Put, Remove, Transaction, Writer

_TRIED_S = 10.0
"""Seconds after a write for which another one is taken to work too."""
_TRYING_S = 2.0
"""Seconds that a try waits for its turn at most."""
_TRIED = "0" * 2**20
_PACE_S = 0.002
"""A write waits so long for each of its items, at most, while too many vectors wait for an index."""
_LOOK_S = 0.05
"""Seconds between two looks at whether it still has to."""

T = TypeVar("T")
P = ParamSpec("P")


class SqliteStore(Store):
    """Keeps the store in one directory. Store describes the methods."""

    kind = "SQLite"
    shared = False

    def __init__(self, path: Path, manifest: Manifest, lock: int, rules: Rules, least_free_bytes: int) -> None:
        """Use open() instead of calling this."""
        self._lock, self._snapshot = lock, path / "snapshot"
        self._disk = Disk(path, least_free_bytes)
        self._space, self._dimensions = manifest.space, manifest.dimensions
        file = path / schema.FILE
        self._connections: list[sqlite3.Connection] = [schema.connect(file)]
        """Those of the threads that write, build indexes, train them and copy the log into the database."""
        try:
            [writing] = self._connections
            schema.prepare(writing, path, manifest)
            rows.replace_kinds(writing)
            self._id = schema.meta(writing, "store") or ""
            self._keys = {row.name: row.key for row in rows.collections(writing)}
            """Keys of collections, by name."""
            self._indexes = snapshot.load_indexes(writing, self._snapshot, self._id, self._dimensions)
            building, training, copying = (schema.connect(file) for _ in range(3))
            self._connections += [building, training, copying]
            self._readers = Readers(file)
        except BaseException:
            self._disconnect()
            raise
        self._version = 0
        self._backgrounds = Backgrounds()
        self._writer = Writer(writing, copying, self._apply, OpenFiles(file))
        self._readers.refusing = lambda: self._writer.refusing
        self._builder = Builder(
            lambda: self._indexes,
            lambda key, trains: SlotReader(training if trains else building, key, self._dimensions),
            self._save_index,
            rules,
        )

    @classmethod
    def open(
        cls, path: Path, manifest: Manifest, rules: Rules | None = None, *, least_free_bytes: int = 0
    ) -> "SqliteStore":
        """Open or create the store in a directory. Blocks while it is read: call it before serving.

        An index whose snapshot is absent or damaged is built in the background, while searches are exact. Raises
        StoreInUse, StoreDamaged, or SpaceMismatch where the vectors that are there are of a space that the bundle does
        not accept; StoreError where the directory cannot be written.
        """
        lock = hold(path)
        try:
            return cls(path, manifest, lock, rules or Rules(), least_free_bytes)
        except (sqlite3.Error, ValueError) as error:
            os.close(lock)
            raise reason(path, error) from error
        except BaseException:
            os.close(lock)
            raise

    def _disconnect(self) -> None:
        for connection in self._connections:
            connection.close()

    def _save_index(self, collection: int, modality: str, built: IndexSnapshot | None, slots: Keys) -> None:
        """Keep an index that came into use, or forget that of a part that has none any more."""
        if built is None:
            snapshot.forget(self._snapshot, collection, modality)
        elif collection in self._indexes:
            view = self._indexes[collection].views()[modality]  # its first rows are those of the index
            saved = snapshot.Saved(collection, modality, built, slots, (view.columns, view.records))
            snapshot.save(self._snapshot, self._id, self._writer.sequence, saved)

    def _apply(self, changes: list[Change]) -> None:
        for change in changes:
            match change:
                case Configure(collection, name, request):
                    # Replaced as a whole, like the names: the builder and searches may be iterating over them.
                    self._indexes = {collection: Index(self._dimensions, request), **self._indexes}
                    self._indexes[collection].index_request = request
                    self._keys = {**self._keys, name: collection}
                case Drop(collection):
                    self._keys = {name: key for name, key in self._keys.items() if key != collection}
                    self._indexes = {key: index for key, index in self._indexes.items() if key != collection}
                    self._backgrounds.forget(collection)
                    snapshot.forget(self._snapshot, collection)
                case Put(collection, modality, slots, vectors, metadata, records, replaced):
                    self._indexes[collection].put(modality, slots, vectors, metadata, records, replaced)
                case Remove(collection, slots):
                    self._indexes[collection].remove(slots)
        if changes:
            self._version = self._writer.sequence
            self._builder.notify()

    async def ready(self) -> bool:
        return not self._readers.closed and not self._readers.damaged and self._writer.alive()

    async def writable(self) -> bool:
        if not await self.ready():
            return False
        refusing = self._writer.refusing
        if not refusing and self._writer.idle_s < _TRIED_S:
            return True
        try:
            async with asyncio.timeout(_TRYING_S):
                # Every commit writes something. After a failure as much is tried as a large write takes: a small one
                # may still have room.
                if refusing:
                    await self._write(lambda transaction: schema.set_meta(transaction.connection, "tried", _TRIED))
                    await self._write(lambda transaction: schema.set_meta(transaction.connection, "tried", ""))
                else:
                    await self._write(lambda transaction: None)
        except NotReady:
            return False
        except TimeoutError:  # it waits for its turn
            return not self._writer.refusing
        return True

    async def indexed(self, timeout_s: float) -> bool:
        """Return whether every part has the index that it is to have, now or within the time."""
        return await asyncio.to_thread(self._builder.wait, timeout_s)

    async def close(self) -> None:
        if not self._readers.closed:
            self._readers.closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.close()
        self._readers.close()
        self._builder.close()
        self._disconnect()
        os.close(self._lock)

    # Items

    async def upsert(self, entries: Sequence[Entry]) -> None:
        by_collection: dict[str, list[Entry]] = {}
        for entry in (*entries, *moments.entries(entries)):
            by_collection.setdefault(entry.collection, []).append(entry)

        def write(transaction: Transaction) -> None:
            self._disk.check()
            for name, batch in by_collection.items():
                writes.upsert(transaction, self._ensure(transaction, name), name, batch)

        await self._write(write)
        # What no index holds is in memory: writers that never waited could starve the builder until memory ends. A
        # look now and then takes no thread, of which all writers together would take too many.
        last = time.monotonic() + _PACE_S * len(entries)
        while self._builder.behind and time.monotonic() < last:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)

    async def get(self, collection: str, id: str, with_vector: bool = False) -> Item:
        item = await self._read_of(collection, rows.item, id, with_vector)
        return _existing(item, f"item {id!r} in the collection {collection!r}")

    async def holds(self, collection: str, id: str) -> bool:
        with suppress(NotFound):
            return await self._read_of(collection, rows.item, id, False) is not None
        return False

    async def preview(self, collection: str, id: str) -> Preview:
        preview = await self._read_of(collection, previews.of_item, id)
        return _existing(preview, f"preview of an item {id!r} in the collection {collection!r}")

    async def shown(self, collection: str, ids: Sequence[str]) -> dict[str, Shown]:
        return await self._read_of(collection, previews.shown, ids)

    async def sample(self, collection: str, count: int) -> tuple[list[Item], int]:
        def read(connection: sqlite3.Connection) -> tuple[list[Item], int]:
            with self._one_moment(connection, collection) as state:
                return searches.sample(connection, state[collection], collection, count)

        return await self._readers.read(read)

    async def version(self, collection: str) -> str:
        return str(self._version)  # of the whole store: what is written elsewhere only costs a little work

    async def vectors(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        vectors = await self._read_of(collection, rows.vectors, ids)
        for id in ids:
            _existing(vectors.get(id), f"item {id!r} in the collection {collection!r}")
        return vectors

    async def moments_of(self, collection: str, ids: Sequence[str]) -> dict[str, list[Moment]]:
        def read(connection: sqlite3.Connection) -> dict[str, list[Moment]]:
            key = rows.collection_key(connection, moments.moments_table(collection))
            prefixes = [f"{id}{moments.SEPARATOR}" for id in ids]
            return {} if key is None else moments.by_owner(rows.vectors_of_prefixes(connection, key, prefixes))

        return await self._read(read)

    async def page(
        self,
        collection: str | None,
        modality: str | None,
        cursor: str | None,
        limit: int,
        *,
        filter: Filter | None = None,
        order: Order | None = None,
    ) -> tuple[list[Item], str | None]:
        def read(connection: sqlite3.Connection) -> tuple[list[Item], str | None]:
            key = None if collection is None else rows.existing_collection_key(connection, collection)
            return rows.page(connection, key, modality, cursor, limit)

        def read_ordered(connection: sqlite3.Connection) -> tuple[list[Item], str | None]:
            assert collection is not None
            with self._one_moment(connection, collection) as state:
                key, reader, views = searches.browsed(connection, state[collection], modality)
                slots, more = browsing.page(views, filter, order or Order(), cursor, limit, reader)
                items = rows.items_by_slot(connection, key, collection, set(slots), with_vector=False)
            return [items[slot] for slot in slots], more

        if filter is None and order is None:
            return await self._read(read)
        if collection is None:
            raise InvalidRequest("filter, sort and order go with a collection")
        return await self._readers.read(read_ordered)

    async def facets(
        self, collection: str, keys: Sequence[str] = (), *, modality: str | None = None, filter: Filter | None = None
    ) -> Facets:
        def read(connection: sqlite3.Connection) -> Facets:
            with self._one_moment(connection, collection) as state:
                _, reader, views = searches.browsed(connection, state[collection], modality)
                return browsing.facets(views, keys, filter, reader)

        return await self._readers.read(read)

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        def write(transaction: Transaction, key: int) -> int:
            return writes.delete(transaction, key, collection, rows.slots_of_ids(transaction.connection, key, ids))

        return await self._write_of(collection, write)

    async def delete_matching(self, collection: str, filter: Filter) -> int:
        def write(transaction: Transaction, key: int) -> int:
            slots = self._indexes[key].matching(filter, SlotReader(transaction.connection, key, self._dimensions))
            return writes.delete(transaction, key, collection, slots)

        return await self._write_of(collection, write, alone=True)

    async def move(
        self, collection: str, ids: Mapping[str, str], metadata: Mapping[str, Metadata] | None = None
    ) -> int:
        def write(transaction: Transaction, key: int) -> int:
            self._disk.check()
            return writes.move(transaction, key, collection, ids, metadata or {})

        return await self._write_of(collection, write)

    async def search(self, request: VectorSearch) -> list[list[Hit]]:
        reads = request.with_vector or request.with_shown or (request.filter is not None and reads_rows(request.filter))

        def read(connection: sqlite3.Connection) -> list[list[Hit]]:
            if not reads:
                # Most searches read no rows, and so need not be of one moment with them.
                with suppress(Replaced):
                    state = self._seen_together(request.collection)
                    return searches.search(connection, state, request, one_moment=False)
            with self._one_moment(connection, request.collection) as state:
                return searches.search(connection, state, request, one_moment=True)

        return await self._readers.read(read)

    async def background(self, collection: str, queries: Vectors) -> dict[str, Background]:
        def read(connection: sqlite3.Connection) -> dict[str, Background]:
            backgrounds = {
                name: self._backgrounds.of(key, views, queries, SlotReader(connection, key, self._dimensions))
                for name, (key, _, views) in self._seen(collection).items()
            }
            return background.together(backgrounds.pop(collection), *backgrounds.values())

        return await self._readers.read(read)

    async def keyword_search(self, request: KeywordSearch) -> list[Hit]:
        def read(connection: sqlite3.Connection) -> list[Hit]:
            with self._one_moment(connection, request.collection) as state:
                return searches.keyword_search(connection, state, request)

        return await self._readers.read(read)

    async def collections(self) -> list[Collection]:
        return [*await self._read(rows.collections)]

    async def collection(self, name: str) -> Collection:
        return _existing(await self._read(rows.collection, name), f"collection {name!r}")

    async def parts(self, name: str) -> list[Part]:
        def read(connection: sqlite3.Connection) -> list[Part]:
            key = rows.existing_collection_key(connection, name)
            index = self._indexes.get(key)
            described = []
            for modality, view in sorted(index.views().items() if index else ()):
                spec = view.built.spec if view.built else IndexSpec("flat", "float32")
                indexed = int(np.count_nonzero(view.alive[: view.indexed]))
                building = self._builder.building == (key, modality)
                if living := view.count - view.dead:
                    described.append(Part(modality, spec.kind, spec.precision, living, indexed, building))
            return described

        return await self._read(read)

    async def create_collection(self, name: str, request: IndexRequest | None = None) -> bool:
        def write(transaction: Transaction) -> bool:
            self._disk.check()
            before = len(transaction.changes)
            key = self._ensure(transaction, name)
            created = len(transaction.changes) > before
            if request is not None:
                rows.configure_collection(transaction.connection, key, request)
                transaction.changes.append(Configure(key, name, request))
            return created

        return await self._write(write)

    async def set_keyword_fields(self, collection: str, fields: Sequence[str]) -> None:
        def write(transaction: Transaction, key: int) -> None:
            self._disk.check()
            keywords.set_fields(transaction.connection, key, fields)

        await self._write_of(collection, write)

    async def drop_collection(self, name: str) -> None:
        await self._write_of(name, lambda transaction, key: writes.drop_collection(transaction, key, name))

    def _ensure(self, transaction: Transaction, name: str) -> int:
        return writes.ensure_collection(transaction, name, self._space, self._dimensions)

    # Label sets

    async def put_label_set(self, name: str, definition: Mapping[str, Any], vectors: Mapping[str, Vectors]) -> None:
        def write(transaction: Transaction) -> None:
            self._disk.check()
            labels.put_label_set(transaction.connection, name, self._space, definition, vectors)

        await self._write(write)

    async def label_set(self, name: str) -> LabelSet:
        return _existing(await self._read(labels.label_set, name, self._dimensions), f"label set {name!r}")

    async def label_sets(self, after: str, limit: int) -> list[ListedLabelSet]:
        return await self._read(labels.listed, after, limit)

    async def label_set_version(self, name: str) -> str:
        return _existing(await self._read(labels.version, name), f"label set {name!r}")

    async def delete_label_set(self, name: str) -> None:
        def write(transaction: Transaction) -> None:
            _existing(labels.delete_label_set(transaction.connection, name) or None, f"label set {name!r}")

        await self._write(write)

    async def _write(self, operation: Callable[[Transaction], T], *, alone: bool = False) -> T:
        return await asyncio.wrap_future(self._writer.submit(operation, alone=alone))

    async def _write_of(self, collection: str, operation: Callable[[Transaction, int], T], *, alone: bool = False) -> T:
        """Run an operation on a collection, by its key. Raises NotFound."""

        def write(transaction: Transaction) -> T:
            return operation(transaction, rows.existing_collection_key(transaction.connection, collection))

        return await self._write(write, alone=alone)

    async def _read(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a function that reads rows. No later search shows an older state of them."""

        def read(connection: sqlite3.Connection) -> T:
            result = function(connection, *args, **kwargs)
            if schema.sequence(connection) > self._writer.applied:
                with self._writer.committing:
                    pass
            return result

        return await self._readers.read(read)

    async def _read_of(
        self,
        collection: str,
        function: Callable[Concatenate[sqlite3.Connection, int, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run a function that reads rows of a collection, by its key. Raises NotFound."""
        return await self._read(
            lambda connection: function(
                connection, rows.existing_collection_key(connection, collection), *args, **kwargs
            )
        )

    def _seen(self, collection: str) -> Seen:
        """Return the current views of a collection. Raises NotFound."""
        keys, indexes, state = self._keys, self._indexes, {}
        for name in (collection, moments.moments_table(collection)):
            if (key := keys.get(name)) is not None and key in indexes:
                state[name] = (key, indexes[key], indexes[key].views())
        if collection not in state:
            raise NotFound(f"no collection {collection!r}")
        return state

    def _seen_together(self, collection: str) -> Seen:
        """Return what _seen does; where there are moments, the views of them and of the items show the same commit."""
        applied, state = self._writer.applied, self._seen(collection)
        if len(state) > 1 and self._writer.sequence != applied:
            with self._writer.committing:
                return self._seen(collection)
        return state

    @contextmanager
    def _one_moment(self, connection: sqlite3.Connection, collection: str) -> Iterator[Seen]:
        """Yield the views of a collection; inside the block the rows show the same commit.

        The indexes follow the rows by a moment, in which what they show may have been replaced. Nobody waits for a
        disk here: who comes just then waits until the indexes show what is on it already.
        """
        connection.execute("BEGIN")
        try:
            # In this order: a later commit that the views show is in the rows too.
            applied, state = self._writer.applied, self._seen(collection)
            if schema.sequence(connection) != applied:
                connection.execute("COMMIT")
                with self._writer.committing:
                    connection.execute("BEGIN")
                    state = self._seen(collection)
                    if schema.sequence(connection) != self._writer.applied:
                        raise NotReady(BEHIND)
            yield state
        finally:
            if connection.in_transaction:
                connection.execute("COMMIT")


def _existing(value: T | None, what: str) -> T:
    """Return what was read. Raises NotFound where it does not exist."""
    if value is None:
        raise NotFound(f"no {what}")
    return value
