"""Judgements of what searches found, and the versions of what a collection was taught by them."""

from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from service.schemas.inputs import RequestModel, at_most
from service.schemas.items import ItemId, Name
from service.schemas.search import Query
from service.store import DEFAULT_COLLECTION

MOST_JUDGEMENTS, MOST_QUERIES = 1_000, 100
"""Largest number of judged items, and of judged queries, of a request and of a version."""
_Ids = Annotated[list[ItemId], Field(max_length=MOST_JUDGEMENTS)]


class JudgedQuery(RequestModel):
    """A query, and stored items that are, or are not, what was looked for."""

    query: Query
    relevant: _Ids = Field(default=[])
    not_relevant: _Ids = Field(default=[])

    @model_validator(mode="after")
    def _decided(self) -> Self:
        if not self.relevant and not self.not_relevant:
            raise ValueError("name at least one item, in relevant or in not_relevant")
        if contradicted := set(self.relevant) & set(self.not_relevant):
            raise ValueError(f"the item {min(contradicted)!r} is both relevant and not relevant")
        return self


class FeedbackRequest(RequestModel):
    """Judgements, which count in addition to those of the version in use."""

    collection: Name = DEFAULT_COLLECTION
    judgements: Annotated[
        list[JudgedQuery],
        Field(min_length=1, max_length=MOST_QUERIES),
        at_most(lambda limits: limits.inputs, "judgements", "query"),
    ]

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if sum(len(judged.relevant) + len(judged.not_relevant) for judged in self.judgements) > MOST_JUDGEMENTS:
            raise ValueError(f"at most {MOST_JUDGEMENTS:,} judged items in one request")
        return self


class VersionRequest(RequestModel):
    """The version that a collection's searches are to use."""

    collection: Name = DEFAULT_COLLECTION
    version: Annotated[int, Field(ge=1, strict=True)] | None = Field(
        description="One that GET /feedback lists; null: search without any."
    )


class FeedbackVersion(BaseModel):
    version: int
    created: str
    judgements: int = Field(description="Judged items, those of the versions that it is built on included.")
    queries: int = Field(description="Judged queries.")


class TaughtResponse(FeedbackVersion):
    warnings: list[str] | None = Field(
        default=None, description="Queries that nothing was learned from, and why; absent if there are none."
    )


class FeedbackResponse(BaseModel):
    current: int | None = Field(description="The version that searches use; null: none.")
    versions: list[FeedbackVersion] = Field(description="Newest last.")
