"""The store of one process: durable rows in SQLite, and the indexes in memory that are derived from them."""

import asyncio
import fcntl
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from service.contract.bundle import Manifest
from service.contract.vectors import Vectors
from service.errors import InvalidRequest, NotFound, NotReady
from service.runtime.disk import Disk
from service.runtime.workers import Workers, abandoned
from service.store import background, browsing, keywords, labels, moments, previews, rows, schema, snapshot, tokens
from service.store.background import Background, Backgrounds
from service.store.browsing import Facets, Order
from service.store.builder import Builder
from service.store.columns import reads_rows
from service.store.errors import StoreDamaged, StoreError, StoreInUse
from service.store.files import OpenFiles
from service.store.filters import Filter
from service.store.index import Index, View
from service.store.interface import MOST_FOUND_BYTES, TOO_MUCH_FOUND, Hit, Part
from service.store.kinds import Effort, IndexRequest, IndexSnapshot, Keys, Rules
from service.store.labels import LabelSet, ListedLabelSet
from service.store.previews import Shown
from service.store.rows import Collection, Entry, Item, Metadata, Preview, SlotReader
from service.store.writer import BEHIND, Change, Configure, Drop, Put, Remove, Transaction, Writer

_READERS, _SPARE_READERS = 4, 1
"""Threads that read: for one caller, and for another while that one has them all."""
_STEPS = 20_000
"""Steps of SQLite's virtual machine (under a millisecond) between two checks whether anybody still waits for a read."""
_TRIED_S = 10.0
"""Seconds after a write for which another one is taken to work too."""
_TRYING_S = 2.0
"""Seconds that a try waits for its turn at most."""
_TRIED = "0" * 2**20
_UNWRITABLE = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR)
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

_log = logging.getLogger(__name__)
T = TypeVar("T")
_Seen = Mapping[str, tuple[int, Index, Mapping[str, View]]]
"""Key, index and views by name, for a collection and for its moments if it has any."""


