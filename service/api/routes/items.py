"""POST and GET /items, GET and DELETE /items/{id}, POST /items/delete, POST /items/move."""

import hashlib
import re
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query

from service.api.reading import A_PICTURE, documented, reader
from service.api.responses import JSON, previewed
from service.api.routes.media import find_original
from service.api.state import CallerDep, StateDep
from service.contract.errors import InputError
from service.engine.inputs import StoredModality
from service.errors import InvalidRequest, NotFound, input_problem
from service.retrieval.indexing import NewItem, index_items
from service.retrieval.search import check_modalities
from service.runtime.timings import timed
from service.schemas import items as wire
from service.schemas.embed import InputProblem
from service.schemas.items import ItemId, MetadataKey, Name, place_items, read_filter
from service.store import DEFAULT_COLLECTION, Entry, Item, Order

router = APIRouter(tags=["items"])

Items = Annotated[wire.ItemsRequest, Depends(reader(wire.ItemsRequest, place_items))]
Deletion = Annotated[wire.DeleteItemsRequest, Depends(reader(wire.DeleteItemsRequest))]
_EXAMPLE = {
    "items": [
        {"id": "holiday/beach", "text": "a dog on a beach", "metadata": {"year": 2024}},
        {"id": "holiday/flag.png", "image": A_PICTURE},
    ]
}
Moves = Annotated[wire.MoveItemsRequest, Depends(reader(wire.MoveItemsRequest))]


_Priority = Annotated[
    str | None, Header(max_length=64, description="RFC 9218; u=7 embeds when nothing else waits to be embedded.")
]
_BACKGROUND = re.compile(r"(?:^|,)\s*u=7\s*(?:,|$)")


@router.post("/items", openapi_extra=documented(wire.ItemsRequest, _EXAMPLE, files=True))
async def upsert_items(
    body: Items, state: StateDep, caller: CallerDep, priority: _Priority = None
) -> wire.ItemsResponse:
    """Embed and store items, each replacing the one of its collection and id. Answered once they are on disk."""
    if priority is not None and _BACKGROUND.search(priority) is not None:
        caller = replace(caller, background=True)
    results = await index_items(
        state.embedder,
        state.store,
        [
            NewItem(item.id, item.content, item.metadata, item.collection, item.modality or "vector")
            for item in body.items
        ],
        fail=body.on_error == "fail",
        caller=caller,
        previewer=state.previewer,
    )
    answers: list[wire.StoredItem | wire.RefusedItem] = []
    for index, (item, result) in enumerate(zip(body.items, results, strict=True)):
        where: dict[str, Any] = {"id": item.id, "collection": item.collection}
        if isinstance(result, InputError):
            answers.append(wire.RefusedItem(**where, index=index, error=InputProblem(**input_problem(result))))
        else:
            where |= {"modality": result.modality, "truncated": result.truncated}
            answers.append(wire.StoredItem(**where))
    return wire.ItemsResponse(upserted=sum(isinstance(result, Entry) for result in results), items=answers)


FilterText = Annotated[
    str | None, Query(max_length=16_384, description="A filter over the metadata as in /search, written as JSON.")
]


