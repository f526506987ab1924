"""Bulk jobs: what is answered."""

from typing import Literal

from pydantic import BaseModel, Field

JobState = Literal["queued", "running", "done", "failed", "cancelled"]


class JobProblem(BaseModel):
    code: str
    detail: str


class JobResponse(BaseModel):
    id: str
    state: JobState
    form: Literal["jsonl", "tar"]
    collection: str = Field(description="Of items that do not name one.")
    total: int | None = Field(description="Items in the input; null until they are counted.")
    done: int = Field(description="Stored, and found by searches.")
    failed: int = Field(description="Refused: GET /jobs/{id}/errors says why, each.")
    rate: float | None = Field(description="Items per second of late.")
    eta_s: float | None = Field(description="Seconds to go at that rate.")
    created: str
    started: str | None
    ended: str | None
    error: JobProblem | None = Field(description="Why the job as a whole failed.")


class JobsResponse(BaseModel):
    jobs: list[JobResponse]


class JobError(BaseModel):
    """A line of the file of errors."""

    line: int = Field(description="Of JSONL the line, else the number of the file, from 1.")
    id: str | None
    code: str
    detail: str
