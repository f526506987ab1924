"""POST /v1/embeddings and GET /v1/models, for OpenAI's clients."""

import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from service.api.model import Model
from service.api.reading import documented, reader
from service.api.responses import JSON, encoded
from service.api.state import CallerDep, StateDep
from service.contract.errors import InputError
from service.engine.inputs import Embedded, TokenIds, raise_first
from service.errors import InvalidRequest
from service.schemas.openai import EmbeddingsRequest, EmbeddingsResponse, OpenAIModel, OpenAIModels

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
    if not state.settings.token_ids and any(isinstance(given, TokenIds) for given in body.inputs):
        raise InvalidRequest(_NO_IDS)
    embedded = await state.model(body.model).embedder.embed(body.inputs, caller)
    answers = embedded if body.cut else [_whole(result) for result in embedded]
    raise_first(answers, field="input")
    results = [result for result in answers if isinstance(result, Embedded)]
    tokens = sum(result.tokens for result in results)
    data = [_row(index, each, body) for index, each in enumerate(results)]
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


def _whole(result: Embedded | InputError) -> Embedded | InputError:
    if isinstance(result, Embedded) and result.truncated:
        return InputError("the text is longer than the model reads, and truncate says that it is not to be cut")
    return result


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
