"""A video or a long sound is found by any of its moments, and the answer gives the second.

The moments of a collection's items are items of a collection beside it, with a name that no client can give. Each
carries its owner's modality and metadata, so that a filter means the same there, and its id begins with its owner's. A
store writes and deletes them with their owner; SQLite does so in one transaction.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from service.contract.vectors import Vectors
from service.store.filters import Is
from service.store.interface import MOST_FOUND_BYTES, Hit, VectorSearch
from service.store.items import Entry, Item, Metadata, Moment

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
    """Return the name of the collection that holds the moments of a collection's items."""
    return f".moments.{collection}"


def hidden(collection: str) -> bool:
    """Return whether a collection is none that clients know of."""
    return collection.startswith(".")


def entries(owners: Sequence[Entry]) -> list[Entry]:
    """Return the moments of these entries, as entries."""
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
        preview=None,
        moments=(),
    )


def moved(moment: Item, ids: Mapping[str, str], metadata: Mapping[str, Metadata]) -> Item:
    """Return the moment of an item that gets another id (old → new), and perhaps other metadata."""
    owner, separator, place = moment.id.partition(SEPARATOR)
    described = {**metadata.get(owner, moment.metadata), OWNER: ids[owner]}
    return replace(moment, id=f"{ids[owner]}{separator}{place}", metadata=described)


def search(request: VectorSearch) -> Generator[VectorSearch | str, Any, list[list[Hit]] | None]:
    """Search as Store.search does. An item with moments gets the score of the whole or of its best moment, whichever is
    higher.

    The moment of a hit is the best one, also where the whole is more like the query than any of them. Yields searches,
    answered with lists of hits or with None where there is no such collection, and ids, answered with the item or None,
    so that a store which can answers all of them as of one moment.
    """
    hits_by_query: list[list[Hit]] | None = yield request
    having = [modality for modality in HAVING if request.modalities is None or modality in request.modalities]
    if hits_by_query is None or not having:
        return hits_by_query
    moments = yield from _nearest(request, having)
    if moments is None:
        return hits_by_query
    results = []
    for query, hits, best in zip(request.queries, hits_by_query, moments, strict=True):
        owners = {hit.item.id: hit for hit in hits if hit.item.modality in having}
        one_query = replace(request, queries=query[None], leave_out=None, by_modality=False)
        for id in [id for id in owners.keys() - best.keys() if owners[id].item.modality == "video"]:
            best |= yield from _best_of(one_query, [id])
        # Most sounds are short and have no moments, so all of them are looked up together.
        best |= yield from _best_of(one_query, sorted(owners.keys() - best.keys()))
        all_hits = [hit for hit in hits if hit.item.id not in best]
        for id, moment in best.items():
            whole = owners.get(id)
            item: Item | None = whole.item if whole else (yield id)
            if item is not None:
                score = max(moment.score, whole.score) if whole else moment.score
                all_hits.append(Hit(item, score, moment.moment))
        all_hits.sort(key=lambda hit: -hit.score)
        results.append(all_hits if request.by_modality else all_hits[: request.count])
    return results


def _nearest(
    request: VectorSearch, modalities: Sequence[str]
) -> Generator[VectorSearch, Any, list[dict[str, Hit]] | None]:
    """Return, for each query, the best moment of each of the `count` nearest items, by item id, and of each modality
    where that is asked for. Returns None where the collection has no moments."""
    parts = [[modality] for modality in modalities] if request.by_modality else [modalities]
    best: list[dict[str, Hit]] = [{} for _ in request.queries]
    for part in parts:
        nearest = yield from _nearest_among(request, part)
        if nearest is None:
            return None
        for moments, nearer in zip(best, nearest, strict=True):
            moments |= nearer
    return best


def _nearest_among(
    request: VectorSearch, modalities: Sequence[str]
) -> Generator[VectorSearch, Any, list[dict[str, Hit]] | None]:
    depth = min(4 * request.count, _DEEPEST)
    while True:
        table = moments_table(request.collection)
        hits_by_query = yield replace(
            request, collection=table, count=depth, modalities=modalities, leave_out=None, by_modality=False
        )
        if hits_by_query is None:
            return None
        best: list[dict[str, Hit]] = []
        for hits, left_out in zip(hits_by_query, request.leave_out or [None] * len(hits_by_query), strict=True):
            by_owner: dict[str, Hit] = {}
            for hit in hits:
                owner = str(hit.item.metadata[OWNER])
                if owner != left_out and len(by_owner) < request.count:
                    by_owner.setdefault(owner, _opened(hit))
            best.append(by_owner)
        exhausted = all(len(hits) < depth for hits in hits_by_query)
        too_much = 4 * sum(hit.item.size for hits in hits_by_query for hit in hits) > MOST_FOUND_BYTES
        if exhausted or too_much or depth >= _DEEPEST or all(len(by_owner) >= request.count for by_owner in best):
            return best
        depth = min(4 * depth, _DEEPEST)


def _best_of(request: VectorSearch, ids: Sequence[str]) -> Generator[VectorSearch, Any, dict[str, Hit]]:
    """Return the best moments of these items, by their ids, of those that have some: of one item always, of several as
    far as their moments are near enough."""
    depth = 1 if len(ids) == 1 else min(4 * len(ids), _DEEPEST)
    best: dict[str, Hit] = {}
    for start in range(0, len(ids), _TOGETHER):
        owners = Is(OWNER, tuple(ids[start : start + _TOGETHER]))
        hits_by_query = yield replace(
            request, collection=moments_table(request.collection), count=depth, modalities=None, filter=owners
        )
        for hit in hits_by_query[0] if hits_by_query else ():
            best.setdefault(str(hit.item.metadata[OWNER]), _opened(hit))
    return best


def _opened(hit: Hit) -> Hit:
    return replace(hit, moment=_moment(hit.item.id, hit.item.vector)[1])


def by_owner(vectors: Mapping[str, Vectors]) -> dict[str, list[Moment]]:
    """Return the moments of each item, by its id, from their vectors by their own ids."""
    moments: dict[str, list[Moment]] = {}
    for id, vector in vectors.items():
        owner, moment = _moment(id, vector)
        moments.setdefault(owner, []).append(moment)
    return moments


def _moment(id: str, vector: Vectors | None) -> tuple[str, Moment]:
    """Return the id of a moment's item, and the moment."""
    owner, modality, start, end = id.rsplit(SEPARATOR, 3)
    return owner, Moment(modality, float(start), float(end), vector)
