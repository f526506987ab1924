"""POST /v1/embeddings and GET /v1/models, for OpenAI's clients."""

import datetime
from typing import Annotated

from fastapi import APIRouter, Depends

from service import videos
from service.contract.errors import InputError
from service.contract.tokens import Role
from service.inputs import all_embedded, documented, reader, to_inputs
from service.model import Model
from service.pipeline import Embedded, Embedder, Input, TokenIds
from service.responses import JSON, cut, encoded
from service.schemas.openai import EmbeddingsRequest, EmbeddingsResponse, OpenAIInput, OpenAIModel, OpenAIModels
from service.state import StateDep
from service.videos import Video

router = APIRouter(prefix="/v1", tags=["openai"])
Body = Annotated[EmbeddingsRequest, Depends(reader(EmbeddingsRequest))]


@router.post("/embeddings", response_model=EmbeddingsResponse, openapi_extra=documented(EmbeddingsRequest))
async def embeddings(body: Body, state: StateDep) -> JSON:
    """As OpenAI's endpoint; `input` also takes {"image": …}, {"audio": …} and {"text": …}."""
    embedder = state.model(body.model).embedder
    results = all_embedded(await _embed(embedder, body.inputs(), body.role), field="input")
    tokens = sum(each.tokens for each in results)
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": encoded(cut(each.vector, body.dimensions), body.encoding_format),
        }
        for index, each in enumerate(results)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSON({"object": "list", "data": data, "model": body.model, "usage": usage})


@router.get("/models", response_model=OpenAIModels)
async def models(state: StateDep) -> OpenAIModels:
    return OpenAIModels(data=[_described(state.model(name), name) for name in (*state.models, *state.settings.aliases)])


@router.get("/models/{name}", response_model=OpenAIModel)
async def model(name: str, state: StateDep) -> OpenAIModel:
    return _described(state.model(name), name)


def _described(model: Model, name: str) -> OpenAIModel:
    manifest = model.manifest
    day = datetime.datetime.fromisoformat(manifest.created)
    created = int(day.replace(tzinfo=day.tzinfo or datetime.UTC).timestamp())
    return OpenAIModel(id=name, created=created, owned_by="isthmus")


async def _embed(embedder: Embedder, values: list[OpenAIInput], role: Role) -> list[Embedded | InputError]:
    others = iter(await to_inputs([each for each in values if not isinstance(each, list)], role))
    inputs: list[Input | Video | InputError] = [
        TokenIds(tuple(each)) if isinstance(each, list) else next(others) for each in values
    ]
    readable = [each for each in inputs if not isinstance(each, InputError)]
    results = iter(await videos.embed(embedder, readable))
    return [each if isinstance(each, InputError) else next(results) for each in inputs]
