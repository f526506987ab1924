"""Moments of videos and long sounds, stored so that one is found by any of them, and the answer says which second.

The moments of a collection's items are items of a collection beside it, with a name that no client can give. Each
carries its owner's modality and metadata, so that a filter means the same there, and under a key that no client can
give, whose it is.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from service.contract.vectors import Vectors
from service.errors import NotFound
from service.store import Effort, Entry, Filter, Hit, Item, Moment, Store
from service.store.filters import Is

HAVING = ("video", "audio")
"""Modalities of items that may have moments."""
_OWNER = "\0of"
_DEEPEST = 8_000
"""Moments of one query that are looked at, at most, for enough different items."""
_BATCH = 500


def beside(collection: str) -> str:
    return f".moments.{collection}"


def hidden(collection: str) -> bool:
    return collection.startswith(".")


async def upsert(store: Store, entries: Sequence[Entry]) -> None:
    """Write entries with the moments that they have, in place of the moments that older items of the ids had."""
    by_collection: dict[str, list[Entry]] = {}
    for entry in entries:
        by_collection.setdefault(entry.collection, []).append(entry)
    for collection, mine in by_collection.items():
        await _forget(store, collection, [entry.id for entry in mine])
    moments = [_entry(entry, moment) for entry in entries for moment in entry.moments]
    await store.upsert([*entries, *moments])


async def delete(store: Store, collection: str, ids: Sequence[str]) -> int:
    count = await store.delete(collection, ids)
    await _forget(store, collection, ids)
    return count


async def delete_matching(store: Store, collection: str, filter: Filter) -> int:
    count = await store.delete_matching(collection, filter)
    with suppress(NotFound):
        await store.vectors(beside(collection), [])
        await store.delete_matching(beside(collection), filter)
    return count


async def drop_collection(store: Store, name: str) -> None:
    await store.drop_collection(name)
    with suppress(NotFound):
        await store.drop_collection(beside(name))


async def search(
    store: Store,
    collection: str,
    queries: Vectors,
    count: int,
    *,
    modalities: Sequence[str] | None = None,
    filter: Filter | None = None,
    leave_out: Sequence[str | None] | None = None,
    with_vector: bool = False,
    effort: Effort | None = None,
) -> list[list[Hit]]:
    """As Store.search. The score of an item with moments is that of the whole or of its best one, whichever is more.

    The moment of a hit is the best one, also where the whole is more like the query than any of them.
    """
    whole = store.search(
        collection,
        queries,
        count,
        modalities=modalities,
        filter=filter,
        leave_out=leave_out,
        with_vector=with_vector,
        effort=effort,
    )
    having = [each for each in HAVING if modalities is None or each in modalities]
    if not having:
        return await whole
    found, moments = await asyncio.gather(
        whole, _nearest(store, collection, queries, count, having, filter, leave_out, with_vector, effort)
    )
    if moments is None:
        return found
    results = []
    for query, hits, best in zip(queries, found, moments, strict=True):
        owners = {hit.item.id: hit for hit in hits if hit.item.modality in having}
        for id in [id for id in owners.keys() - best.keys() if owners[id].item.modality == "video"]:
            best |= await _best_of(store, collection, query, [id], with_vector, effort)
        # Most sounds are short and have none: they are asked for together.
        best |= await _best_of(store, collection, query, sorted(owners.keys() - best.keys()), with_vector, effort)
        merged = [hit for hit in hits if hit.item.id not in best]
        for id, moment in best.items():
            own = owners.get(id)
            item = own.item if own else await _item(store, collection, id, with_vector)
            if item is not None:
                score = max(moment.score, own.score) if own else moment.score
                merged.append(Hit(item, score, moment.moment))
        results.append(sorted(merged, key=lambda hit: -hit.score)[:count])
    return results


async def _nearest(
    store: Store,
    collection: str,
    queries: Vectors,
    count: int,
    modalities: Sequence[str],
    filter: Filter | None,
    leave_out: Sequence[str | None] | None,
    with_vector: bool,
    effort: Effort | None,
) -> list[dict[str, Hit]] | None:
    """For each query the best moment of each of the `count` nearest items, by the item's id; None: there is none."""
    depth = min(4 * count, _DEEPEST)
    while True:
        try:
            found = await store.search(
                beside(collection),
                queries,
                depth,
                modalities=modalities,
                filter=filter,
                with_vector=with_vector,
                effort=effort,
            )
        except NotFound:
            return None
        best: list[dict[str, Hit]] = []
        for hits, own in zip(found, leave_out or [None] * len(found), strict=True):
            mine: dict[str, Hit] = {}
            for hit in hits:
                owner = str(hit.item.metadata[_OWNER])
                if owner != own and len(mine) < count:
                    mine.setdefault(owner, _opened(hit))
            best.append(mine)
        exhausted = all(len(hits) < depth for hits in found)
        if exhausted or depth >= _DEEPEST or all(len(mine) >= count for mine in best):
            return best
        depth = min(4 * depth, _DEEPEST)


async def _best_of(
    store: Store, collection: str, query: Vectors, ids: Sequence[str], with_vector: bool, effort: Effort | None
) -> dict[str, Hit]:
    """The best moments of these items, by their ids, of those that have some: of one item always, of several as far as
    their moments are near enough."""
    depth = 1 if len(ids) == 1 else min(4 * len(ids), _DEEPEST)
    best: dict[str, Hit] = {}
    for start in range(0, len(ids), _BATCH):
        owners = Is(_OWNER, tuple(ids[start : start + _BATCH]))
        [hits] = await store.search(
            beside(collection), query[None], depth, filter=owners, with_vector=with_vector, effort=effort
        )
        for hit in hits:
            best.setdefault(str(hit.item.metadata[_OWNER]), _opened(hit))
    return best


async def _item(store: Store, collection: str, id: str, with_vector: bool) -> Item | None:
    try:
        return await store.get(collection, id, with_vector=with_vector)
    except NotFound:  # deleted meanwhile
        return None


async def _forget(store: Store, collection: str, ids: Sequence[str]) -> None:
    with suppress(NotFound):
        # Most collections have no videos, and a read says so: a write would be a commit of its own.
        await store.vectors(beside(collection), [])
        for start in range(0, len(ids), _BATCH):
            await store.delete_matching(beside(collection), Is(_OWNER, tuple(ids[start : start + _BATCH])))


def _entry(entry: Entry, moment: Moment) -> Entry:
    assert moment.vector is not None
    # No client's id holds a control character.
    id = f"{entry.id}\x1f{moment.modality}\x1f{moment.start}\x1f{moment.end}"
    metadata: Mapping[str, Any] = {**entry.metadata, _OWNER: entry.id}
    return replace(
        entry,
        collection=beside(entry.collection),
        id=id,
        metadata=metadata,
        vector=moment.vector,
        text=None,
        tokens=None,
        moments=(),
    )


def _opened(hit: Hit) -> Hit:
    modality, start, end = hit.item.id.rsplit("\x1f", 3)[1:]
    return replace(hit, moment=Moment(modality, float(start), float(end), hit.item.vector))
