"""`openai`: POST /v1/embeddings and GET /v1/models, for clients of OpenAI, Jina, infinity, NVCLIP and vLLM."""

import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from service.api.protocols.protocol import Protocol, Refusal
from service.api.protocols.vectors import vectors_of
from service.api.reading import documented, reader
from service.api.responses import JSON, encoded
from service.api.state import CallerDep, Model, StateDep
from service.engine.inputs import Embedded, TokenIds
from service.errors import InvalidRequest
from service.schemas.openai import EmbeddingsRequest, EmbeddingsResponse, OpenAIError, OpenAIModel, OpenAIModels

router = APIRouter(prefix="/v1", tags=["openai"])
Body = Annotated[EmbeddingsRequest, Depends(reader(EmbeddingsRequest))]
_EXAMPLE = {"model": "starter", "input": ["a dog on a beach", "heavy rain"]}
_NO_IDS = (
    "input: token ids are not read here, because those of another model's tokenizer would be another text: send the "
    "text itself (in LangChain, OpenAIEmbeddings(check_embedding_ctx_length=False)). Where clients have this bundle's "
    "own tokenizer, ISTHMUS_TOKEN_IDS=true lets the server take its ids"
)


@router.post("/embeddings", response_model=EmbeddingsResponse, openapi_extra=documented(EmbeddingsRequest, _EXAMPLE))
async def create_embeddings(body: Body, state: StateDep, caller: CallerDep) -> JSON:
    """Embed like OpenAI's endpoint; `input` also takes {"image": …}, {"audio": …}, {"video": …} and {"text": …}."""
    if not state.settings.token_ids and any(isinstance(input, TokenIds) for input in body.inputs):
        raise InvalidRequest(_NO_IDS)
    results = await vectors_of(state.model(body.model), body.inputs, caller, field="input", cut=body.cut)
    tokens = sum(result.tokens for result in results)
    data = [_row(index, result, body) for index, result in enumerate(results)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSON({"object": "list", "data": data, "model": body.model, "usage": usage})


@router.get("/models", response_model=OpenAIModels)
async def list_openai_models(state: StateDep) -> OpenAIModels:
    """List the served bundles and their aliases in the shape of OpenAI's clients."""
    return OpenAIModels(data=[_described(state.model(name), name) for name in (*state.models, *state.settings.aliases)])


@router.get("/models/{name}", response_model=OpenAIModel)
async def get_openai_model(name: str, state: StateDep) -> OpenAIModel:
    """Return one served bundle in the shape of OpenAI's clients."""
    return _described(state.model(name), name)


def _row(index: int, result: Embedded, body: EmbeddingsRequest) -> dict[str, Any]:
    vector = encoded(result.vector, body.dimensions, body.encoding_format)
    row = {"object": "embedding", "index": index, "embedding": vector}
    # Fields that OpenAI's answers lack are sent only where they have a value.
    return (
        row
        | ({"truncated": True} if result.truncated else {})
        | ({"unknown": result.unknown} if result.unknown else {})
    )


def _described(model: Model, name: str) -> OpenAIModel:
    manifest = model.manifest
    day = datetime.datetime.fromisoformat(manifest.created)
    created = int(day.replace(tzinfo=day.tzinfo or datetime.UTC).timestamp())
    return OpenAIModel(id=name, created=created, owned_by="isthmus")


def _error(refusal: Refusal) -> dict[str, Any]:
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    kind = "rate_limit_error" if refusal.status == 429 else kind
    error = {"message": refusal.message, "type": kind, "param": refusal.field, "code": refusal.code}
    return {"error": error, "detail": refusal.message}


PROTOCOL = Protocol("openai", router, ("/v1",), frozenset({"/v1/embeddings"}), _error, OpenAIError)
