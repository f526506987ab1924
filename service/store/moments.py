"""Moments of videos, stored so that a video is found by any of them, and the answer says which second.

The moments of a collection's videos are items of a collection beside it, with a name that no client can give. Each
carries its video's metadata, so that a filter means the same there, and its id begins with its video's. A store writes
and deletes them with their video; SQLite does so in one transaction.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.contract.vectors import Vectors
from service.store.filters import Filter, Is
from service.store.interface import Hit
from service.store.rows import Entry, Item, Moment

OWNER = "\0of"
"""The metadata key under which a moment names its video: no client can give it."""
SEPARATOR = "\x1f"
"""Between a video's id and the rest of a moment's: no client's id holds a control character."""
_DEEPEST = 8_000
"""Moments of one query that are looked at, at most, for enough different videos."""


def moments_table(collection: str) -> str:
    """The name of the collection that holds the moments of a collection's videos."""
    return f".moments.{collection}"


def hidden(collection: str) -> bool:
    """Whether a collection is none that clients know of."""
    return collection.startswith(".")


def entries(videos: Sequence[Entry]) -> list[Entry]:
    """The moments of these entries, as entries."""
    return [_entry(video, moment) for video in videos for moment in video.moments]


def _entry(video: Entry, moment: Moment) -> Entry:
    assert moment.vector is not None
    metadata: Mapping[str, Any] = {**video.metadata, OWNER: video.id}
    return replace(
        video,
        collection=moments_table(video.collection),
        id=SEPARATOR.join((video.id, moment.modality, str(moment.start), str(moment.end))),
        modality="video",
        metadata=metadata,
        vector=moment.vector,
        text=None,
        tokens=None,
        preview=None,
        moments=(),
    )


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
    """One item; answered with None where it is not there."""

    collection: str
    id: str


def search(find: Find) -> Generator[Find | Get, Any, list[list[Hit]] | None]:
    """As Store.search. The score of a video is that of the whole or of its best moment, whichever is more.

    The moment of a hit is the best one, also where the whole is more like the query than any of them. Yields what is to
    be asked of a store and is sent the answers, so that a store which can answers all of them as of one moment.
    """
    hits_by_query: list[list[Hit]] | None = yield find
    if hits_by_query is None or (find.modalities is not None and "video" not in find.modalities):
        return hits_by_query
    moments = yield from _nearest(find)
    if moments is None:
        return hits_by_query
    results = []
    for query, hits, best in zip(find.queries, hits_by_query, moments, strict=True):
        videos = {hit.item.id: hit for hit in hits if hit.item.modality == "video"}
        for id in videos.keys() - best.keys():
            its_own = Is(OWNER, (id,))
            nearest = yield Find(moments_table(find.collection), query[None], 1, None, its_own, None)
            if nearest and nearest[0]:
                best[id] = _opened(nearest[0][0])
        merged = [hit for hit in hits if hit.item.id not in best]
        for id, moment in best.items():
            whole = videos.get(id)
            item: Item | None = whole.item if whole else (yield Get(find.collection, id))
            if item is not None:
                score = max(moment.score, whole.score) if whole else moment.score
                merged.append(Hit(item, score, moment.moment))
        merged.sort(key=lambda hit: -hit.score)
        results.append(merged if find.by_modality else merged[: find.count])
    return results


def _nearest(find: Find) -> Generator[Find, Any, list[dict[str, Hit]] | None]:
    """For each query the best moment of each of the `count` nearest videos, by the video's id; None: there is none."""
    depth = min(4 * find.count, _DEEPEST)
    while True:
        found = yield Find(moments_table(find.collection), find.queries, depth, None, find.filter, None)
        if found is None:
            return None
        best: list[dict[str, Hit]] = []
        for hits, left_out in zip(found, find.leave_out or [None] * len(found), strict=True):
            by_video: dict[str, Hit] = {}
            for hit in hits:
                owner = str(hit.item.metadata[OWNER])
                if owner != left_out and len(by_video) < find.count:
                    by_video.setdefault(owner, _opened(hit))
            best.append(by_video)
        exhausted = all(len(hits) < depth for hits in found)
        if exhausted or depth >= _DEEPEST or all(len(by_video) >= find.count for by_video in best):
            return best
        depth = min(4 * depth, _DEEPEST)


def _opened(hit: Hit) -> Hit:
    modality, start, end = hit.item.id.rsplit(SEPARATOR, 3)[1:]
    return replace(hit, moment=Moment(modality, float(start), float(end), hit.item.vector))
