"""Moments of videos and long sounds: an item is found by any of its moments, and the answer gives the second.

The moments of a collection's items are items of a collection beside it, with a name that no client can give. Each
carries its owner's modality and metadata, so that a filter means the same there, and its id begins with its owner's. A
store writes and deletes them with their owner; SQLite does so in one transaction.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.contract.vectors import Vectors
from service.store.filters import Filter, Is
from service.store.interface import MOST_FOUND_BYTES, Hit
from service.store.rows import Entry, Item, Metadata, Moment

HAVING = ("video", "audio")
"""Modalities of items that may have moments."""
OWNER = "\0of"
"""The metadata key under which a moment names its item: no client can give it."""
SEPARATOR = "\x1f"
"""Separator between an item's id and the rest of a moment's id: no client's id holds a control character."""
_DEEPEST = 8_000
"""Largest number of moments of one query that are read to find enough different items."""
_TOGETHER = 500
"""Number of items whose best moments are searched at once."""


def moments_table(collection: str) -> str:
    """The name of the collection that holds the moments of a collection's items."""
    return f".moments.{collection}"


def hidden(collection: str) -> bool:
    """Return whether a collection is none that clients know of."""
    return collection.startswith(".")


def entries(owners: Sequence[Entry]) -> list[Entry]:
    """The moments of these entries, as entries."""
    return [_entry(owner, moment) for owner in owners for moment in owner.moments]


def _entry(owner: Entry, moment: Moment) -> Entry:
    assert moment.vector is not None
    metadata: Mapping[str, Any] = {**owner.metadata, OWNER: owner.id}
    return replace(
        owner,
        collection=moments_table(owner.collection),
        id=SEPARATOR.join((owner.id, moment.modality, str(moment.start), str(moment.end))),
        metadata=metadata,
        vector=moment.vector,
        text=None,
        tokens=None,
        preview=None,
        moments=(),
    )


def moved(moment: Item, ids: Mapping[str, str], metadata: Mapping[str, Metadata]) -> Item:
    """The moment of an item that gets another id (old → new), and perhaps other metadata."""
    owner, separator, rest = moment.id.partition(SEPARATOR)
    described = {**metadata.get(owner, moment.metadata), OWNER: ids[owner]}
    return replace(moment, id=f"{ids[owner]}{separator}{rest}", metadata=described)


@dataclass(frozen=True)
class Find:
    """The `count` nearest of one collection to each query, without regard to moments; answered with lists of hits, or
    with None where there is no such collection."""

    collection: str
    queries: Vectors
    count: int
    modalities: Sequence[str] | None
    filter: Filter | None
    leave_out: Sequence[str | None] | None
    by_modality: bool = False


@dataclass(frozen=True)
class Get:
    """A request for one item; the answer is None where it does not exist."""

    collection: str
    id: str


def search(find: Find) -> Generator[Find | Get, Any, list[list[Hit]] | None]:
    """Search as Store.search does. An item with moments gets the score of the whole or of its best moment, whichever is
    higher.

    The moment of a hit is the best one, also where the whole is more like the query than any of them. Yields what is to
    be asked of a store and is sent the answers, so that a store which can answers all of them as of one moment.
    """
    hits_by_query: list[list[Hit]] | None = yield find
    having = [modality for modality in HAVING if find.modalities is None or modality in find.modalities]
    if hits_by_query is None or not having:
        return hits_by_query
    moments = yield from _nearest(find, having)
    if moments is None:
        return hits_by_query
    results = []
    for query, hits, best in zip(find.queries, hits_by_query, moments, strict=True):
        owners = {hit.item.id: hit for hit in hits if hit.item.modality in having}
        for id in [id for id in owners.keys() - best.keys() if owners[id].item.modality == "video"]:
            best |= yield from _best_of(find.collection, query, [id])
        # Most sounds are short and have no moments, so all of them are looked up together.
        best |= yield from _best_of(find.collection, query, sorted(owners.keys() - best.keys()))
        merged = [hit for hit in hits if hit.item.id not in best]
        for id, moment in best.items():
            whole = owners.get(id)
            item: Item | None = whole.item if whole else (yield Get(find.collection, id))
            if item is not None:
                score = max(moment.score, whole.score) if whole else moment.score
                merged.append(Hit(item, score, moment.moment))
        merged.sort(key=lambda hit: -hit.score)
        results.append(merged if find.by_modality else merged[: find.count])
    return results


def _nearest(find: Find, modalities: Sequence[str]) -> Generator[Find, Any, list[dict[str, Hit]] | None]:
    """Return, for each query, the best moment of each of the `count` nearest items, by item id, and of each modality
    where that is asked for. Returns None where the collection has no moments."""
    parts = [[modality] for modality in modalities] if find.by_modality else [modalities]
    best: list[dict[str, Hit]] = [{} for _ in find.queries]
    for part in parts:
        nearest = yield from _nearest_among(find, part)
        if nearest is None:
            return None
        for moments, nearer in zip(best, nearest, strict=True):
            moments |= nearer
    return best


def _nearest_among(find: Find, modalities: Sequence[str]) -> Generator[Find, Any, list[dict[str, Hit]] | None]:
    depth = min(4 * find.count, _DEEPEST)
    while True:
        hits_by_query = yield Find(moments_table(find.collection), find.queries, depth, modalities, find.filter, None)
        if hits_by_query is None:
            return None
        best: list[dict[str, Hit]] = []
        for hits, left_out in zip(hits_by_query, find.leave_out or [None] * len(hits_by_query), strict=True):
            by_owner: dict[str, Hit] = {}
            for hit in hits:
                owner = str(hit.item.metadata[OWNER])
                if owner != left_out and len(by_owner) < find.count:
                    by_owner.setdefault(owner, _opened(hit))
            best.append(by_owner)
        exhausted = all(len(hits) < depth for hits in hits_by_query)
        too_much = 4 * sum(hit.item.size for hits in hits_by_query for hit in hits) > MOST_FOUND_BYTES
        if exhausted or too_much or depth >= _DEEPEST or all(len(by_owner) >= find.count for by_owner in best):
            return best
        depth = min(4 * depth, _DEEPEST)


def _best_of(collection: str, query: Vectors, ids: Sequence[str]) -> Generator[Find, Any, dict[str, Hit]]:
    """The best moments of these items, by their ids, of those that have some: of one item always, of several as far as
    their moments are near enough."""
    depth = 1 if len(ids) == 1 else min(4 * len(ids), _DEEPEST)
    best: dict[str, Hit] = {}
    for start in range(0, len(ids), _TOGETHER):
        owners = Is(OWNER, tuple(ids[start : start + _TOGETHER]))
        hits_by_query = yield Find(moments_table(collection), query[None], depth, None, owners, None)
        for hit in hits_by_query[0] if hits_by_query else ():
            best.setdefault(str(hit.item.metadata[OWNER]), _opened(hit))
    return best


def _opened(hit: Hit) -> Hit:
    modality, start, end = hit.item.id.rsplit(SEPARATOR, 3)[1:]
    return replace(hit, moment=Moment(modality, float(start), float(end), hit.item.vector))
