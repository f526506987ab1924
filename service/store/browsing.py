"""Browsing lists items in an order, and counts the values of metadata keys, from the views in memory.

Both take a few passes over arrays, whatever the filter, and read only the rows that they answer with.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest
from service.store import cursors
from service.store.filters import Filter, Scalar
from service.store.index import View, select
from service.store.rows import SlotReader

MOST_VALUES = 1_000
"""Largest number of values of one key that are counted out."""
_CURSOR = struct.Struct("<cdqq")


@dataclass(frozen=True)
class Order:
    """Orders a page of items: by a metadata key that holds numbers, or by when they were last written."""

    key: str | None = None
    descending: bool = False


@dataclass(frozen=True)
class Values:
    """Counts how often a metadata key holds each value."""

    counts: Sequence[tuple[Scalar, int]]
    """Values, the most frequent first."""
    missing: int
    """Items without the key, or with a list or an object there."""
    more: int
    """Number of values that are not among the counts."""


@dataclass(frozen=True)
class Facets:
    total: int
    modalities: Mapping[str, int]
    values: Mapping[str, Values] = field(default_factory=dict)


def page(
    views: Mapping[str, View], filter: Filter | None, order: Order, cursor: str | None, limit: int, reader: SlotReader
) -> tuple[list[int], str | None]:
    """Return the slots of the next items in order, and the cursor of the page after them, None at the end.

    Items whose key holds no number come last; equal ones are in the order in which they were last written. A cursor
    holds the place of the last item: what is not written meanwhile comes once. Raises InvalidRequest for a cursor that
    no such page came with.
    """
    slots, values, remainders = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0, np.int64)]
    for view in views.values():
        rows = np.flatnonzero(view.alive if filter is None else select(view, filter, reader))
        slots.append(view.slots[rows])
        keys, rest = slots[-1].astype(np.float64), np.zeros(len(rows), np.int64)
        if order.key is not None:
            keys, rest = view.columns.numbers(order.key, view.count)
            keys, rest = keys[rows], rest[rows]
        values.append(-keys if order.descending else keys)
        remainders.append(-rest if order.descending else rest)
    all_slots, ranks, rests = np.concatenate(slots), np.concatenate(values), np.concatenate(remainders)
    ranks[np.isnan(ranks)] = np.inf
    if cursor is not None:
        rank, rest_of_last, slot = _place(cursor)
        later = (rests > rest_of_last) | ((rests == rest_of_last) & (all_slots > slot))
        later = (ranks > rank) | ((ranks == rank) & later)
        all_slots, ranks, rests = all_slots[later], ranks[later], rests[later]
    if len(ranks) > limit + 1:
        # Few of many: only those that may be among them are sorted.
        last = np.partition(ranks, limit)[limit]
        near = np.flatnonzero(ranks < last)
        equal = np.flatnonzero(ranks == last)
        room = min(limit + 1 - len(near), len(equal))
        if rests[equal].any():
            equal = equal[np.lexsort((all_slots[equal], rests[equal]))]
        elif room < len(equal):
            equal = equal[np.argpartition(all_slots[equal], room - 1)]
        near = np.concatenate([near, equal[:room]])
        all_slots, ranks, rests = all_slots[near], ranks[near], rests[near]
    first = np.lexsort((all_slots, rests, ranks))[: limit + 1]
    page_rows = first[:limit].tolist()
    if len(first) <= limit:
        return all_slots[page_rows].tolist(), None
    of_last = page_rows[-1]
    place = _CURSOR.pack(b"o", float(ranks[of_last]), int(rests[of_last]), int(all_slots[of_last]))
    return all_slots[page_rows].tolist(), cursors.encoded(place)


def facets(views: Mapping[str, View], keys: Sequence[str], filter: Filter | None, reader: SlotReader) -> Facets:
    """Count the items that pass the filter: all, those of each modality, and those with each value of the keys."""
    masks = {
        modality: view.alive if filter is None else select(view, filter, reader) for modality, view in views.items()
    }
    modalities = {modality: count for modality, mask in masks.items() if (count := int(np.count_nonzero(mask)))}
    total = sum(modalities.values())
    values = {key: _values(views, masks, key, total, reader) for key in keys}
    return Facets(total, dict(sorted(modalities.items())), values)


def _values(
    views: Mapping[str, View], masks: Mapping[str, NDArray[np.bool_]], key: str, total: int, reader: SlotReader
) -> Values:
    parts: list[tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]] = []
    for modality, view in views.items():
        rows, kinds, cells = view.columns.scalars(key, view.count)
        selected = masks[modality][rows]
        parts.append((kinds[selected], cells[selected], view.slots[rows[selected]]))
    if not sum(len(kinds) for kinds, _, _ in parts):
        return Values((), total, 0)
    kinds, cells, slots = (np.concatenate([part[place] for part in parts]) for place in range(3))
    firsts, counts = [], []
    for kind in np.unique(kinds):
        places = np.flatnonzero(kinds == kind)
        _, first, of_kind = np.unique(cells[places], return_index=True, return_counts=True)
        firsts.append(slots[places[first]])
        counts.append(of_kind)
    examples, often = np.concatenate(firsts), np.concatenate(counts)
    listed = np.argsort(-often, kind="stable")[:MOST_VALUES]
    # Texts are in the rows alone: one row of each says what it is.
    metadata = dict(reader.metadata(np.sort(examples[listed]), ""))
    counted = [(metadata[int(examples[place])][key], int(often[place])) for place in listed]
    counted.sort(key=lambda pair: (-pair[1], str(pair[0])))
    return Values(counted, total - len(kinds), len(often) - len(listed))


def _place(cursor: str) -> tuple[float, int, int]:
    """Return the rank, what is above it and the slot in a cursor. Raises InvalidRequest for one that no such page came
    with."""
    place = cursors.decoded(cursor)
    if len(place) == _CURSOR.size:
        mark, rank, rest, slot = _CURSOR.unpack(place)
        if mark == b"o" and rank == rank:
            return rank, rest, slot
    raise InvalidRequest("the cursor is not one that a page in this order came with")
