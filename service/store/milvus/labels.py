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


async def put(
    tables: Tables,
    name: str,
    definition: Mapping[str, Any],
    vectors: Mapping[str, Vectors],
    space: str,
    dimensions: int,
) -> None:
    older = await tables.note(f"labels/{name}")
    version, at = uuid.uuid4().hex, now()
    texts = layout.pieces(json.dumps(dict(definition), ensure_ascii=False))
    head = {
        "version": version,
        "space": space,
        "created": at if older is None else older["created"],
        "updated": at,
        "texts": len(texts),
        "vectors": {digest: len(array) for digest, array in vectors.items()},
    }
    rows = [layout.piece(id, text, dimensions) for id, text in zip(_texts(head), texts, strict=True)]
    for digest, ids in _vectors(head).items():
        rows += [layout.vector_row(id, vector) for id, vector in zip(ids, vectors[digest], strict=True)]
    for start in range(0, len(rows), BATCH):
        await tables.write(None, "upsert", rows[start : start + BATCH])
    await tables.put_note(f"labels/{name}", head)
    if older is not None:
        await tables.delete(None, _pieces(older))


async def get(tables: Tables, name: str, dimensions: int) -> LabelSet:
    for _ in range(_LOOKS):
        head = await _head(tables, name)
        rows = await tables.rows(None, _pieces(head), ["id", "content", "vector"])
        try:
            text = "".join(rows[id]["content"] for id in _texts(head))
            vectors = {digest: layout.stacked(rows, ids, dimensions) for digest, ids in _vectors(head).items()}
        except KeyError:  # replaced between the two
            continue
        return LabelSet(name, head["space"], json.loads(text), head["created"], head["updated"], vectors)
    raise NotReady(NO_ANSWER)


async def listed(tables: Tables, after: str, limit: int) -> list[ListedLabelSet]:
    heads: dict[str, str] = {}
    async for batch in tables.scan(None, f'id like "labels/%" and id > "labels/{after}"', ["id", "content"]):
        heads |= {row["id"].removeprefix("labels/"): row["content"] for row in batch}
        heads = {name: heads[name] for name in sorted(heads)[:limit]}  # no more than are listed stay in memory
    listing = [(name, json.loads(head)) for name, head in heads.items()]
    return [ListedLabelSet(name, head["created"], head["updated"]) for name, head in listing]


async def version(tables: Tables, name: str) -> str:
    return str((await _head(tables, name))["version"])


async def delete(tables: Tables, name: str) -> None:
    head = await _head(tables, name)
    await tables.delete(None, [f"labels/{name}"])
    await tables.delete(None, _pieces(head))


async def _head(tables: Tables, name: str) -> dict[str, Any]:
    head = await tables.note(f"labels/{name}")
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