class SqliteStore:
    """See interface.Store, whose methods are described there."""

    def __init__(self, path: Path, manifest: Manifest, lock: int, rules: Rules, least_free_bytes: int) -> None:
        """Use open() instead of calling this."""
        self._path = path
        self._lock = lock
        self._disk = Disk(path, least_free_bytes)
        self._space = manifest.space
        self._dimensions = manifest.dimensions
        self._connections: list[sqlite3.Connection] = []
        self._unused: list[sqlite3.Connection] = []
        """Open connections that no reading thread uses now."""
        self._closed = self._damaged = False
        try:
            writing = self._connect()
            schema.prepare(writing, path, manifest)
            for (kind, instead), count in rows.replace_kinds(writing).items():
                _log.warning(
                    "%s collections have an index of kind %s, which there is no more: %s replaces it. The old index is "
                    "searched until the new one is built.",
                    count,
                    kind,
                    instead,
                )
            self._id = schema.meta(writing, "store") or ""
            self._keys = {row.name: row.key for row in rows.collections(writing)}
            """Keys of collections, by name."""
            self._indexes = self._load_indexes(writing)
            reading = self._connect()
            # Before anything can happen to the files: a later connection might find another log.
            for _ in range(_READERS + _SPARE_READERS):
                self._unused.append(self._connect())
        except BaseException:
            self._disconnect()
            raise
        self._thread = threading.local()
        self._readers = Workers("store-reader", _READERS, spare=_SPARE_READERS)
        self._version = 0
        self._backgrounds = Backgrounds()
        self._writer = Writer(writing, self._apply, OpenFiles(path / schema.FILE))
        self._builder = Builder(_Library(self, reading), rules)

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
            raise _reason(path, error) from error
        except BaseException:
            os.close(lock)
            raise

    def _connect(self) -> sqlite3.Connection:
        connection = schema.connect(self._path / schema.FILE)
        self._connections.append(connection)
        return connection

    def _reader(self) -> sqlite3.Connection:
        with suppress(IndexError):
            return self._unused.pop()
        if self._writer.refusing:  # another thread died with its connection, and the files may be others by now
            raise NotReady("the store cannot be read")
        return self._connect()

    def _disconnect(self) -> None:
        for connection in self._connections:
            connection.close()

    @property
    def _snapshot(self) -> Path:
        return self._path / "snapshot"

    def _load_indexes(self, connection: sqlite3.Connection) -> dict[int, Index]:
        """Load the snapshot and bring it up to date with the rows; vectors that are in no index are read."""
        latest = int(schema.meta(connection, "sequence") or 0)
        saved = snapshot.load(self._snapshot, self._id, latest, self._dimensions)
        indexes = {}
        for collection in rows.collections(connection):
            index = Index(self._dimensions, collection.wanted)
            for part in saved:
                if part.collection == collection.key:
                    index.load(part.modality, part.built, part.slots)
            reader = SlotReader(connection, collection.key, self._dimensions)
            for slots, modalities, metadata, records in rows.live(connection, collection.key):
                for modality in dict.fromkeys(modalities):
                    chosen = np.array([name == modality for name in modalities])
                    places = np.flatnonzero(chosen).tolist()
                    chosen_metadata = [metadata[place] for place in places]
                    chosen_records = [records[place] for place in places]
                    fresh = ~index.revive(modality, slots[chosen], chosen_metadata, chosen_records)
                    if fresh.any():
                        missing = slots[chosen][fresh]
                        present, vectors = reader.vectors(missing)
                        if len(present) != len(missing):
                            raise ValueError("an item has no vector")
                        places = np.flatnonzero(fresh).tolist()
                        index.put(
                            modality,
                            missing,
                            vectors,
                            [chosen_metadata[place] for place in places],
                            [chosen_records[place] for place in places],
                        )
            indexes[collection.key] = index
        for part in saved:
            if part.collection not in indexes:
                snapshot.forget(self._snapshot, part.collection)
        return indexes

    def _apply(self, changes: list[Change]) -> None:
        for change in changes:
            match change:
                case Configure(collection, name, wanted):
                    # Replaced as a whole, like the names: the builder and searches may be iterating over them.
                    self._indexes = {collection: Index(self._dimensions, wanted), **self._indexes}
                    self._indexes[collection].wanted = wanted
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
        return not self._closed and not self._damaged and self._writer.alive()

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
        """Finish every write and search that has begun, and release the directory."""
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.close()
        self._readers.close()
        self._builder.close()
        self._disconnect()
        os.close(self._lock)

    # Items

    async def upsert(self, entries: Sequence[Entry]) -> None:
        by_part: dict[str, dict[str, list[Entry]]] = {}
        for entry in (*entries, *moments.entries(entries)):
            by_part.setdefault(entry.collection, {}).setdefault(entry.modality, []).append(entry)

        def write(transaction: Transaction) -> None:
            self._disk.check()
            for name, parts in by_part.items():
                collection = self._ensure(transaction, name)
                self._forget_moments(transaction, name, [entry.id for batch in parts.values() for entry in batch])
                for modality, batch in parts.items():
                    first = transaction.take(len(batch))
                    keys, replaced, records = rows.upsert(transaction.connection, collection, batch, first)
                    known = [id in replaced for id in (entry.id for entry in batch)]
                    keywords.put(transaction.connection, collection, keys, known, batch)
                    tokens.put(transaction.connection, collection, keys, known, batch)
                    previews.put(transaction.connection, keys, known, batch)
                    slots = np.arange(first, first + len(batch))
                    vectors = np.stack([entry.vector for entry in batch])
                    metadata = [entry.metadata for entry in batch]
                    older = np.sort(np.array(list(replaced.values()), np.int64))
                    put = Put(collection, modality, slots, vectors, metadata, records, older)
                    transaction.changes.append(put)

        await self._write(write)

    async def get(self, collection: str, id: str, with_vector: bool = False) -> Item:
        def read(connection: sqlite3.Connection) -> Item:
            item = rows.item(connection, _collection_key(connection, collection), id, with_vector)
            if item is None:
                raise NotFound(f"no item {id!r} in the collection {collection!r}")
            return item

        return await self._read(read)

    async def holds(self, collection: str, id: str) -> bool:
        def read(connection: sqlite3.Connection) -> bool:
            key = rows.collection_key(connection, collection)
            return key is not None and rows.item(connection, key, id, with_vector=False) is not None

        return await self._read(read)

    async def preview(self, collection: str, id: str) -> Preview:
        def read(connection: sqlite3.Connection) -> Preview:
            preview = previews.of_item(connection, _collection_key(connection, collection), id)
            if preview is None:
                raise NotFound(f"no preview of an item {id!r} in the collection {collection!r}")
            return preview

        return await self._read(read)

    async def shown(self, collection: str, ids: Sequence[str]) -> dict[str, Shown]:
        return await self._read(
            lambda connection: previews.shown(connection, _collection_key(connection, collection), ids)
        )

    async def sample(self, collection: str, count: int) -> tuple[list[Item], int]:
        def read(connection: sqlite3.Connection) -> tuple[list[Item], int]:
            with self._one_moment(connection, collection) as seen:
                key, index, views = seen[collection]
                slots = index.slots(views)
                total = len(slots)
                if total > count:
                    slots = np.sort(np.random.default_rng(0).choice(slots, count, replace=False))
                items = rows.items_by_slot(connection, key, collection, set(slots.tolist()), with_vector=True)
            return [items[slot] for slot in sorted(items)], total

        return await self._run(read)

    async def version(self, collection: str) -> str:
        return str(self._version)  # of the whole store: what is written elsewhere only costs a little work

    async def vectors(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        def read(connection: sqlite3.Connection) -> dict[str, Vectors]:
            vectors = rows.vectors(connection, _collection_key(connection, collection), ids)
            for id in ids:
                if id not in vectors:
                    raise NotFound(f"no item {id!r} in the collection {collection!r}")
            return vectors

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
            key = None if collection is None else _collection_key(connection, collection)
            items, last = rows.page(
                connection, key, modality, 0 if cursor is None else rows.key_of_cursor(cursor), limit
            )
            return items, None if last is None else rows.cursor(last)

        def read_ordered(connection: sqlite3.Connection) -> tuple[list[Item], str | None]:
            assert collection is not None
            with self._one_moment(connection, collection) as seen:
                key, reader, views = self._browsed(connection, seen, collection, modality)
                slots, more = browsing.page(views, filter, order or Order(), cursor, limit, reader)
                items = rows.items_by_slot(connection, key, collection, set(slots), with_vector=False)
            return [items[slot] for slot in slots], more

        if filter is None and order is None:
            return await self._read(read)
        if collection is None:
            raise InvalidRequest("filter, sort and order go with a collection")
        return await self._run(read_ordered)

    async def facets(
        self, collection: str, keys: Sequence[str] = (), *, modality: str | None = None, filter: Filter | None = None
    ) -> Facets:
        def read(connection: sqlite3.Connection) -> Facets:
            with self._one_moment(connection, collection) as seen:
                _, reader, views = self._browsed(connection, seen, collection, modality)
                return browsing.facets(views, keys, filter, reader)

        return await self._run(read)

    def _browsed(
        self, connection: sqlite3.Connection, seen: _Seen, collection: str, modality: str | None
    ) -> tuple[int, SlotReader, Mapping[str, View]]:
        """Return the key of a collection, a reader of its rows, and its views: of one modality where it is named."""
        key, _, views = seen[collection]
        chosen = {name: view for name, view in views.items() if modality is None or name == modality}
        return key, SlotReader(connection, key, self._dimensions), chosen

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        def write(transaction: Transaction) -> int:
            key = _collection_key(transaction.connection, collection)
            self._forget_moments(transaction, collection, ids)
            return self._delete(transaction, key, rows.slots_of_ids(transaction.connection, key, ids))

        return await self._write(write)

    async def delete_matching(self, collection: str, filter: Filter) -> int:
        def write(transaction: Transaction) -> int:
            key = _collection_key(transaction.connection, collection)
            slots = self._indexes[key].matching(filter, SlotReader(transaction.connection, key, self._dimensions))
            self._forget_moments(transaction, collection, rows.ids_of_slots(transaction.connection, key, slots))
            return self._delete(transaction, key, slots)

        return await self._write(write, alone=True)

    async def move(
        self, collection: str, ids: Mapping[str, str], metadata: Mapping[str, Metadata] | None = None
    ) -> int:
        described = metadata or {}

        def write(transaction: Transaction) -> int:
            self._disk.check()
            connection = transaction.connection
            key = _collection_key(connection, collection)
            slots = rows.slots_of_ids(connection, key, list(ids))
            items = rows.items_by_slot(connection, key, collection, set(slots.tolist()), with_vector=True)
            present = {item.id: ids[item.id] for item in items.values()}
            replaced = [new for old, new in present.items() if new != old]
            self._forget_moments(transaction, collection, replaced)
            self._delete(transaction, key, rows.slots_of_ids(connection, key, replaced))
            moved = {
                slot: replace(item, id=present[item.id], metadata=described.get(item.id, item.metadata))
                for slot, item in items.items()
            }
            self._rename(transaction, key, moved)
            self._move_moments(transaction, collection, present, described)
            return len(present)

        return await self._write(write)

    def _move_moments(
        self, transaction: Transaction, collection: str, ids: Mapping[str, str], metadata: Mapping[str, Metadata]
    ) -> None:
        """Give the moments of these items (old → new id) to the items' new ids."""
        connection, table = transaction.connection, moments.moments_table(collection)
        key = rows.collection_key(connection, table)
        if key is not None:
            slots = rows.slots_of_prefixes(connection, key, [f"{id}{moments.SEPARATOR}" for id in ids])
            items = rows.items_by_slot(connection, key, table, set(slots.tolist()), with_vector=True)
            self._rename(transaction, key, {slot: moments.moved(item, ids, metadata) for slot, item in items.items()})

    def _rename(self, transaction: Transaction, collection: int, items: Mapping[int, Item]) -> None:
        """Write items, by the slots of their rows, under their new ids."""
        for modality in {item.modality for item in items.values()}:
            batch = {slot: item for slot, item in sorted(items.items()) if item.modality == modality}
            first = transaction.take(len(batch))
            records = rows.rename(transaction.connection, collection, batch, first)
            slots = np.arange(first, first + len(batch))
            vectors = np.stack([item.vector for item in batch.values() if item.vector is not None])
            metadata = [item.metadata for item in batch.values()]
            older = np.array(list(batch), np.int64)
            transaction.changes.append(Put(collection, modality, slots, vectors, metadata, records, older))

    def _delete(self, transaction: Transaction, collection: int, slots: Keys) -> int:
        rows.delete(transaction.connection, collection, slots)
        transaction.changes.append(Remove(collection, slots))
        return int(slots.size)

    def _forget_moments(self, transaction: Transaction, collection: str, ids: Sequence[str]) -> None:
        """Delete the moments of these items of a collection."""
        key = rows.collection_key(transaction.connection, moments.moments_table(collection))
        if key is not None:  # most collections have no moments
            slots = rows.slots_of_prefixes(transaction.connection, key, [f"{id}{moments.SEPARATOR}" for id in ids])
            if slots.size:
                self._delete(transaction, key, slots)

    async def search(
        self,
        collection: str,
        queries: Vectors,
        count: int,
        *,
        modalities: Sequence[str] | None = None,
        filter: Filter | None = None,
        leave_out: Sequence[str | None] | None = None,
        with_vector: bool = False,
        with_shown: bool = False,
        effort: Effort | None = None,
        by_modality: bool = False,
    ) -> list[list[Hit]]:
        request = moments.Find(collection, queries, count, modalities, filter, leave_out, by_modality)
        reads = with_vector or with_shown or (filter is not None and reads_rows(filter))
        answer = partial(self._nearest, effort=effort, with_vector=with_vector)

        def look(connection: sqlite3.Connection, views: _Seen, *, together: bool) -> list[list[Hit]]:
            searching = moments.search(request)
            reply: Any = None
            while True:
                try:
                    step = searching.send(reply)
                except StopIteration as done:
                    return done.value or []
                if isinstance(step, moments.Find):
                    reply = answer(connection, views, step)
                elif together:
                    reply = rows.item(connection, views[collection][0], step.id, with_vector)
                else:
                    raise _Replaced  # it may be by now

        def read(connection: sqlite3.Connection) -> list[list[Hit]]:
            if not reads:
                # Most searches read no rows, and so need not be of one moment with them.
                with suppress(_Replaced):
                    return look(connection, self._seen_together(collection), together=False)
            with self._one_moment(connection, collection) as views:
                hits_by_query = look(connection, views, together=True)
                if with_shown:
                    hits = [hit for hits in hits_by_query for hit in hits]
                    shown = previews.shown(connection, views[collection][0], {hit.item.id for hit in hits})
                    for hit in hits:
                        hit.shown = shown.get(hit.item.id)
                return hits_by_query

        return await self._run(read)

    def _nearest(
        self,
        connection: sqlite3.Connection,
        views_by_name: _Seen,
        find: moments.Find,
        *,
        effort: Effort | None,
        with_vector: bool,
    ) -> list[list[Hit]] | None:
        """Return the nearest items of each query, or None where the collection does not exist.

        Raises _Replaced where a row that the index shows does not exist, and InvalidRequest for too much metadata.
        """
        if find.collection not in views_by_name:
            return None
        key, index, views = views_by_name[find.collection]
        reader = SlotReader(connection, key, self._dimensions)
        # One more than asked for, where one of them may be the item that is left out.
        matches_by_query = index.search(
            find.queries,
            find.count + bool(find.leave_out),
            reader,
            modalities=find.modalities,
            filter=find.filter,
            effort=effort,
            views=views,
            by_modality=find.by_modality,
        )
        matches = [match for matches in matches_by_query for match in matches]
        # Most items are in memory: only vectors, and items with long records, are read.
        slots = {match.slot for match in matches if with_vector or not match.record}
        items = rows.items_by_slot(connection, key, find.collection, slots, with_vector) if slots else {}
        if len(items) < len(slots) or reader.missed:
            raise _Replaced
        if sum(len(match.record) for match in matches) > MOST_FOUND_BYTES:
            raise InvalidRequest(TOO_MUCH_FOUND)
        results = []
        left_out_ids = find.leave_out or [None] * len(matches_by_query)
        for matches, left_out in zip(matches_by_query, left_out_ids, strict=True):
            hits = []
            for slot, score, modality, record in matches:
                item = items[slot] if slot in slots else rows.item_of_record(find.collection, modality, record)
                if item.id != left_out:
                    hits.append(Hit(item, score))
            results.append(hits if find.by_modality else hits[: find.count])
        return results

    async def background(self, collection: str, queries: Vectors) -> dict[str, Background]:
        def read(connection: sqlite3.Connection) -> dict[str, Background]:
            backgrounds = {
                name: self._backgrounds.of(key, views, queries, SlotReader(connection, key, self._dimensions))
                for name, (key, _, views) in self._seen(collection).items()
            }
            return background.together(backgrounds.pop(collection), *backgrounds.values())

        return await self._run(read)

    async def keyword_search(
        self,
        collection: str,
        query: str,
        count: int,
        *,
        field: str | None = None,
        every: bool = False,
        modalities: Sequence[str] | None = None,
        filter: Filter | None = None,
        leave_out: str | None = None,
    ) -> list[Hit]:
        def read(connection: sqlite3.Connection) -> list[Hit]:
            with self._one_moment(connection, collection) as seen:
                key, index, views = seen[collection]
                known = [keywords.TEXT, *keywords.fields(connection, key)]
                if field is not None and field not in known:
                    raise InvalidRequest(
                        f"keywords.field: {field!r} is no keyword field of the collection {collection!r}: "
                        f"it has {', '.join(known)}"
                    )
                among = None
                if filter is not None:
                    slots = index.matching(filter, SlotReader(connection, key, self._dimensions), views)
                    among = rows.keys_of_slots(connection, key, slots)
                matches = keywords.search(
                    connection,
                    key,
                    query,
                    count + bool(leave_out),
                    field=field,
                    modalities=modalities,
                    among=among,
                    every=every,
                )
                items = rows.items_by_key(connection, [each for each, _ in matches], with_vector=True)
            hits = [Hit(items[each], score) for each, score in matches if items[each].id != leave_out]
            return hits[:count]

        return await self._run(read)

    async def tokens(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        return await self._read(
            lambda connection: tokens.of_items(connection, _collection_key(connection, collection), ids)
        )

    # Collections

    async def collections(self) -> list[Collection]:
        return list(await self._read(rows.collections))

    async def collection(self, name: str) -> Collection:
        def read(connection: sqlite3.Connection) -> Collection:
            collection = rows.collection(connection, name)
            if collection is None:
                raise NotFound(f"no collection {name!r}")
            return collection

        return await self._read(read)

    async def parts(self, name: str) -> list[Part]:
        def read(connection: sqlite3.Connection) -> list[Part]:
            key = _collection_key(connection, name)
            index = self._indexes.get(key)
            described = []
            for modality, view in sorted(index.views().items() if index else ()):
                kind, precision = (
                    (view.built.chosen.kind, view.built.chosen.precision) if view.built else ("flat", "float32")
                )
                living = view.count - view.dead
                indexed = int(np.count_nonzero(view.alive[: view.indexed]))
                building = self._builder.building == (key, modality)
                if living:
                    described.append(Part(modality, kind, precision, living, indexed, building))
            return described

        return await self._read(read)

    async def create_collection(self, name: str, wanted: IndexRequest | None = None) -> bool:
        def write(transaction: Transaction) -> bool:
            self._disk.check()
            before = len(transaction.changes)
            key = self._ensure(transaction, name)
            created = len(transaction.changes) > before
            if wanted is not None:
                rows.configure_collection(transaction.connection, key, wanted)
                transaction.changes.append(Configure(key, name, wanted))
            return created

        return await self._write(write)

    async def keyword_fields(self, collection: str) -> list[str]:
        return await self._read(lambda connection: keywords.fields(connection, _collection_key(connection, collection)))

    async def set_keyword_fields(self, collection: str, fields: Sequence[str]) -> None:
        """Set the keyword fields, and index the present items in the same transaction."""

        def write(transaction: Transaction) -> None:
            self._disk.check()
            keywords.set_fields(transaction.connection, _collection_key(transaction.connection, collection), fields)

        await self._write(write)

    async def keeps_tokens(self, collection: str) -> bool:
        def read(connection: sqlite3.Connection) -> bool:
            key = rows.collection_key(connection, collection)
            return key is not None and tokens.kept(connection, key)

        return await self._read(read)

    async def keep_tokens(self, collection: str, wanted: bool) -> None:
        await self._write(
            lambda transaction: tokens.keep(
                transaction.connection, _collection_key(transaction.connection, collection), wanted
            )
        )

    async def drop_collection(self, name: str) -> None:
        def write(transaction: Transaction) -> None:
            table = rows.collection_key(transaction.connection, moments.moments_table(name))
            for key in (_collection_key(transaction.connection, name), table):
                if key is not None:
                    rows.drop_collection(transaction.connection, key)
                    transaction.changes.append(Drop(key))

        await self._write(write)

    def _ensure(self, transaction: Transaction, name: str) -> int:
        key, created = rows.ensure_collection(transaction.connection, name, self._space, self._dimensions)
        if created:
            transaction.changes.append(Configure(key, name, IndexRequest()))
        return key

    # Label sets

    async def put_label_set(self, name: str, definition: Mapping[str, Any], vectors: Mapping[str, Vectors]) -> None:
        def write(transaction: Transaction) -> None:
            self._disk.check()
            labels.put_label_set(transaction.connection, name, self._space, definition, vectors)

        await self._write(write)

    async def label_set(self, name: str) -> LabelSet:
        def read(connection: sqlite3.Connection) -> LabelSet:
            with _one_view(connection):
                label_set = labels.label_set(connection, name, self._dimensions)
            if label_set is None:
                raise NotFound(f"no label set {name!r}")
            return label_set

        return await self._read(read)

    async def label_sets(self, after: str, limit: int) -> list[ListedLabelSet]:
        return await self._read(lambda connection: labels.listed(connection, after, limit))

    async def label_set_version(self, name: str) -> str:
        def read(connection: sqlite3.Connection) -> str:
            version = labels.version(connection, name)
            if version is None:
                raise NotFound(f"no label set {name!r}")
            return version

        return await self._read(read)

    async def delete_label_set(self, name: str) -> None:
        def write(transaction: Transaction) -> None:
            if not labels.delete_label_set(transaction.connection, name):
                raise NotFound(f"no label set {name!r}")

        await self._write(write)

    async def _write(self, operation: Callable[[Transaction], T], *, alone: bool = False) -> T:
        return await asyncio.wrap_future(self._writer.submit(operation, alone=alone))

    async def _read(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run a function that reads rows. No later search shows an older state of them."""

        def read(connection: sqlite3.Connection) -> T:
            result = function(connection)
            if schema.sequence(connection) > self._writer.applied:
                with self._writer.committing:
                    pass
            return result

        return await self._run(read)

    def _seen(self, collection: str) -> _Seen:
        """Return the current views of a collection. Raises NotFound."""
        keys, indexes, seen = self._keys, self._indexes, {}
        for name in (collection, moments.moments_table(collection)):
            if (key := keys.get(name)) is not None and key in indexes:
                seen[name] = (key, indexes[key], indexes[key].views())
        if collection not in seen:
            raise NotFound(f"no collection {collection!r}")
        return seen

    def _seen_together(self, collection: str) -> _Seen:
        """Return what _seen does; where there are moments, the views of them and of the items show the same commit."""
        applied, seen = self._writer.applied, self._seen(collection)
        if len(seen) > 1 and self._writer.sequence != applied:
            with self._writer.committing:
                return self._seen(collection)
        return seen

    @contextmanager
    def _one_moment(self, connection: sqlite3.Connection, collection: str) -> Iterator[_Seen]:
        """Yield the views of a collection; inside the block the rows show the same commit.

        The indexes follow the rows by a moment, in which what they show may have been replaced. Nobody waits for a
        disk here: who comes just then waits until the indexes show what is on it already.
        """
        connection.execute("BEGIN")
        try:
            # In this order: a later commit that the views show is in the rows too.
            applied, seen = self._writer.applied, self._seen(collection)
            if schema.sequence(connection) != applied:
                connection.execute("COMMIT")
                with self._writer.committing:
                    connection.execute("BEGIN")
                    seen = self._seen(collection)
                    if schema.sequence(connection) != self._writer.applied:
                        raise NotReady(BEHIND)
            yield seen
        finally:
            if connection.in_transaction:
                connection.execute("COMMIT")

    async def _run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            if not hasattr(self._thread, "connection"):
                self._thread.connection = self._reader()
                # A read whose client went away, or whose deadline is over, ends in the middle.
                self._thread.connection.set_progress_handler(abandoned, _STEPS)
            try:
                return function(self._thread.connection)
            except sqlite3.DatabaseError as error:
                code = _primary_code(error)
                if code not in (*_UNWRITABLE, *_CORRUPT):
                    if code == sqlite3.SQLITE_INTERRUPT or not isinstance(error, sqlite3.OperationalError):
                        raise
                    _log.exception("an operation failed in SQLite")
                    raise NotReady("the store cannot be read now") from None
                self._damaged = self._damaged or code in _CORRUPT
                _log.exception("the store cannot be read: stop the server, and run `python -m service check` on it")
                raise NotReady("the store cannot be read") from None

        if self._closed:
            raise NotReady("the store is closed")
        return await self._readers.run(run)


class _Replaced(Exception):
    """A row that an index shows is not there any more."""


@contextmanager
def _one_view(connection: sqlite3.Connection) -> Iterator[None]:
    """Run a block in a read transaction: it sees the state at its first read, whatever is written meanwhile."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("COMMIT")


def _collection_key(connection: sqlite3.Connection, name: str) -> int:
    key = rows.collection_key(connection, name)
    if key is None:
        raise NotFound(f"no collection {name!r}")
    return key


class _Library:
    """The store as the builder sees it."""

    def __init__(self, store: SqliteStore, connection: sqlite3.Connection) -> None:
        self._store, self._connection = store, connection

    def indexes(self) -> Mapping[int, Index]:
        return self._store._indexes

    def reader(self, collection: int) -> SlotReader:
        return SlotReader(self._connection, collection, self._store._dimensions)

    def save(self, collection: int, modality: str, built: IndexSnapshot | None, slots: Keys) -> None:
        store = self._store
        if built is None:
            snapshot.forget(store._snapshot, collection, modality)
        elif collection in store._indexes:
            saved = snapshot.Saved(collection, modality, built, slots)
            snapshot.save(store._snapshot, store._id, store._writer.sequence, saved)


def hold(path: Path) -> int:
    """Lock a directory, made if need be, for this process until the descriptor is closed. Raises StoreError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StoreError(f"the store {path} cannot be written: {error.strerror}") from None
    try:
        # The process holds the lock until it ends: a second server over the same rows would serve a stale index.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise StoreInUse(f"the store {path} is open in another process: each server needs its own") from None
    return lock


def _reason(path: Path, error: Exception) -> StoreError:
    if isinstance(error, sqlite3.Error) and _primary_code(error) in _UNWRITABLE:
        return StoreError(f"the store {path} cannot be written: {error}")
    return StoreDamaged(
        f"the store {path} cannot be read: {error}; `python -m service check {path}` says more, and "
        "`python -m service restore` brings a backup back"
    )


def _primary_code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
