"""POST, GET, PUT and DELETE /feedback: what the searches of a collection learn from judgements of their results."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from service.api.reading import documented, reader
from service.api.state import CallerDep, StateDep
from service.retrieval.feedback import Judgement, Version, Versions
from service.schemas.feedback import (
    FeedbackRequest,
    FeedbackResponse,
    FeedbackVersion,
    TaughtResponse,
    VersionRequest,
)
from service.schemas.items import Name
from service.store import DEFAULT_COLLECTION

router = APIRouter(tags=["search"])

Body = Annotated[FeedbackRequest, Depends(reader(FeedbackRequest))]
_EXAMPLE = {"judgements": [{"query": "a dog on a beach", "relevant": ["holiday/beach"]}]}


@router.post("/feedback", response_model_exclude_none=True, openapi_extra=documented(FeedbackRequest, _EXAMPLE))
async def teach(body: Body, state: StateDep, caller: CallerDep) -> TaughtResponse:
    """Judge results: the collection's searches are moved by it from now on, and by what was judged before. Stored
    vectors stay, and queries that are not like the judged ones find what they found."""
    warnings: list[str] = []
    queries = await state.searcher.vectors(
        [row.query for row in body.judgements], body.collection, caller, "judgements", warnings.append
    )
    judgements = [
        Judgement(vector, row.relevant, row.not_relevant) for vector, row in zip(queries, body.judgements, strict=True)
    ]
    version, unlearned = await state.searcher.feedback.teach(body.collection, judgements)
    if unlearned:
        warnings.append(
            f"nothing is learned from {unlearned} of the {version.queries} judged queries: they are too like everyday "
            "queries, which may not move"
        )
    return TaughtResponse(**_described(version).model_dump(), warnings=warnings or None)


@router.get("/feedback")
async def list_feedback(state: StateDep, collection: Name = DEFAULT_COLLECTION) -> FeedbackResponse:
    """List the versions of what a collection was taught."""
    await state.store.collection(collection)
    return _listed(await state.searcher.feedback.versions(collection))


@router.put("/feedback", openapi_extra=documented(VersionRequest, {"version": 1}))
async def use_feedback(
    body: Annotated[VersionRequest, Depends(reader(VersionRequest))], state: StateDep
) -> FeedbackResponse:
    """Search with another version, or with none. The next judgements build on that one."""
    await state.store.collection(body.collection)
    return _listed(await state.searcher.feedback.use(body.collection, body.version))


@router.delete("/feedback", status_code=204)
async def delete_feedback(
    state: StateDep,
    collection: Name = DEFAULT_COLLECTION,
    version: Annotated[int | None, Query(ge=1, description="Without it all versions are deleted.")] = None,
) -> None:
    """Delete a version, or all. Searches that used it use none."""
    await state.store.collection(collection)
    await state.searcher.feedback.delete(collection, version)


def _listed(versions: Versions) -> FeedbackResponse:
    return FeedbackResponse(current=versions.current, versions=[_described(version) for version in versions.versions])


def _described(version: Version) -> FeedbackVersion:
    return FeedbackVersion(
        version=version.number, created=version.created, judgements=version.judgements, queries=version.queries
    )