@router.get("/items", response_model=wire.PageResponse)
async def list_items(
    state: StateDep,
    cursor: Annotated[str | None, Query(max_length=5_000)] = None,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    collection: Name | None = None,
    modality: StoredModality | None = None,
    filter: FilterText = None,
    sort: Annotated[
        MetadataKey | None, Query(description="A metadata key that holds numbers; items without one come last.")
    ] = None,
    order: Literal["asc", "desc"] | None = None,
    include: Annotated[list[Literal["preview", "total"]] | None, Query(max_length=2)] = None,
) -> JSON:
    """List items in the order in which they were first stored (in Milvus by id), of one collection or of all.

    With `filter`, `sort` or `order`, which go with a collection: in the order of `sort`, or of when they were last
    written. An item that is not written meanwhile is on exactly one page. A cursor goes with the same parameters.
    """
    fields = include or []
    condition = None if filter is None else read_filter(filter)
    check_modalities(state.home.manifest, None if modality is None else [modality], "modality")
    by = None if sort is None and order is None else Order(sort, order == "desc")
    listing = hashlib.blake2b(repr((collection, modality, condition, by)).encode(), digest_size=6).hexdigest()
    if cursor is not None:
        cursor = _place_in(listing, cursor)
    items, place = await state.store.page(collection, modality, cursor, limit, filter=condition, order=by)
    more = None if place is None else f"{listing}.{place}"
    described = [_described(item) for item in items]
    if "preview" in fields:
        for name in {item.collection for item in items}:
            members = [row for row in described if row["collection"] == name]
            previews = await state.store.shown(name, [row["id"] for row in members])
            for row in members:
                row["preview"] = previewed(previews.get(row["id"]))
    answer: dict[str, Any] = {"items": described, "next_cursor": more}
    if "total" in fields:
        if collection is None:
            raise InvalidRequest("include=total goes with a collection")
        answer["total"] = (await state.store.facets(collection, modality=modality, filter=condition)).total
    return JSON(answer)


def _place_in(listing: str, cursor: str) -> str:
    """Return the store's cursor. Raises InvalidRequest for one of another listing: its place means nothing in this one,
    which would silently leave items out."""
    of_listing, _, place = cursor.partition(".")
    if of_listing != listing:
        raise InvalidRequest("the cursor is none of this listing: send it with the parameters of the page it came with")
    return place


@router.post("/items/delete", openapi_extra=documented(wire.DeleteItemsRequest, {"ids": ["holiday/beach"]}))
async def delete_items(body: Deletion, state: StateDep) -> wire.DeletedResponse:
    """Delete items by ids (absent ones are not counted) or by a filter over the metadata."""
    with timed("write"):
        if body.filter is not None:
            return wire.DeletedResponse(deleted=await state.store.delete_matching(body.collection, body.filter))
        return wire.DeletedResponse(deleted=await state.store.delete(body.collection, body.ids or []))


@router.post(
    "/items/move",
    openapi_extra=documented(wire.MoveItemsRequest, {"moves": [{"id": "holiday/beach", "to": "2024/beach"}]}),
)
async def move_items(body: Moves, state: StateDep) -> wire.MovedResponse:
    """Give items other ids, with all that is stored of them: nothing is embedded. Absent items are not counted."""
    with timed("write"):
        ids = {move.id: move.to for move in body.moves}
        metadata = {move.id: move.metadata for move in body.moves if move.metadata is not None}
        return wire.MovedResponse(moved=await state.store.move(body.collection, ids, metadata))


# An id may hold slashes.
@router.get("/items/{id:path}", response_model=wire.ItemResponse)
async def get_item(
    id: ItemId,
    state: StateDep,
    collection: Name = DEFAULT_COLLECTION,
    include: Annotated[list[Literal["vector", "preview", "original"]] | None, Query()] = None,
) -> JSON:
    """Return a stored item; its vector and its preview where `include` asks for them."""
    fields = include or []
    item = await state.store.get(collection, id, with_vector="vector" in fields)
    described = _described(item)
    if "preview" in fields:
        described["preview"] = previewed((await state.store.shown(collection, [id])).get(id))
    if "original" in fields:
        original = await find_original(item, state)
        described["original"] = None if original is None else original.media_type
    return JSON(described)


@router.delete("/items/{id:path}", status_code=204)
async def delete_item(id: ItemId, state: StateDep, collection: Name = DEFAULT_COLLECTION) -> None:
    """Delete an item with its moments and its preview."""
    with timed("write"):
        deleted = await state.store.delete(collection, [id])
    if not deleted:
        raise NotFound(f"no item {id!r} in the collection {collection!r}")


def _described(item: Item) -> dict[str, Any]:
    fields = ("id", "collection", "modality", "metadata", "created", "updated", "vector")
    return {name: value for name in fields if (value := getattr(item, name)) is not None}
