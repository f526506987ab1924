"""POST /classify."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends

from service.api.reading import A_PICTURE, append_inputs, documented, reader
from service.api.state import CallerDep, StateDep
from service.errors import input_problem
from service.retrieval.classify import Classification, Label
from service.runtime.timings import timed
from service.schemas import classify as wire
from service.schemas.classify import Classified, ClassifyRequest, ClassifyResponse, ScoredLabel, TaughtLabel
from service.schemas.embed import InputProblem

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
            labels=None if body.labels is None else plain_labels(body.labels),
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
    return ClassifyResponse(results=[_result(result) for result in results], warnings=warnings or None)


def plain_labels(labels: Sequence[str | wire.Label]) -> list[str | Label]:
    return [
        label
        if isinstance(label, str)
        else Label(label.name, label.prompts, label.examples if isinstance(label, TaughtLabel) else ())
        for label in labels
    ]


def _result(result: Classification) -> Classified:
    if result.error is not None:
        return Classified(labels=[], abstained=False, error=InputProblem(**input_problem(result.error)))
    return Classified(
        labels=[
            ScoredLabel(
                label=label.label, score=label.score, similarity=label.similarity, probability=label.probability
            )
            for label in result.labels
        ],
        abstained=result.abstained,
        on_topic=result.on_topic,
        cells=None if result.cells is None else [[_result(cell) for cell in row] for row in result.cells],
    )
