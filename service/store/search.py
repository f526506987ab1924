"""Searches of the SQLite store: functions of the views that a search goes by, and of a connection."""

import sqlite3
from collections.abc import Mapping
from typing import Any

import numpy as np

from service.errors import InvalidRequest
from service.store import keywords, moments, previews, rows
from service.store.index import Index, View
from service.store.interface import MOST_FOUND_BYTES, TOO_MUCH_FOUND, Hit, VectorSearch
from service.store.items import Item
from service.store.keywords import KeywordSearch
from service.store.rows import SlotReader

SeenCollection = tuple[int, Index, Mapping[str, View]]
"""Key, index and views of a collection."""
Seen = Mapping[str, SeenCollection]
"""A collection, and its moments if it has any, by name."""


class Replaced(Exception):
    """Raised where a row that an index shows is not there any more."""


def search(connection: sqlite3.Connection, state: Seen, request: VectorSearch, *, one_moment: bool) -> list[list[Hit]]:
    """Search as Store.search does; `one_moment`: the views and the rows show the same commit.

    Raises Replaced where an item that is needed may have been replaced, which cannot be where it is one moment.
    """
    searching = moments.search(request)
    reply: Any = None
    while True:
        try:
            step = searching.send(reply)
        except StopIteration as done:
            hits_by_query: list[list[Hit]] = done.value or []
            break
        if isinstance(step, VectorSearch):
            reply = _nearest(connection, state, step)
        elif one_moment:
            reply = rows.item(connection, state[request.collection][0], step, request.with_vector)
        else:
            raise Replaced
    if request.with_shown:
        ids = {hit.item.id for hits in hits_by_query for hit in hits}
        previews_by_id = previews.shown(connection, state[request.collection][0], ids)
        for hit in (hit for hits in hits_by_query for hit in hits):
            hit.shown = previews_by_id.get(hit.item.id)
    return hits_by_query


def _nearest(connection: sqlite3.Connection, state: Seen, request: VectorSearch) -> list[list[Hit]] | None:
    """Return the nearest items of each query, or None where the collection does not exist.

    Raises Replaced where a row that the index shows does not exist, and InvalidRequest for too much metadata.
    """
    if request.collection not in state:
        return None
    key, index, views = state[request.collection]
    reader = SlotReader(connection, key, index.dimensions)
    # One more than asked for, where one of them may be the item that is left out.
    matches_by_query = index.search(
        request.queries,
        request.count + bool(request.leave_out),
        reader,
        modalities=request.modalities,
        filter=request.filter,
        effort=request.effort,
        views=views,
        by_modality=request.by_modality,
    )
    matches = [match for matches in matches_by_query for match in matches]
    # Most items are in memory: only vectors, and items with long records, are read.
    slots = {match.slot for match in matches if request.with_vector or not match.record}
    items = rows.items_by_slot(connection, key, request.collection, slots, request.with_vector) if slots else {}
    if len(items) < len(slots) or reader.missed:
        raise Replaced
    if sum(len(match.record) for match in matches) > MOST_FOUND_BYTES:
        raise InvalidRequest(TOO_MUCH_FOUND)
    results = []
    left_out_ids = request.leave_out or [None] * len(matches_by_query)
    for matches, left_out in zip(matches_by_query, left_out_ids, strict=True):
        hits = []
        for slot, score, modality, record in matches:
            item = items[slot] if slot in slots else rows.item_of_record(request.collection, modality, record)
            if item.id != left_out:
                hits.append(Hit(item, score))
        results.append(hits if request.by_modality else hits[: request.count])
    return results


def keyword_search(connection: sqlite3.Connection, state: Seen, request: KeywordSearch) -> list[Hit]:
    """Search as Store.keyword_search does; the views and the rows show the same commit."""
    key, index, views = state[request.collection]
    field_names = [keywords.TEXT, *keywords.fields(connection, key)]
    if request.field is not None and request.field not in field_names:
        raise InvalidRequest(
            f"keywords.field: {request.field!r} is no keyword field of the collection {request.collection!r}: "
            f"it has {', '.join(field_names)}"
        )
    among = None
    if request.filter is not None:
        slots = index.matching(request.filter, SlotReader(connection, key, index.dimensions), views)
        among = rows.keys_of_slots(connection, key, slots)
    matches = keywords.search(connection, key, request, among)
    items = rows.items_by_key(connection, [item for item, _ in matches], with_vector=True)
    hits = [Hit(items[item], score) for item, score in matches if items[item].id != request.leave_out]
    return hits[: request.count]


def browsed(
    connection: sqlite3.Connection, state: SeenCollection, modality: str | None
) -> tuple[int, SlotReader, Mapping[str, View]]:
    """Return the key of a collection, a reader of its rows, and its views: of one modality where it is named."""
    key, index, views = state
    views_of_modality = {name: view for name, view in views.items() if modality is None or name == modality}
    return key, SlotReader(connection, key, index.dimensions), views_of_modality


def sample(
    connection: sqlite3.Connection, state: SeenCollection, collection: str, count: int
) -> tuple[list[Item], int]:
    """Sample items as Store.sample does."""
    key, index, views = state
    slots = index.slots(views)
    total = len(slots)
    if total > count:
        slots = np.sort(np.random.default_rng(0).choice(slots, count, replace=False))
    items = rows.items_by_slot(connection, key, collection, set(slots.tolist()), with_vector=True)
    return [items[slot] for slot in sorted(items)], total
