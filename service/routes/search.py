"""POST /search."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from service.inputs import documented, reader
from service.responses import JSON
from service.schemas.search import SearchRequest, SearchResponse, place_query
from service.state import StateDep
from service.store import Hit
from service.timings import timed

router = APIRouter(tags=["search"])

Body = Annotated[SearchRequest, Depends(reader(SearchRequest, place_query))]


@router.post("/search", response_model=SearchResponse, openapi_extra=documented(SearchRequest, files=True))
async def search(body: Body, state: StateDep) -> JSON:
    """The items nearest to a query, whatever either of them is: text, an image or a sound."""
    started = time.perf_counter()
    with timed("search"):
        found = await state.searcher.search(
            body.asked,
            top_k=body.top_k,
            collection=body.collection,
            modalities=body.modalities,
            filter=body.filter,
            with_vector="vector" in body.include,
            field="queries" if body.query is None else "query",
        )
    results = [[_result(hit, "metadata" in body.include) for hit in hits] for hits in found]
    took_ms = round(1_000 * (time.perf_counter() - started), 3)
    return JSON({"results": results if body.query is None else results[0], "took_ms": took_ms})


def _result(hit: Hit, with_metadata: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"id": hit.item.id, "score": hit.score, "modality": hit.item.modality}
    if with_metadata:
        result["metadata"] = hit.item.metadata
    if hit.item.vector is not None:
        result["vector"] = hit.item.vector
    return result
