"""Layout of a store in a Milvus database: names and fields of collections, and conversion of rows to and from items.

isthmus          the catalogue: one row for the store, one for each collection, and the label sets, in pieces
isthmus_NAME     the items of a collection; what a Milvus name may not hold is written as _ and two hexadecimal digits
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import orjson

from service.contract.vectors import Vectors
from service.errors import InvalidRequest
from service.store.items import Entry, Item
from service.store.kinds import IndexRequest
from service.store.milvus.filters import MAX_TERMS, fields, terms
from service.store.schema import now

CATALOGUE = "isthmus"
STORE = "store"
"""The catalogue's row of the store itself."""
ITEM = ["id", "modality", "metadata", "created", "updated"]
_TEXT_BYTES = 65_535
"""The longest VARCHAR."""
_ID_BYTES = 3_072
"""Longest id in bytes: 256 characters of four bytes, each written as %XX."""
_INDEXES: Mapping[str, tuple[str, Mapping[str, int]]] = {
    "auto": ("HNSW", {"M": 16, "efConstruction": 100}),
    "hnsw": ("HNSW", {"M": 16, "efConstruction": 100}),
    "flat": ("FLAT", {}),
}


def check_index(request: IndexRequest) -> None:
    """Raises InvalidRequest. Kinds with codes are left out: their scores would not be those of the stored vectors."""
    if request.kind not in _INDEXES or request.precision not in (None, "float32"):
        raise InvalidRequest(f"index: a Milvus store has {', '.join(_INDEXES)}, of float32")


def collection_name(name: str) -> str:
    return "isthmus_" + re.sub(r"[^A-Za-z0-9]", lambda match: f"_{ord(match[0]):02x}", name)


def items_schema(client: Any, dimensions: int) -> Any:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=_ID_BYTES)
    schema.add_field("modality", DataType.VARCHAR, max_length=16)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimensions)
    schema.add_field("metadata", DataType.VARCHAR, max_length=_TEXT_BYTES)
    schema.add_field("created", DataType.VARCHAR, max_length=40)
    schema.add_field("updated", DataType.VARCHAR, max_length=40)
    schema.add_field("terms", DataType.ARRAY, element_type=DataType.INT64, max_capacity=MAX_TERMS)
    schema.add_field("fields", DataType.JSON)
    return schema


def catalogue_schema(client: Any, dimensions: int) -> Any:
    from pymilvus import DataType

    schema = client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=1_024)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimensions)
    schema.add_field("content", DataType.VARCHAR, max_length=_TEXT_BYTES)
    return schema


def index(client: Any, request: IndexRequest) -> Any:
    kind, parameters = _INDEXES[request.kind]
    parameters_of_index = client.prepare_index_params()
    # The inner product of unit vectors is the cosine, so Milvus need not normalise them again.
    parameters_of_index.add_index("vector", index_type=kind, metric_type="IP", params=dict(parameters))
    return parameters_of_index


def key(id: str) -> str:
    """Return an id as it stands in Milvus: in an expression it needs no quoting."""
    return quote(id, safe="-._~/:@ +,=")


def row(entry: Entry, created: str, updated: str) -> dict[str, Any]:
    """Raises InvalidRequest for metadata of more parts than can be filtered by."""
    numbers = terms(entry.metadata)
    if len(numbers) > MAX_TERMS:
        raise InvalidRequest(
            f"the metadata of {entry.id!r} have {len(numbers)} parts to filter by, and a Milvus store keeps {MAX_TERMS}"
        )
    return {
        "id": key(entry.id),
        "modality": entry.modality,
        "vector": np.ascontiguousarray(entry.vector, np.float32),
        "metadata": json.dumps(dict(entry.metadata), ensure_ascii=False, allow_nan=False, separators=(",", ":")),
        "created": created,
        "updated": updated,
        "terms": numbers,
        "fields": fields(entry.metadata),
    }


def item(collection: str, row: Mapping[str, Any]) -> Item:
    vector = row.get("vector")
    return Item(
        collection,
        unquote(row["id"]),
        row["modality"],
        orjson.loads(row["metadata"]),
        row["created"],
        row["updated"],
        None if vector is None else np.asarray(vector, np.float32),
    )


def among(field: str, values: Iterable[str]) -> str:
    """Return the condition that a field has one of the values, which are keys or own words and need no quoting."""
    quoted = ", ".join(f'"{value}"' for value in values)
    return f"{field} in [{quoted}]"


def both(*expressions: str | bool) -> str:
    return " and ".join(f"({expression})" for expression in expressions if isinstance(expression, str) and expression)


# The catalogue's rows


def description(request: IndexRequest) -> dict[str, Any]:
    """Return the description of a new collection."""
    return {"kind": request.kind, "precision": request.precision, "created": now()}


def note(id: str, content: Mapping[str, Any], dimensions: int) -> dict[str, Any]:
    return piece(id, orjson.dumps(content).decode(), dimensions)


def piece(id: str, content: str, dimensions: int) -> dict[str, Any]:
    # Every row of a Milvus collection must have a vector, even one without meaning.
    return {"id": id, "vector": np.eye(1, dimensions, dtype=np.float32)[0], "content": content}


def pieces(text: str) -> list[str]:
    """Return a text cut into what a row holds: of four bytes a character at most."""
    size = _TEXT_BYTES // 4
    return [text[start : start + size] for start in range(0, len(text), size)]


def vector_row(id: str, vector: Vectors) -> dict[str, Any]:
    return {"id": id, "vector": np.ascontiguousarray(vector, np.float32), "content": ""}


def stacked(rows: Mapping[str, Mapping[str, Any]], ids: Sequence[str], dimensions: int) -> Vectors:
    """Return the rows' vectors (N, D). Raises KeyError where a row is missing."""
    vectors = [np.asarray(rows[id]["vector"], np.float32) for id in ids]
    return np.stack(vectors) if vectors else np.empty((0, dimensions), np.float32)
