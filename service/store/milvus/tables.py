"""Queries to Milvus: rows by key, rows that meet a condition, counts, and the entries of the catalogue.

A collection is named as clients name it; None is the catalogue.
"""

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from service.errors import NotFound, NotReady
from service.store.milvus import layout
from service.store.milvus.connection import NO_ANSWER, Connection, NoCollection, NotLoaded

BATCH = 1_000
"""Rows in one call of a write, and keys in one expression."""
MOST = 16_384
"""Largest number of rows that Milvus returns for one query or search."""
STRONG: Mapping[str, Any] = {"consistency_level": "Strong"}
"""Consistency level under which every acknowledged write of any process can be read."""
COUNT: Mapping[str, Any] = {"output_fields": ["count(*)"], **STRONG}


class Tables:
    """Reads and writes rows. Raises NotFound where a collection is not there, NotReady where Milvus does not answer."""

    def __init__(self, connection: Connection, dimensions: int) -> None:
        self._connection = connection
        self._dimensions = dimensions

    async def read(self, collection: str | None, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of pymilvus.MilvusClient that takes a collection first."""
        return await self._call(self._connection.read, collection, method, *arguments, **options)

    async def write(self, collection: str | None, method: str, *arguments: Any, **options: Any) -> Any:
        return await self._call(self._connection.write, collection, method, *arguments, **options)

    async def _call(self, how: Any, collection: str | None, method: str, *arguments: Any, **options: Any) -> Any:
        name = layout.CATALOGUE if collection is None else layout.collection_name(collection)
        try:
            try:
                return await how(method, name, *arguments, **options)
            except NotLoaded:
                await self._connection.read("load_collection", name)
                return await how(method, name, *arguments, **options)
        except NoCollection:
            if collection is None:
                raise NotReady(NO_ANSWER) from None
            raise NotFound(f"no collection {collection!r}") from None
        except NotLoaded:
            raise NotReady(NO_ANSWER) from None

    async def rows(
        self, collection: str | None, keys: Sequence[str], output: Sequence[str]
    ) -> dict[str, dict[str, Any]]:
        """Return the rows with these keys that are there, by key."""
        rows_by_key: dict[str, dict[str, Any]] = {}
        # Ask Milvus even without keys, to learn whether the collection exists.
        for start in range(0, max(1, len(keys)), BATCH):
            condition = layout.among("id", keys[start : start + BATCH] or ["-"])
            rows = await self.read(
                collection, "query", filter=condition, output_fields=list(output), limit=BATCH, **STRONG
            )
            rows_by_key |= {row["id"]: row for row in rows}
        return rows_by_key

    async def scan(
        self, collection: str | None, condition: str, output: Sequence[str], batch: int = BATCH
    ) -> AsyncIterator[Sequence[dict[str, Any]]]:
        """Yield all rows that meet a condition, in batches, in the order of their keys."""
        rows = await self.read(
            collection,
            "query_iterator",
            batch_size=min(batch, MOST),
            filter=condition,
            output_fields=list(output),
            **STRONG,
        )
        while batch_rows := await self._connection.next(rows):
            yield batch_rows

    async def count(self, collection: str, condition: str = "") -> int:
        rows = await self.read(collection, "query", filter=condition, **COUNT)
        return int(rows[0]["count(*)"])

    async def delete(self, collection: str | None, keys: Sequence[str]) -> None:
        for start in range(0, len(keys), BATCH):
            await self.write(collection, "delete", ids=list(keys[start : start + BATCH]))

    async def note(self, id: str) -> dict[str, Any] | None:
        """Return a row of the catalogue."""
        rows = await self.rows(None, [id], ["id", "content"])
        return json.loads(rows[id]["content"]) if rows else None

    async def put_note(self, id: str, content: Mapping[str, Any]) -> None:
        await self.write(None, "upsert", [layout.note(id, content, self._dimensions)])
