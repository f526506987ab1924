"""`tei`: text-embeddings-inference below /tei, and POST /tei itself, which its clients call where they have a base URL.

Haystack's ranker joins /rerank to the host alone; that path is served too.
"""

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends
from pydantic import BaseModel, Discriminator, Field, RootModel, StrictBool, Tag, model_validator

from service import __version__
from service.api.protocols.protocol import Protocol, Refusal
from service.api.protocols.vectors import ranked, vectors_of
from service.api.reading import documented, reader
from service.api.responses import JSON, encoded
from service.api.state import CallerDep, StateDep
from service.contract.tokens import TextPreprocessing
from service.engine.inputs import Input, Text, in_role
from service.errors import NotFound
from service.schemas.inputs import RequestModel, Strings, at_most, read_as
from service.schemas.openai import ROLES

router = APIRouter(tags=["tei"])
String = Annotated[Input, read_as("string")]
Direction = Annotated[
    Literal["right", "Right"], Field(description="Texts lose their end; `left` would be another vector.")
]
Cut = Annotated[StrictBool, Field(description="false: a text that is longer than the model reads is an error.")]


class TeiRequest(RequestModel):
    truncate: Cut = False
    truncation_direction: Direction = "right"


class TeiEmbedRequest(TeiRequest):
    inputs: Strings = Field(
        min_length=1, description="A string that is a data: URI of an image, a sound or a video is that file."
    )
    normalize: StrictBool = True
    prompt_name: str | None = Field(default=None, description="query, or passage.")
    dimensions: Annotated[int, Field(ge=1, strict=True)] | None = None

    @model_validator(mode="after")
    def _known_prompt(self) -> Self:
        if not self.normalize:
            raise ValueError("normalize: every vector has unit length here, so say true")
        if self.prompt_name is not None and self.prompt_name.lower() not in ROLES:
            raise ValueError("prompt_name is none that is known here: say query or passage")
        return self

    @property
    def given(self) -> list[Input]:
        return in_role(self.inputs, ROLES[(self.prompt_name or "query").lower()])


class TeiRerankRequest(TeiRequest):
    query: String
    texts: Annotated[list[String], Field(min_length=1), at_most(lambda limits: limits.openai_inputs, "texts")]
    raw_scores: StrictBool = Field(
        default=False, description="true: cosine similarities, in [-1, 1]. false: (1 + cosine) / 2, in [0, 1]."
    )
    return_text: StrictBool = False


def _task(value: Any) -> str:
    return "rerank" if isinstance(value, dict) and "query" in value else "embed"


_Any = Annotated[
    Annotated[TeiEmbedRequest, Tag("embed")] | Annotated[TeiRerankRequest, Tag("rerank")], Discriminator(_task)
]


class TeiAnyRequest(RootModel[_Any]):
    """A body of /tei/embed, or one of /tei/rerank."""


class TeiRank(BaseModel):
    index: int
    score: float
    text: str | None = None


class TeiError(BaseModel):
    error: str
    error_type: Literal["Unhealthy", "Backend", "Overloaded", "Validation"]


EmbedBody = Annotated[TeiEmbedRequest, Depends(reader(TeiEmbedRequest))]
RerankBody = Annotated[TeiRerankRequest, Depends(reader(TeiRerankRequest))]
AnyBody = Annotated[TeiAnyRequest, Depends(reader(TeiAnyRequest))]
_EMBED_EXAMPLE = {"inputs": ["a dog on a beach", "heavy rain"]}
_RERANK_EXAMPLE = {"query": "a dog on a beach", "texts": ["waves and a dog", "heavy rain"]}


@router.post("/tei/embed", response_model=list[list[float]], openapi_extra=documented(TeiEmbedRequest, _EMBED_EXAMPLE))
async def embed_like_tei(body: EmbedBody, state: StateDep, caller: CallerDep) -> JSON:
    """Embed texts with the default model: one list of numbers for each."""
    results = await vectors_of(state.default, body.given, caller, field="inputs", cut=body.truncate)
    return JSON([encoded(result.vector, body.dimensions, "float") for result in results])


@router.post("/tei/rerank", response_model=list[TeiRank], openapi_extra=documented(TeiRerankRequest, _RERANK_EXAMPLE))
@router.post("/rerank", response_model=list[TeiRank], include_in_schema=False)
async def rerank_like_tei(body: RerankBody, state: StateDep, caller: CallerDep) -> JSON:
    """Order texts by their similarity to a query, in the model's space: there is no cross-encoder here."""
    ranking = await ranked(state.default, body.query, body.texts, caller, field="texts", cut=body.truncate)
    results = []
    for index, score in ranking.best:
        rank: dict[str, Any] = {"index": index, "score": score if body.raw_scores else (1 + score) / 2}
        document = body.texts[index]
        if body.return_text and isinstance(document, Text):
            rank["text"] = document.text
        results.append(rank)
    return JSON(results)


@router.post(
    "/tei",
    response_model=list[list[float]] | list[TeiRank],
    openapi_extra=documented(TeiAnyRequest, _EMBED_EXAMPLE),
)
async def answer_like_tei(body: AnyBody, state: StateDep, caller: CallerDep) -> JSON:
    """Embed inputs or rerank texts, by what the body holds."""
    request = body.root
    if isinstance(request, TeiRerankRequest):
        return await rerank_like_tei(request, state, caller)
    return await embed_like_tei(request, state, caller)


@router.get("/tei/info")
async def describe_like_tei(state: StateDep) -> dict[str, Any]:
    """Return the default model and the limits in the shape of text-embeddings-inference."""
    manifest, limits = state.default.manifest, state.settings
    channel = state.default.embedder.channels.get("text")
    spec = manifest.towers["text"].preprocessing if "text" in manifest.towers else None
    if channel is None or not isinstance(spec, TextPreprocessing):
        raise NotFound("the default model has no text tower here")
    return {
        "model_id": manifest.name,
        "model_sha": None,
        "model_dtype": channel.tower.precision,
        "model_type": {"embedding": {"pooling": "graph"}},
        "max_concurrent_requests": limits.queue_inputs,
        "max_input_length": spec.max_length,
        "max_batch_tokens": channel.budget.limit,
        "max_batch_requests": None,
        "max_client_batch_size": limits.max_inputs,
        "auto_truncate": False,
        "tokenization_workers": limits.decode_workers,
        "version": __version__,
    }


def _error(refusal: Refusal) -> dict[str, Any]:
    kinds = {429: "Overloaded", 503: "Unhealthy"}
    kind = kinds.get(refusal.status, "Backend" if refusal.status >= 500 else "Validation")
    return {"error": refusal.message, "error_type": kind}


_READS = frozenset({"/tei", "/tei/embed", "/tei/rerank", "/rerank"})
PROTOCOL = Protocol("tei", router, ("/tei", "/rerank"), _READS, _error, TeiError)
