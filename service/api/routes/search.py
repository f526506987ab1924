"""POST /search, POST /search/batch, POST /search/script."""

import time
from collections.abc import Collection
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from service.api.reading import documented, reader
from service.api.responses import JSON, previewed
from service.api.routes.media import read_original
from service.api.state import CallerDep, State, StateDep
from service.engine.caller import Caller
from service.retrieval.chance import nothing
from service.retrieval.script import Followed
from service.retrieval.search import Result
from service.runtime.timings import timed
from service.schemas.search import (
    ScriptRequest,
    ScriptResponse,
    SearchBatchRequest,
    SearchBatchResponse,
    SearchOptions,
    SearchRequest,
    SearchResponse,
    place_queries,
    place_query,
    place_steps,
)
from service.store import Moment

router = APIRouter(tags=["search"])

One = Annotated[SearchRequest, Depends(reader(SearchRequest, place_query))]
Many = Annotated[SearchBatchRequest, Depends(reader(SearchBatchRequest, place_queries))]
Script = Annotated[ScriptRequest, Depends(reader(ScriptRequest, place_steps))]
_EXAMPLE = {"query": "a dog on a beach", "modalities": ["image"], "top_k": 5, "filter": {"year": {"$gte": 2020}}}
_BATCH_EXAMPLE = {"queries": ["a dog on a beach", {"text": "heavy rain"}], "top_k": 5}
_SCRIPT_EXAMPLE = {"script": ["heavy rain", "a dog barks", "a car"], "modalities": ["video"], "top_k": 5}


@router.post("/search", response_model=SearchResponse, openapi_extra=documented(SearchRequest, _EXAMPLE, files=True))
async def search(body: One, state: StateDep, caller: CallerDep) -> JSON:
    """Return the items nearest to a query, whatever either of them is: text, an image, a sound or a video."""
    answer = await _answer(body, state, caller)
    return JSON(answer | {name: answer[name][0] for name in ("results", "nothing") if name in answer})


@router.post(
    "/search/batch",
    response_model=SearchBatchResponse,
    openapi_extra=documented(SearchBatchRequest, _BATCH_EXAMPLE, files=True),
)
async def search_batch(body: Many, state: StateDep, caller: CallerDep) -> JSON:
    """Return the items nearest to each of several queries, which share all options: a list of results for each."""
    return JSON(await _answer(body, state, caller))


@router.post(
    "/search/script",
    response_model=ScriptResponse,
    openapi_extra=documented(ScriptRequest, _SCRIPT_EXAMPLE, files=True),
)
async def search_script(body: Script, state: StateDep, caller: CallerDep) -> JSON:
    """Find videos and long sounds in which several things come one after the other: rain, then a dog barks, then a
    car. Each result says at which second."""
    start_s = time.perf_counter()
    warnings: list[str] = []
    with timed("search"):
        followed = await state.searcher.follow(body, caller, warnings.append)
    return JSON(_finish({"results": [_followed(result, body.include) for result in followed]}, warnings, start_s))


def _finish(answer: dict[str, Any], warnings: list[str], start_s: float) -> dict[str, Any]:
    """Return an answer with what there is to warn of, and the time that it took."""
    took = {"took_ms": round(1_000 * (time.perf_counter() - start_s), 3)}
    return answer | ({"warnings": warnings} if warnings else {}) | took


def _followed(result: Followed, include: Collection[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"id": result.item.id, "score": result.match.score, "modality": result.item.modality}
    if "metadata" in include:
        fields["metadata"] = result.item.metadata
    if "preview" in include:
        fields["preview"] = previewed(result.shown)
    fields["steps"] = [
        None if step is None else {**_moment(step[0]), "similarity": step[1]} for step in result.match.steps
    ]
    return fields


def _moment(moment: Moment) -> dict[str, Any]:
    return {"start": moment.start, "end": moment.end, "modality": moment.modality}


async def _answer(body: SearchOptions, state: State, caller: Caller) -> dict[str, Any]:
    """Return the fields of SearchBatchResponse."""
    start_s = time.perf_counter()
    warnings: list[str] = []
    versions: list[int] = []
    with timed("search"):
        original = partial(read_original, state=state)
        hits_by_query = await state.searcher.search(
            body, caller, original=original, warn=warnings.append, taught=versions.append
        )
    answer: dict[str, Any] = {"results": [[_result(hit, body.include) for hit in hits] for hits in hits_by_query]}
    if "confidence" in body.include:
        answer["nothing"] = [nothing([hit.confidence for hit in hits]) for hits in hits_by_query]
    if body.balance:
        counts = (await state.store.facets(body.collection, filter=body.filter)).modalities
        answer["counts"] = {name: counts[name] for name in counts if body.modalities is None or name in body.modalities}
    if versions:
        answer["feedback"] = versions[0]
    return _finish(answer, warnings, start_s)


def _result(hit: Result, include: Collection[str]) -> dict[str, Any]:
    result: dict[str, Any] = {"id": hit.item.id, "score": hit.score, "modality": hit.item.modality}
    if "confidence" in include:
        result["confidence"] = hit.confidence
    if "metadata" in include:
        result["metadata"] = hit.item.metadata
    if "vector" in include:
        result["vector"] = hit.item.vector
    if "preview" in include:
        result["preview"] = previewed(hit.shown)
    if hit.moment is not None:
        result["moment"] = _moment(hit.moment)
    if hit.explanation is not None:
        result["explain"] = hit.explanation
    if "why" in include:
        result["why"] = hit.why
    return result
