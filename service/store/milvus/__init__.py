"""Any number of service processes share a store in Milvus. decisions/0015 says what differs from SQLite.

Reads are strongly consistent, so that what one process has written the next search of any other finds. Milvus has no
transactions: an upsert of one collection is one call, and one of several collections may be done in part where Milvus
fails in between; writing it again puts that right.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import orjson

from service.contract.bundle import Manifest
from service.contract.vectors import Vectors
from service.errors import InvalidRequest, NotFound, NotReady
from service.store import cursors, moments
from service.store.browsing import Facets, Order
from service.store.errors import StoreError
from service.store.filters import Filter, Is, passes
from service.store.interface import Hit, Part, Store, VectorSearch
from service.store.items import Collection, Entry, Item, Metadata, Moment
from service.store.kinds import Effort, IndexRequest, Kind
from service.store.milvus import layout, opening
from service.store.milvus.connection import Connection, NoCollection, NotLoaded
from service.store.milvus.filters import translate
from service.store.milvus.labels import LabelSets
from service.store.milvus.tables import BATCH, MOST, STRONG, Tables
from service.store.schema import now

_RESULTS = 65_536
"""Largest number of results of one search call, over all its queries."""
_EF = 128
_MAP_S = 60


class MilvusStore(LabelSets, Store):
    """Keeps the store in one database of Milvus. Store describes the methods."""

    kind = "Milvus"
    shared = True

    def __init__(self, connection: Connection, manifest: Manifest) -> None:
        """Use open() instead of calling this."""
        self._connection = connection
        self._tables = Tables(connection, manifest.dimensions)
        self._space = manifest.space
        self._modalities = sorted(manifest.stored_modalities)
        self._dimensions = manifest.dimensions
        self._closed = False

    @classmethod
    def open(cls, uri: str, token: str | None, timeout_s: float, manifest: Manifest) -> "MilvusStore":
        """Open or create the store in the database that the address names. Blocks: call it before serving.

        Raises StoreError where Milvus does not answer, and SpaceMismatch.
        """
        connection = Connection(uri, token, timeout_s)
        try:
            opening.prepare(connection, manifest)
        except BaseException as error:
            connection.close()
            if isinstance(error, NotReady | NoCollection | NotLoaded):
                raise StoreError("ISTHMUS_MILVUS_URI: the Milvus there fails; the log says how") from None
            raise
        return cls(connection, manifest)

    async def ready(self) -> bool:
        try:
            return not self._closed and await self._tables.note(layout.STORE) is not None
        except (NotReady, NotFound):
            return False

    async def writable(self) -> bool:
        return await self.ready()

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            await asyncio.to_thread(self._connection.close)

    # Items

    async def upsert(self, entries: Sequence[Entry]) -> None:
        by_collection: dict[str, list[Entry]] = {}
        for entry in (*entries, *moments.entries(entries)):
            by_collection.setdefault(entry.collection, []).append(entry)
        at = now()
        # Refused before anything is written.
        rows = {name: [layout.row(entry, at, at) for entry in mine] for name, mine in by_collection.items()}
        for name, mine in by_collection.items():
            await self._forget_moments(name, [entry.id for entry in mine])
        for name, batch in rows.items():
            try:
                await self._upsert(name, batch)
            except NotFound:
                await self.create_collection(name)
                await self._upsert(name, batch)

    async def _upsert(self, name: str, rows: list[dict[str, Any]]) -> None:
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            rows_by_key = await self._tables.rows(name, [row["id"] for row in batch], ["id", "created"])
            for row in batch:
                row["created"] = rows_by_key[row["id"]]["created"] if row["id"] in rows_by_key else row["created"]
            await self._tables.write(name, "upsert", batch)

    async def get(self, collection: str, id: str, with_vector: bool = False) -> Item:
        key = layout.key(id)
        rows = await self._tables.rows(collection, [key], [*layout.ITEM, *(["vector"] if with_vector else [])])
        if key not in rows:
            raise NotFound(f"no item {id!r} in the collection {collection!r}")
        return layout.item(collection, rows[key])

    async def holds(self, collection: str, id: str) -> bool:
        try:
            return bool(await self._tables.rows(collection, [layout.key(id)], ["id"]))
        except NotFound:
            return False

    async def vectors(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        rows = await self._tables.rows(collection, [layout.key(id) for id in ids], ["id", "vector"])
        vectors = {}
        for id in ids:
            if (row := rows.get(layout.key(id))) is None:
                raise NotFound(f"no item {id!r} in the collection {collection!r}")
            vectors[id] = np.asarray(row["vector"], np.float32)
        return vectors

    async def facets(
        self, collection: str, keys: Sequence[str] = (), *, modality: str | None = None, filter: Filter | None = None
    ) -> Facets:
        if keys or filter is not None:
            raise InvalidRequest("key, filter: a Milvus store counts the items of each modality only")
        counts = {
            part.modality: part.count for part in await self.parts(collection) if modality in (None, part.modality)
        }
        return Facets(sum(counts.values()), counts)

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
        if filter is not None or order is not None:
            raise InvalidRequest("filter, sort, order: a Milvus store lists items by their ids only")
        every = [described.name for described in await self._described() if not described.name.startswith(".")]
        names = every if collection is None else [collection]
        first, after = ("", "") if cursor is None else _place(cursor)
        items: list[Item] = []
        for name in names:
            if name < first:
                continue
            condition = layout.both(
                f'id > "{after}"' if name == first and after else True,
                True if modality is None else layout.among("modality", [modality]),
            )
            try:
                async for batch in self._tables.scan(name, condition, layout.ITEM, batch=limit + 1 - len(items)):
                    items += [layout.item(name, row) for row in batch]
                    if len(items) > limit:
                        last = items[limit - 1]
                        place = orjson.dumps([last.collection, layout.key(last.id)])
                        return items[:limit], cursors.encoded(place)
            except NotFound:
                if collection is not None:
                    raise
        return items, None

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        keys = list(await self._tables.rows(collection, [layout.key(id) for id in ids], ["id"]))
        await self._tables.delete(collection, keys)
        await self._forget_moments(collection, ids)
        return len(keys)

    async def move(
        self, collection: str, ids: Mapping[str, str], metadata: Mapping[str, Metadata] | None = None
    ) -> int:
        described = metadata or {}
        items = await self._with_vectors(collection, [layout.key(id) for id in ids])
        new_ids = {item.id: ids[item.id] for item in items}
        await self._forget_moments(collection, [new for old, new in new_ids.items() if new != old])
        await self._write_again(
            [replace(item, id=new_ids[item.id], metadata=described.get(item.id, item.metadata)) for item in items]
        )
        with suppress(NotFound):  # most collections have no moments
            table = moments.moments_table(collection)
            for start in range(0, len(new_ids), BATCH):
                owners = Is(moments.OWNER, tuple(list(new_ids)[start : start + BATCH]))
                parts = await self._with_vectors(table, await self._matching(table, owners))
                await self._write_again([moments.moved(part, new_ids, described) for part in parts])
        # Last: where Milvus fails in between, an item is there under both ids, and the same call puts that right.
        await self.delete(collection, [old for old, new in new_ids.items() if new != old])
        return len(new_ids)

    async def _with_vectors(self, collection: str, keys: Sequence[str]) -> list[Item]:
        rows = await self._tables.rows(collection, keys, [*layout.ITEM, "vector"])
        return [layout.item(collection, row) for row in rows.values()]

    async def _write_again(self, items: Sequence[Item]) -> None:
        """Write items with the day of their creation."""
        at = now()
        for item in items:
            assert item.vector is not None
            entry = Entry(item.collection, item.id, item.modality, item.metadata, item.vector)
            await self._upsert(item.collection, [layout.row(entry, item.created, at)])

    async def delete_matching(self, collection: str, filter: Filter) -> int:
        keys = await self._matching(collection, filter)
        await self._tables.delete(collection, keys)
        with suppress(NotFound):  # each has its video's metadata
            table = moments.moments_table(collection)
            await self._tables.delete(table, await self._matching(table, filter))
        return len(keys)

    async def moments_of(self, collection: str, ids: Sequence[str]) -> dict[str, list[Moment]]:
        vectors: dict[str, Vectors] = {}
        with suppress(NotFound):  # most collections have no moments
            table = moments.moments_table(collection)
            for start in range(0, len(ids), BATCH):
                owners = Is(moments.OWNER, tuple(ids[start : start + BATCH]))
                parts = await self._with_vectors(table, await self._matching(table, owners))
                vectors |= {part.id: part.vector for part in parts if part.vector is not None}
        return moments.by_owner(vectors)

    async def _forget_moments(self, collection: str, ids: Sequence[str]) -> None:
        """Delete the moments of these items of a collection."""
        with suppress(NotFound):  # most collections have no moments
            table = moments.moments_table(collection)
            for start in range(0, len(ids), BATCH):
                owners = Is(moments.OWNER, tuple(ids[start : start + BATCH]))
                await self._tables.delete(table, await self._matching(table, owners))

    async def search(self, request: VectorSearch) -> list[list[Hit]]:
        searching = moments.search(request)
        reply: Any = None
        while True:
            try:
                step = searching.send(reply)
            except StopIteration as done:
                return done.value or []
            try:
                if isinstance(step, VectorSearch):
                    reply = await self._find(step)
                else:
                    reply = await self.get(request.collection, step, request.with_vector)
            except NotFound:
                if step is request:
                    raise
                reply = None

    async def _find(self, request: VectorSearch) -> list[list[Hit]]:
        if request.by_modality:
            parts = await asyncio.gather(
                *(
                    self._find(replace(request, modalities=[modality], by_modality=False))
                    for modality in request.modalities or self._modalities
                )
            )
            return [[hit for part in parts for hit in part[query]] for query in range(len(request.queries))]
        collection, queries, effort = request.collection, request.queries, request.effort or Effort()
        depth = request.count + bool(request.leave_out)
        if depth > MOST:
            raise InvalidRequest(f"a Milvus store finds {MOST - 1:,} items at most")
        if effort.exact and (await self.collection(collection)).index_request.kind != "flat":
            raise InvalidRequest("effort.exact: a Milvus store searches exactly where a collection was put as flat")
        among = True if request.modalities is None else layout.among("modality", request.modalities)
        if request.filter is None:
            conditions = [layout.both(among)]
        elif (translated := translate(request.filter)).exact:
            if translated.text is False:
                await self._tables.count(collection)  # it may not be there
                return [[] for _ in queries]
            conditions = [layout.both(among, translated.text)]
        else:
            keys = await self._matching(collection, request.filter)
            conditions = [
                layout.both(among, layout.among("id", keys[start : start + BATCH]))
                for start in range(0, len(keys), BATCH)
            ]
        hits_by_query: list[list[Hit]] = [[] for _ in queries]
        for condition in conditions:
            for hits, more in zip(
                hits_by_query,
                await self._nearest(collection, queries, depth, condition, request.with_vector, effort),
                strict=True,
            ):
                hits += more
        results = []
        for hits, left_out in zip(hits_by_query, request.leave_out or [None] * len(hits_by_query), strict=True):
            hits.sort(key=lambda hit: -hit.score)
            results.append([hit for hit in hits if hit.item.id != left_out][: request.count])
        return results

    async def _nearest(
        self, collection: str, queries: Vectors, count: int, condition: str, with_vector: bool, effort: Effort
    ) -> list[list[Hit]]:
        output = [*layout.ITEM, *(["vector"] if with_vector else [])]
        parameters = {"ef": max(effort.ef_search or _EF, count)}
        together = max(1, _RESULTS // count)
        hits_by_query: list[list[Hit]] = []
        for start in range(0, len(queries), together):
            results = await self._tables.read(
                collection,
                "search",
                data=list(np.ascontiguousarray(queries[start : start + together], np.float32)),
                anns_field="vector",
                limit=count,
                filter=condition,
                output_fields=output,
                search_params={"metric_type": "IP", "params": parameters},
                **STRONG,
            )
            hits_by_query += [
                [Hit(layout.item(collection, hit["entity"]), float(hit["distance"])) for hit in hits]
                for hits in results
            ]
        return hits_by_query

    async def sample(self, collection: str, count: int) -> tuple[list[Item], int]:
        items: list[Item] = []
        async for batch in self._tables.scan(collection, layout.both(True), [*layout.ITEM, "vector"]):
            items += [layout.item(collection, row) for row in batch]
            if len(items) >= count:
                break
        return items[:count], await self._tables.count(collection)

    async def version(self, collection: str) -> str:
        # Milvus does not say when something was last written. A map may be a minute old.
        return str(int(time.monotonic() // _MAP_S))

    # Collections

    async def collections(self) -> list[Collection]:
        return await self._described(counted=True)

    async def collection(self, name: str) -> Collection:
        entry = await self._tables.note(f"collection/{name}")
        if entry is None:
            raise NotFound(f"no collection {name!r}")
        return await self._collection(name, entry, counted=True)

    async def parts(self, name: str) -> list[Part]:
        kind = (await self.collection(name)).index_request.kind
        index_kind: Kind = "hnsw" if kind == "auto" else kind
        counts = await asyncio.gather(
            *(self._tables.count(name, layout.among("modality", [modality])) for modality in self._modalities)
        )
        # Milvus indexes the remaining rows by itself, and does not say of which modality they are.
        return [
            Part(modality, index_kind, "float32", count, count, False)
            for modality, count in zip(self._modalities, counts, strict=True)
            if count
        ]

    async def create_collection(self, name: str, request: IndexRequest | None = None) -> bool:
        if request is not None:
            layout.check_index(request)
        entry = await self._tables.note(f"collection/{name}")
        if entry is not None:
            if request is None or request.kind == entry["kind"]:
                return False
            if await self._tables.count(name):
                raise InvalidRequest("index: a Milvus store changes the index of an empty collection only")
            await self._tables.write(name, "drop_collection")
        request = request or IndexRequest()
        schema = layout.items_schema(self._connection.client, self._dimensions)
        await asyncio.to_thread(opening.make, self._connection, layout.collection_name(name), schema, request)
        await self._tables.put_note(f"collection/{name}", layout.description(request))
        return entry is None

    async def drop_collection(self, name: str) -> None:
        if await self._tables.note(f"collection/{name}") is None:
            raise NotFound(f"no collection {name!r}")
        for collection in (moments.moments_table(name), name):
            with suppress(NotFound):
                await self._tables.write(collection, "drop_collection")
            await self._tables.delete(None, [f"collection/{collection}"])

    async def _described(self, *, counted: bool = False) -> list[Collection]:
        collections = []
        async for batch in self._tables.scan(None, 'id like "collection/%"', ["id", "content"]):
            for row in batch:
                name = row["id"].removeprefix("collection/")
                collections.append(await self._collection(name, orjson.loads(row["content"]), counted=counted))
        return sorted(collections, key=lambda collection: collection.name)

    async def _collection(self, name: str, entry: Mapping[str, Any], *, counted: bool) -> Collection:
        request = IndexRequest.stored(entry["kind"], entry["precision"])
        count = await self._tables.count(name) if counted else 0
        return Collection(name, self._space, self._dimensions, entry["created"], request, count, ())

    async def _matching(self, collection: str, filter: Filter) -> list[str]:
        """Return the keys of the items that pass. Milvus nominates where it cannot say; the metadata decide."""
        translated = translate(filter)
        if translated.text is False:
            await self._tables.count(collection)
            return []
        condition = layout.both(translated.text)
        output = ["id"] if translated.exact else ["id", "metadata"]
        keys: list[str] = []
        async for batch in self._tables.scan(collection, condition, output):
            keys += [row["id"] for row in batch if translated.exact or passes(filter, orjson.loads(row["metadata"]))]
        return keys


def _place(cursor: str) -> tuple[str, str]:
    """Return the collection and the key in a cursor. Raises InvalidRequest for one that no page came with."""
    with suppress(ValueError):
        place = orjson.loads(cursors.decoded(cursor))
        match place:
            # It goes into an expression, so nothing in it may end the string.
            case [str(collection), str(key)] if '"' not in key and "\\" not in key:
                return collection, key
    raise InvalidRequest("the cursor is not one that a page came with")
