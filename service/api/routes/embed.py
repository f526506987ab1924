"""POST /embed."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from service.api.reading import A_PICTURE, append_inputs, documented, reader
from service.api.responses import JSON, encoded
from service.api.state import CallerDep, StateDep
from service.contract.errors import InputError
from service.engine.inputs import in_role, raise_first
from service.errors import input_problem
from service.schemas.embed import EmbedRequest, EmbedResponse

router = APIRouter(tags=["embed"])
Body = Annotated[EmbedRequest, Depends(reader(EmbedRequest, append_inputs))]
_EXAMPLE = {"inputs": ["a dog on a beach", {"image": A_PICTURE}]}


@router.post("/embed", response_model=EmbedResponse, openapi_extra=documented(EmbedRequest, _EXAMPLE, files=True))
async def embed(body: Body, state: StateDep, caller: CallerDep) -> JSON:
    """Embed texts, images, sounds and videos: one unit vector per input, all in one space."""
    model = state.model(body.model)
    inputs = body.inputs if body.role == "query" else in_role(body.inputs, body.role)
    results = await model.embedder.embed(inputs, caller)
    if body.on_error == "fail":
        raise_first(results)
    rows: list[dict[str, Any]] = []
    for index, result in enumerate(results):
        if isinstance(result, InputError):
            rows.append({"index": index, "embedding": None, "error": input_problem(result)})
        else:
            vector = encoded(result.vector, body.dimensions, body.encoding)
            seen = {"truncated": result.truncated, "unknown": result.unknown}
            rows.append({"index": index, "modality": result.kind, "embedding": vector} | seen)
    length = body.dimensions or model.manifest.dimensions
    answer = {"space": model.manifest.space, "dimensions": length, "encoding": body.encoding, "embeddings": rows}
    return JSON(answer)
