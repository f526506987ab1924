"""`jina`: POST /v1/rerank, for clients of Jina's rerankers; its embeddings are OpenAI's shape (`openai`)."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Field, StrictBool

from service.api.protocols.protocol import Protocol, plain_error
from service.api.protocols.vectors import Warnings, ranked, warning_field
from service.api.reading import documented, reader
from service.api.responses import JSON
from service.api.state import CallerDep, StateDep
from service.engine.inputs import Text
from service.errors import InvalidRequest
from service.schemas.inputs import AnyInput, RequestModel, at_most

router = APIRouter(prefix="/v1", tags=["jina"])


class JinaRerankRequest(RequestModel):
    model: str
    query: AnyInput
    documents: Annotated[
        list[AnyInput], Field(min_length=1), at_most(lambda limits: limits.openai_inputs, "documents")
    ] = Field(description="Texts, images, sounds and videos, mixed at will.")
    top_n: Annotated[int, Field(ge=1, strict=True)] | None = Field(default=None, description="Default: all.")
    return_documents: StrictBool | None = Field(
        default=None, description="Whether documents stand in the results. Default: those that are texts."
    )


class JinaDocument(BaseModel):
    text: str


class JinaRanked(BaseModel):
    index: int
    relevance_score: float = Field(description="Cosine similarity of the query and the document, in [-1, 1].")
    document: JinaDocument | None = None


class JinaUsage(BaseModel):
    total_tokens: int


class JinaRerankResponse(BaseModel):
    model: str
    usage: JinaUsage
    results: list[JinaRanked] = Field(description="Best first.")
    warnings: Warnings = None


Body = Annotated[JinaRerankRequest, Depends(reader(JinaRerankRequest))]
_EXAMPLE = {"model": "starter", "query": "a dog on a beach", "documents": ["waves and a dog", "heavy rain"], "top_n": 1}


@router.post("/rerank", response_model=JinaRerankResponse, openapi_extra=documented(JinaRerankRequest, _EXAMPLE))
async def rerank_like_jina(body: Body, state: StateDep, caller: CallerDep) -> JSON:
    """Order documents by their similarity to a query, in the model's space: there is no cross-encoder here."""
    texts = [document.text if isinstance(document, Text) else None for document in body.documents]
    if body.return_documents and None in texts:
        raise InvalidRequest(
            f"return_documents: documents[{texts.index(None)}] is no text, and only texts are returned"
        )
    ranking = await ranked(state.model(body.model), body.query, body.documents, caller, field="documents")
    results = []
    for index, score in ranking.best[: body.top_n]:
        result: dict[str, Any] = {"index": index, "relevance_score": score}
        if body.return_documents is not False and texts[index] is not None:
            result["document"] = {"text": texts[index]}
        results.append(result)
    answer = {"model": body.model, "usage": {"total_tokens": ranking.tokens}, "results": results}
    return JSON(answer | warning_field(ranking.warnings))


PROTOCOL = Protocol("jina", router, ("/v1/rerank",), frozenset({"/v1/rerank"}), *plain_error("Jina", "detail"))
