"""GET /collections; GET, PUT and DELETE /collections/{name}."""

from fastapi import APIRouter, Request, Response

from service.inputs import read_request
from service.schemas.items import CollectionRequest, CollectionResponse, CollectionsResponse, Name
from service.state import StateDep
from service.store import Collection, Index

router = APIRouter(tags=["items"])


@router.get("/collections")
async def list_collections(state: StateDep) -> CollectionsResponse:
    return CollectionsResponse(collections=[_described(each) for each in await state.store.collections()])


@router.get("/collections/{name}")
async def get_collection(name: Name, state: StateDep) -> CollectionResponse:
    return _described(await state.store.collection(name))


@router.put("/collections/{name}", responses={201: {"model": CollectionResponse}})
async def put_collection(name: Name, request: Request, response: Response, state: StateDep) -> CollectionResponse:
    """Create a collection (201), or find it there (200). The body may be absent."""
    if await request.body():
        await read_request(request, CollectionRequest)
    response.status_code = 201 if await state.store.create_collection(name) else 200
    return _described(await state.store.collection(name))


@router.delete("/collections/{name}", status_code=204)
async def drop_collection(name: Name, state: StateDep) -> None:
    """Delete a collection and every item in it."""
    await state.store.drop_collection(name)


def _described(collection: Collection) -> CollectionResponse:
    return CollectionResponse(
        name=collection.name,
        count=collection.count,
        space=collection.space,
        dimensions=collection.dimensions,
        index=Index.kind,
        created=collection.created,
    )
