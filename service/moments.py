"""Moments of videos, stored so that a video is found by any of them, and the answer says which second.

The moments of a collection's videos are items of a collection beside it, with a name that no client can give. Each
carries its video's metadata, so that a filter means the same there, and under a key that no client can give, whose it
is.
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

_OWNER = "\0of"
_DEEPEST = 8_000
"""Moments of one query that are looked at, at most, for enough different videos."""
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
    by_modality: bool = False,
) -> list[list[Hit]]:
    """As Store.search. The score of a video is that of the whole or of its best moment, whichever is more.

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
        by_modality=by_modality,
    )
    if modalities is not None and "video" not in modalities:
        return await whole
    found, moments = await asyncio.gather(
        whole, _nearest(store, collection, queries, count, filter, leave_out, with_vector, effort)
    )
    if moments is None:
        return found
    results = []
    for query, hits, best in zip(queries, found, moments, strict=True):
        videos = {hit.item.id: hit for hit in hits if hit.item.modality == "video"}
        for id in videos.keys() - best.keys():
            if (moment := await _best_of(store, collection, query, id, with_vector, effort)) is not None:
                best[id] = moment
        merged = [hit for hit in hits if hit.item.id not in best]
        for id, moment in best.items():
            own = videos.get(id)
            item = own.item if own else await _item(store, collection, id, with_vector)
            if item is not None:
                score = max(moment.score, own.score) if own else moment.score
                merged.append(Hit(item, score, moment.moment))
        merged.sort(key=lambda hit: -hit.score)
        results.append(merged if by_modality else merged[:count])
    return results


async def _nearest(
    store: Store,
    collection: str,
    queries: Vectors,
    count: int,
    filter: Filter | None,
    leave_out: Sequence[str | None] | None,
    with_vector: bool,
    effort: Effort | None,
) -> list[dict[str, Hit]] | None:
    """For each query the best moment of each of the `count` nearest videos, by the video's id; None: there is none."""
    depth = min(4 * count, _DEEPEST)
    while True:
        try:
            found = await store.search(
                beside(collection), queries, depth, filter=filter, with_vector=with_vector, effort=effort
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
    store: Store, collection: str, query: Vectors, id: str, with_vector: bool, effort: Effort | None
) -> Hit | None:
    [hits] = await store.search(
        beside(collection), query[None], 1, filter=Is(_OWNER, (id,)), with_vector=with_vector, effort=effort
    )
    return _opened(hits[0]) if hits else None


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
        modality="video",
        metadata=metadata,
        vector=moment.vector,
        text=None,
        tokens=None,
        moments=(),
    )


def _opened(hit: Hit) -> Hit:
    modality, start, end = hit.item.id.rsplit("\x1f", 3)[1:]
    return replace(hit, moment=Moment(modality, float(start), float(end), hit.item.vector))
