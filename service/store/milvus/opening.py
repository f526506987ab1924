"""A process makes or checks the catalogue when it starts. These functions block."""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from service.contract.bundle import Manifest
from service.errors import NotReady
from service.store.errors import SpaceMismatch, StoreDamaged, filled_elsewhere
from service.store.kinds import REPLACED, IndexRequest
from service.store.milvus import layout
from service.store.milvus.connection import Connection
from service.store.milvus.tables import COUNT, STRONG
from service.store.schema import DEFAULT_COLLECTION

_VERSION = 1
_PREFIX = f"{layout.CATALOGUE}_"

_log = logging.getLogger(__name__)


def prepare(connection: Connection, manifest: Manifest) -> None:
    """Make the catalogue and the default collection, or check that those that exist are of this space.

    Raises SpaceMismatch, StoreDamaged (another version), NotReady.
    """
    call, dimensions = connection.call_now, manifest.dimensions
    names = set(call("list_collections"))
    if layout.CATALOGUE in names:
        # A restarted Milvus Lite has nothing in memory.
        for name in names:
            if name == layout.CATALOGUE or name.startswith(_PREFIX):
                call("load_collection", name)
        entry = _note(connection, layout.STORE)
        if entry is not None and not _kept(connection, manifest, entry, names):
            call("drop_collection", layout.CATALOGUE)
            names.remove(layout.CATALOGUE)
    if layout.CATALOGUE not in names:
        make(connection, layout.CATALOGUE, layout.catalogue_schema(connection.client, dimensions))
    _put_note(connection, layout.STORE, {"version": _VERSION, "space": manifest.space}, dimensions)
    _replace_kinds(connection, dimensions)
    if _note(connection, f"collection/{DEFAULT_COLLECTION}") is None:
        name = layout.collection_name(DEFAULT_COLLECTION)
        make(connection, name, layout.items_schema(connection.client, dimensions))
        _put_note(connection, f"collection/{DEFAULT_COLLECTION}", layout.description(IndexRequest()), dimensions)


def make(connection: Connection, name: str, schema: Any, request: IndexRequest = IndexRequest()) -> None:
    """Make a collection of Milvus, ready to be searched."""
    call = connection.call_now
    for step, options in (
        ("create_collection", {"schema": schema, **STRONG}),
        # The collection is empty, so there is no index to wait for.
        ("create_index", {"index_params": layout.index(connection.client, request), "sync": False}),
    ):
        try:
            call(step, name, **options)
        except NotReady:
            # Another process may have made it at this moment.
            if not call("has_collection", name):
                raise
    call("load_collection", name)


def _kept(connection: Connection, manifest: Manifest, entry: Mapping[str, Any], collections: Iterable[str]) -> bool:
    """Return whether what is stored is kept; where it cannot be, and it is nothing, its collections are dropped."""
    if entry["version"] != _VERSION:
        raise StoreDamaged(f"the store in Milvus has version {entry['version']}; this service reads {_VERSION}")
    if manifest.accepts(entry["space"]):
        return True
    ours = [name for name in collections if name.startswith(_PREFIX)]
    counted = [connection.call_now("query", name, filter="", **COUNT) for name in ours]
    sets = connection.call_now(
        "query", layout.CATALOGUE, filter='id like "labels/%"', output_fields=["id"], limit=1, **STRONG
    )
    if sets or any(rows[0]["count(*)"] for rows in counted):
        message = filled_elsewhere("the store in Milvus", entry["space"], None, manifest)
        raise SpaceMismatch(
            f"{message} Serve the bundle that filled it, or name another database in ISTHMUS_MILVUS_URI and store the "
            "items there again"
        )
    for name in ours:
        connection.call_now("drop_collection", name)
    return False


def _replace_kinds(connection: Connection, dimensions: int) -> None:
    """Build anew the indexes of collections whose kind there is no more. They cannot be searched meanwhile."""
    call = connection.call_now
    rows = call("query", layout.CATALOGUE, filter='id like "collection/%"', output_fields=["id", "content"], **STRONG)
    for row in rows:
        description = json.loads(row["content"])
        kind = description["kind"]
        if kind not in REPLACED:
            continue
        spec = IndexRequest.stored(kind, description["precision"])
        _log.warning("a collection has an index of kind %s, which there is no more: %s replaces it", kind, spec.kind)
        name = layout.collection_name(row["id"].removeprefix("collection/"))
        call("release_collection", name)
        for index in call("list_indexes", name):
            call("drop_index", name, index)
        call("create_index", name, index_params=layout.index(connection.client, spec), sync=False)
        _put_note(connection, row["id"], description | {"kind": spec.kind}, dimensions)
        call("load_collection", name)


def _note(connection: Connection, id: str) -> dict[str, Any] | None:
    query = {"filter": layout.among("id", [id]), "output_fields": ["content"], "limit": 1, **STRONG}
    rows = connection.call_now("query", layout.CATALOGUE, **query)
    return json.loads(rows[0]["content"]) if rows else None


def _put_note(connection: Connection, id: str, content: Mapping[str, Any], dimensions: int) -> None:
    connection.call_now("upsert", layout.CATALOGUE, [layout.note(id, content, dimensions)])
