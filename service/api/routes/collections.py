"""GET /collections; GET, PUT and DELETE /collections/{name}."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from service.api.reading import documented, reader
from service.api.responses import JSON
from service.api.routes.items import FilterText
from service.api.state import State, StateDep
from service.engine.inputs import StoredModality
from service.retrieval.projection import MOST_POINTS, Map
from service.retrieval.search import check_modalities
from service.schemas import items as wire
from service.schemas.items import MetadataKey, Name, read_filter
from service.store import Collection, IndexRequest, moments

router = APIRouter(tags=["items"])


@router.get("/collections", response_model=wire.CollectionsResponse)
async def list_collections(state: StateDep) -> JSON:
    """List the collections, and how many items they hold."""
    # In one read, and not by a model: there may be thousands, and some be dropped meanwhile.
    listed = [collection for collection in await state.store.collections() if not moments.hidden(collection.name)]
    return JSON({"collections": [_fields(collection) | {"parts": None} for collection in listed]})


@router.get("/collections/{name}")
async def get_collection(name: Name, state: StateDep) -> wire.CollectionResponse:
    """Return a collection: its items by modality, and the indexes that they are in."""
    return await _described_whole(name, state)


@router.get("/collections/{name}/facets", response_model=wire.FacetsResponse)
async def count_values(
    name: Name,
    state: StateDep,
    key: Annotated[list[MetadataKey] | None, Query(max_length=8, description="Metadata keys.")] = None,
    filter: FilterText = None,
    modality: StoredModality | None = None,
) -> JSON:
    """Count the items that pass a filter, those of each modality, and those with each value of the keys."""
    condition = None if filter is None else read_filter(filter)
    check_modalities(state.home.manifest, None if modality is None else [modality], "modality")
    counted = await state.store.facets(name, list(dict.fromkeys(key or [])), modality=modality, filter=condition)
    facets = {
        name: {
            "values": [{"value": value, "count": count} for value, count in values.counts],
            "missing": values.missing,
            "more": values.more,
        }
        for name, values in counted.values.items()
    }
    return JSON({"total": counted.total, "modalities": counted.modalities, "facets": facets})


@router.get("/collections/{name}/map", response_model=wire.MapResponse)
async def map_collection(
    name: Name,
    state: StateDep,
    limit: Annotated[int, Query(ge=1, le=MOST_POINTS)] = 2_000,
    label: Annotated[str | None, Query(min_length=1, max_length=256, description="A metadata key.")] = None,
) -> JSON:
    """Lay out the collection's vectors in the plane: what lies near is about the same, of whatever modality it is.

    Of at most `limit` items: of more, a sample. The first to ask after something is written waits until it is made.
    One is made at a time: 429 while another is.
    """
    map = await state.maps.map(name, limit)
    return JSON(await state.embedder.in_worker(lambda: _drawn(map, label)))


def _drawn(map: Map, key: str | None) -> dict[str, Any]:
    points = [
        {"id": point.id, "modality": point.modality, "x": round(x, 4), "y": round(y, 4)}
        | ({} if key is None else {"label": point.labels.get(key)})
        for point, (x, y) in zip(map.points, map.places.tolist(), strict=True)
    ]
    return {"count": map.count, "keys": map.keys, "points": points}


@router.put(
    "/collections/{name}",
    responses={201: {"model": wire.CollectionResponse}},
    openapi_extra=documented(wire.CollectionRequest, {"keywords": ["title"]}, required=False),
)
async def put_collection(name: Name, request: Request, response: Response, state: StateDep) -> wire.CollectionResponse:
    """Create a collection (201), or find it there (200) and change what is given. The body may be absent."""
    change = await reader(wire.CollectionRequest)(request) if await request.body() else wire.CollectionRequest()
    index = None if change.index is None else IndexRequest(change.index, change.precision)
    created = await state.store.create_collection(name, index)
    response.status_code = 201 if created else 200
    if created:  # nothing that an earlier one of this name was taught
        await state.searcher.feedback.delete(name)
    if change.keywords is not None:
        await state.store.set_keyword_fields(name, change.keywords)
    return await _described_whole(name, state)


@router.delete("/collections/{name}", status_code=204)
async def drop_collection(name: Name, state: StateDep) -> None:
    """Delete a collection, every item in it, and what it was taught."""
    await state.store.drop_collection(name)
    await state.searcher.feedback.delete(name)


async def _described_whole(name: str, state: State) -> wire.CollectionResponse:
    collection, parts = await state.store.collection(name), await state.store.parts(name)
    return wire.CollectionResponse(
        **_fields(collection), parts=[wire.CollectionPart.model_validate(asdict(part)) for part in parts]
    )


def _fields(collection: Collection) -> dict[str, Any]:
    """Return the fields of wire.CollectionResponse but for the parts."""
    fields = ("name", "count", "space", "dimensions", "created", "keywords")
    request = collection.index_request
    described = {name: getattr(collection, name) for name in fields}
    return described | {"index": request.kind, "precision": request.precision}
