"""POST and GET /jobs, GET and DELETE /jobs/{id}, GET /jobs/{id}/errors."""

from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response, StreamingResponse

from service.api.middleware import stated_length
from service.api.responses import JSON
from service.api.state import State, StateDep
from service.errors import InvalidRequest, UnsupportedBody
from service.jobs.jobs import Jobs
from service.jobs.ledger import Refusal
from service.jobs.run import Progress
from service.runtime.logs import caller
from service.runtime.quotas import Meter
from service.schemas.items import Name
from service.schemas.jobs import JobError, JobResponse, JobsResponse, JobState
from service.store import DEFAULT_COLLECTION

router = APIRouter(tags=["jobs"])

_FORMS: dict[str, Literal["jsonl", "tar"]] = {
    "application/jsonl": "jsonl",
    "application/x-ndjson": "jsonl",
    "application/x-jsonlines": "jsonl",
    "application/x-tar": "tar",
    "application/x-gtar": "tar",
    "application/gzip": "tar",
    "application/x-gzip": "tar",
}
_LINES = "application/jsonl"
_BODY = {
    "required": True,
    "content": {
        _LINES: {
            "schema": {"type": "string", "description": "A line for each item, as in POST /items; gzip or not."},
            "example": '{"id": "a", "text": "a dog on a beach"}\n{"id": "b", "text": "heavy rain"}\n',
        },
        "application/x-tar": {
            "schema": {
                "type": "string",
                "contentMediaType": "application/x-tar",
                "description": "Images, sounds and texts (.txt, .md); their names are the items' ids. Metadata of "
                "a/b.jpg: a/b.jpg.json or a/b.json, and lines with a file_name in metadata.jsonl. gzip or not.",
            }
        },
    },
}
_IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="Sent again with the same body, it is answered by the same job."),
]


@router.post("/jobs", status_code=202, response_model=JobResponse, openapi_extra={"requestBody": _BODY})
async def create_job(
    request: Request,
    state: StateDep,
    idempotency_key: _IdempotencyKey = None,
    collection: Annotated[Name | None, Query(description="Of items that do not name one.")] = None,
) -> Response:
    """Index the items of JSONL or of a tar, in the background.

    Answered once the input is on the server's disk. From then on the job survives the server's end, whatever that is.
    Items are written in the order of the input; an id that comes twice ends up as its last.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Two clients may choose the same key.
    key = None if idempotency_key is None else f"{caller.get() or ''} {idempotency_key}"
    if kind not in _FORMS:
        raise UnsupportedBody(f"this route reads {', '.join(_FORMS)}: `isthmus index` sends the files of a folder")
    into, size = collection or DEFAULT_COLLECTION, stated_length(request.headers)
    progress, new = await _jobs(state).submit(_FORMS[kind], into, request.stream(), key, _meter(request), size)
    headers = {"Location": f"/jobs/{progress.job.id}"} | ({} if new else {"Idempotency-Replayed": "true"})
    return JSON(_described(progress), 202, headers)


@router.get("/jobs", response_model=JobsResponse)
async def list_jobs(
    state: StateDep,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    before: Annotated[str | None, Query(max_length=100, description="The last job of the page before.")] = None,
    job_state: Annotated[list[JobState] | None, Query(alias="state")] = None,
) -> JSON:
    """List jobs, the newest first. An ended job is forgotten after a week, or as the operator sets."""
    return JSON({"jobs": [_described(job) for job in await _jobs(state).jobs(limit, before, job_state)]})


@router.get("/jobs/{id}", response_model=JobResponse)
async def get_job(id: str, state: StateDep) -> JSON:
    """Return how far a job is: what it stored, refused and has yet to read."""
    return JSON(_described(await _jobs(state).job(id)))


@router.delete("/jobs/{id}", response_model=JobResponse)
async def cancel_job(id: str, state: StateDep) -> JSON:
    """Stop a job. What it stored stays; nothing more of it is written after this answer."""
    return JSON(_described(await _jobs(state).cancel(id)))


@router.get(
    "/jobs/{id}/errors",
    response_class=StreamingResponse,
    responses={200: {"model": JobError, "content": {_LINES: {}}, "description": "A line for each item refused so far"}},
)
async def list_job_errors(id: str, state: StateDep) -> StreamingResponse:
    """Return the items that were refused so far, as JSONL, in the order of the input."""
    pages = await _jobs(state).errors(id)
    headers = {"Content-Disposition": f'attachment; filename="{id}-errors.jsonl"'}
    return StreamingResponse(_lines(pages), media_type=_LINES, headers=headers)


async def _lines(pages: AsyncIterator[list[Refusal]]) -> AsyncIterator[bytes]:
    async for page in pages:
        yield b"".join(orjson.dumps(asdict(refusal)) + b"\n" for refusal in page)


def _meter(request: Request) -> str | None:
    """Return the name of the limits of the request's key, where embedding is limited."""
    meter: Meter | None = getattr(request.state, "meter", None)
    return None if meter is None or meter.units <= {"requests"} else str(meter)


def _jobs(state: State) -> Jobs:
    if state.jobs is None:
        raise InvalidRequest("this server takes no jobs: its operator named no folder for them", code="jobs_disabled")
    return state.jobs


def _described(progress: Progress) -> dict[str, Any]:
    job = progress.job
    fields = ("id", "state", "form", "collection", "total", "done", "failed", "created", "started", "ended")
    return {name: getattr(job, name) for name in fields} | {
        "rate": None if progress.rate is None else round(progress.rate, 2),
        "eta_s": None if progress.eta_s is None else round(progress.eta_s, 1),
        "error": None if job.code is None else {"code": job.code, "detail": job.detail},
    }
