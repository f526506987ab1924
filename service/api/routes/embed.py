"""POST /embed and POST /score."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends

from service.api.reading import A_PICTURE, append_inputs, documented, reader
from service.api.responses import JSON, encoded
from service.api.state import CallerDep, StateDep
from service.contract.errors import InputError
from service.engine.inputs import in_role, raise_first
from service.errors import InputFailed, input_problem
from service.schemas.embed import EmbedRequest, EmbedResponse, ScoreRequest, ScoreResponse
from service.schemas.inputs import File, fill_parts

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
            flags = {"truncated": result.truncated, "unknown": result.unknown}
            rows.append({"index": index, "modality": result.kind, "embedding": vector} | flags)
    length = body.dimensions or model.manifest.dimensions
    answer = {"space": model.manifest.space, "dimensions": length, "encoding": body.encoding, "embeddings": rows}
    return JSON(answer)


def fill_pairs(body: dict[str, Any], files: list[File]) -> None:
    """Give files, in order, to the sides of pairs that are missing or have no input; the remaining files make pairs of
    their own, two by two."""
    pairs = body.get("pairs", [])
    if not files or not isinstance(pairs, list):
        return
    for pair in (pair for pair in pairs if isinstance(pair, dict)):
        for side in ("a", "b"):
            if pair.get(side) is not None:
                files = fill_parts(pair[side], files)
            elif files:
                pair[side], *files = files
    unplaced = iter(files)
    body["pairs"] = [*pairs, *({"a": file, "b": next(unplaced, None)} for file in unplaced)]


Pairs = Annotated[ScoreRequest, Depends(reader(ScoreRequest, fill_pairs))]
_PAIRS_EXAMPLE = {"pairs": [{"a": "something red", "b": {"image": A_PICTURE}}]}


@router.post("/score", response_model=ScoreResponse, openapi_extra=documented(ScoreRequest, _PAIRS_EXAMPLE, files=True))
async def score(body: Pairs, state: StateDep, caller: CallerDep) -> JSON:
    """Return the cosine similarity of pairs of inputs, of any two kinds."""
    sides = [side for pair in body.pairs for side in (pair.a, pair.b)]
    model = state.model(body.model)
    vectors = []
    for index, result in enumerate(await model.embedder.embed(sides, caller)):
        if isinstance(result, InputError):
            raise InputFailed(index // 2, result, field="pairs")
        vectors.append(result.vector)
    stacked = np.stack(vectors)
    scores = np.clip((stacked[0::2] * stacked[1::2]).sum(axis=1), -1.0, 1.0)
    return JSON({"space": model.manifest.space, "scores": scores})
