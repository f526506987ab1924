"""POST /classify."""

from typing import Annotated

from fastapi import APIRouter, Depends

from service.api.reading import A_PICTURE, append_inputs, documented, reader
from service.api.state import CallerDep, StateDep
from service.runtime.timings import timed
from service.schemas.classify import ClassifyRequest, ClassifyResponse

router = APIRouter(tags=["classify"])

Body = Annotated[ClassifyRequest, Depends(reader(ClassifyRequest, append_inputs))]
_EXAMPLE = {"inputs": [{"image": A_PICTURE}], "labels": ["a photograph", "a drawing", "a plain colour"]}


@router.post(
    "/classify", response_model_exclude_none=True, openapi_extra=documented(ClassifyRequest, _EXAMPLE, files=True)
)
async def classify(body: Body, state: StateDep, caller: CallerDep) -> ClassifyResponse:
    """Return the labels that fit each input best, and how surely; no label needs to have been trained on."""
    warnings: list[str] = []
    with timed("classify"):
        results = await state.model(body.model).classifier.classify(
            body.inputs,
            labels=body.labels,
            label_set=body.label_set,
            templates=body.templates,
            top_k=body.top_k,
            threshold=body.threshold,
            abstain=body.abstain,
            grid=body.grid,
            fail=body.on_error == "fail",
            caller=caller,
            warn=warnings.append,
        )
    return ClassifyResponse(results=results, warnings=warnings or None)
