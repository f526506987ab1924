"""POST /score."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends

from service.api.reading import A_PICTURE, documented, reader
from service.api.responses import JSON
from service.api.state import CallerDep, StateDep
from service.contract.errors import InputError
from service.errors import InputFailed
from service.schemas.embed import ScoreRequest, ScoreResponse
from service.schemas.inputs import File

router = APIRouter(tags=["embed"])


def fill_pairs(body: dict[str, Any], files: list[File]) -> None:
    """Give files to the missing sides of pairs, in order; the remaining files make pairs of their own, two by two."""
    pairs = body.get("pairs", [])
    if not files or not isinstance(pairs, list):
        return
    left = iter(files)
    filled = [
        {**pair, **{side: next(left, None) for side in ("a", "b") if pair.get(side) is None}}
        if isinstance(pair, dict)
        else pair
        for pair in pairs
    ]
    filled += [{"a": file, "b": next(left, None)} for file in left]
    body["pairs"] = filled


Body = Annotated[ScoreRequest, Depends(reader(ScoreRequest, fill_pairs))]
_EXAMPLE = {"pairs": [{"a": "something red", "b": {"image": A_PICTURE}}]}


@router.post("/score", response_model=ScoreResponse, openapi_extra=documented(ScoreRequest, _EXAMPLE, files=True))
async def score(body: Body, state: StateDep, caller: CallerDep) -> JSON:
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
