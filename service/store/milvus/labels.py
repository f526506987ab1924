"""Label sets in the catalogue: an entry lists the pieces of a set, and no two versions share a piece.

So a set is replaced by one write, and whoever reads it meanwhile reads the one or the other.
"""

import json
import uuid
from collections.abc import Mapping
from typing import Any

from service.contract.vectors import Vectors
from service.errors import NotFound, NotReady
from service.store.labels import LabelSet, ListedLabelSet
from service.store.milvus import layout
from service.store.milvus.connection import NO_ANSWER
from service.store.milvus.tables import BATCH, Tables
from service.store.schema import now

_LOOKS = 4
"""Tries to read a set that is replaced meanwhile."""


class LabelSets:
    """Keeps the label sets of MilvusStore. Store describes the methods."""

    _tables: Tables
    _space: str
    _dimensions: int

    async def put_label_set(self, name: str, definition: Mapping[str, Any], vectors: Mapping[str, Vectors]) -> None:
        older = await self._tables.note(f"labels/{name}")
        version, at = uuid.uuid4().hex, now()
        texts = layout.pieces(json.dumps(dict(definition), ensure_ascii=False))
        head = {
            "version": version,
            "space": self._space,
            "created": at if older is None else older["created"],
            "updated": at,
            "texts": len(texts),
            "vectors": {digest: len(array) for digest, array in vectors.items()},
        }
        rows = [layout.piece(id, text, self._dimensions) for id, text in zip(_texts(head), texts, strict=True)]
        for digest, ids in _vectors(head).items():
            rows += [layout.vector_row(id, vector) for id, vector in zip(ids, vectors[digest], strict=True)]
        for start in range(0, len(rows), BATCH):
            await self._tables.write(None, "upsert", rows[start : start + BATCH])
        await self._tables.put_note(f"labels/{name}", head)
        if older is not None:
            await self._tables.delete(None, _pieces(older))

    async def label_set(self, name: str) -> LabelSet:
        for _ in range(_LOOKS):
            head = await self._head(name)
            rows = await self._tables.rows(None, _pieces(head), ["id", "content", "vector"])
            try:
                text = "".join(rows[id]["content"] for id in _texts(head))
                vectors = {
                    digest: layout.stacked(rows, ids, self._dimensions) for digest, ids in _vectors(head).items()
                }
            except KeyError:  # replaced between the two
                continue
            return LabelSet(name, head["space"], json.loads(text), head["created"], head["updated"], vectors)
        raise NotReady(NO_ANSWER)

    async def label_sets(self, after: str, limit: int) -> list[ListedLabelSet]:
        heads: dict[str, str] = {}
        condition = f'id like "labels/%" and id > "labels/{after}"'
        async for batch in self._tables.scan(None, condition, ["id", "content"]):
            heads |= {row["id"].removeprefix("labels/"): row["content"] for row in batch}
            heads = {name: heads[name] for name in sorted(heads)[:limit]}  # no more than are listed stay in memory
        listing = [(name, json.loads(head)) for name, head in heads.items()]
        return [ListedLabelSet(name, head["created"], head["updated"]) for name, head in listing]

    async def label_set_version(self, name: str) -> str:
        return str((await self._head(name))["version"])

    async def delete_label_set(self, name: str) -> None:
        head = await self._head(name)
        await self._tables.delete(None, [f"labels/{name}"])
        await self._tables.delete(None, _pieces(head))

    async def _head(self, name: str) -> dict[str, Any]:
        head = await self._tables.note(f"labels/{name}")
        if head is None:
            raise NotFound(f"no label set {name!r}")
        return head


def _texts(head: Mapping[str, Any]) -> list[str]:
    return [f"part/{head['version']}/{place:06}" for place in range(head["texts"])]


def _vectors(head: Mapping[str, Any]) -> dict[str, list[str]]:
    return {
        digest: [f"part/{head['version']}/{number}/{place:06}" for place in range(count)]
        for number, (digest, count) in enumerate(head["vectors"].items())
    }


def _pieces(head: Mapping[str, Any]) -> list[str]:
    return [*_texts(head), *(id for ids in _vectors(head).values() for id in ids)]
