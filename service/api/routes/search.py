"""POST /search."""

import time
from collections.abc import Collection
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from service.api.reading import documented, reader
from service.api.responses import JSON, previewed
from service.api.state import CallerDep, StateDep
from service.retrieval.chance import nothing
from service.retrieval.search import Diversity, Keywords, Ordering, Rerank, Result
from service.runtime.timings import timed
from service.schemas.search import SearchRequest, SearchResponse, place_query
from service.store import Effort

router = APIRouter(tags=["search"])

Body = Annotated[SearchRequest, Depends(reader(SearchRequest, place_query))]
_EXAMPLE = {"query": "a dog on a beach", "modalities": ["image"], "top_k": 5, "filter": {"year": {"$gte": 2020}}}


@router.post("/search", response_model=SearchResponse, openapi_extra=documented(SearchRequest, _EXAMPLE, files=True))
async def search(body: Body, state: StateDep, caller: CallerDep) -> JSON:
    """The items nearest to a query, whatever either of them is: text, an image, a sound or a video."""
    started = time.perf_counter()
    warnings: list[str] = []
    with timed("search"):
        hits_by_query = await state.searcher.search(
            body.asked,
            top_k=body.top_k,
            collection=body.collection,
            modalities=body.modalities,
            filter=body.filter,
            effort=None if body.effort is None else Effort(**body.effort.model_dump()),
            ordering=_ordering(body),
            explain="explain" in body.include,
            with_vector="vector" in body.include,
            with_shown="preview" in body.include,
            judged="confidence" in body.include,
            balance=body.balance,
            caller=caller,
            field="queries" if body.query is None else "query",
            warn=warnings.append,
        )
    results = [[_result(hit, body.include) for hit in hits] for hits in hits_by_query]
    fields: dict[str, Any] = {"warnings": warnings} if warnings else {}
    if "confidence" in body.include:
        verdicts = [nothing([hit.confidence for hit in hits]) for hits in hits_by_query]
        fields["nothing"] = verdicts if body.query is None else verdicts[0]
    if body.balance:
        counts = (await state.store.facets(body.collection, filter=body.filter)).modalities
        fields["counts"] = {name: counts[name] for name in counts if body.modalities is None or name in body.modalities}
    took_ms = round(1_000 * (time.perf_counter() - started), 3)
    answer = {"results": results if body.query is None else results[0], "took_ms": took_ms}
    return JSON(answer | fields)


def _ordering(body: SearchRequest) -> Ordering:
    return Ordering(
        body.correction,
        body.threshold,
        None if body.keywords is None else Keywords(**body.keywords.model_dump()),
        body.deduplicate,
        None if body.rerank is None else Rerank(**body.rerank.model_dump()),
        None if body.diversity is None else Diversity(**body.diversity.model_dump()),
    )


def _result(found: Result, include: Collection[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"id": found.item.id, "score": found.score, "modality": found.item.modality}
    if "confidence" in include:
        result["confidence"] = found.confidence
    if "metadata" in include:
        result["metadata"] = found.item.metadata
    if "vector" in include:
        result["vector"] = found.item.vector
    if "preview" in include:
        result["preview"] = previewed(found.shown)
    if found.moment is not None:
        moment = found.moment
        result["moment"] = {"start": moment.start, "end": moment.end, "modality": moment.modality}
    if found.explanation is not None:
        result["explain"] = found.explanation
    return result
