"""POST /classify. GET /label-sets; PUT, GET and DELETE /label-sets/{name}: labels that are encoded once for many
classifications."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from service.api.reading import A_PICTURE, append_inputs, documented, reader
from service.api.state import CallerDep, State, StateDep
from service.runtime.timings import timed
from service.schemas.classify import (
    ClassifyRequest,
    ClassifyResponse,
    LabelSetRequest,
    LabelSetResponse,
    LabelSetsResponse,
    LearnedDetector,
    ListedLabelSet,
    StoredLabel,
)
from service.schemas.items import Name

router = APIRouter(tags=["classify"])

Body = Annotated[ClassifyRequest, Depends(reader(ClassifyRequest, append_inputs))]
_EXAMPLE = {"inputs": [{"image": A_PICTURE}], "labels": ["a photograph", "a drawing", "a plain colour"]}
LabelSetBody = Annotated[LabelSetRequest, Depends(reader(LabelSetRequest))]
_SET_EXAMPLE = {
    "labels": ["cat", {"name": "dog", "prompts": ["a photo of a dog"], "examples": ["a dog runs after a ball"]}],
    "templates": ["a photo of a {}"],
}


@router.post(
    "/classify", response_model_exclude_none=True, openapi_extra=documented(ClassifyRequest, _EXAMPLE, files=True)
)
async def classify(body: Body, state: StateDep, caller: CallerDep) -> ClassifyResponse:
    """Return the labels that fit each input best, and how surely; no label needs to have been trained on."""
    warnings: list[str] = []
    with timed("classify"):
        results = await state.model(body.model).classifier.classify(body, caller, warnings.append)
    return ClassifyResponse(results=results, warnings=warnings or None)


@router.get("/label-sets")
async def list_label_sets(
    state: StateDep,
    limit: Annotated[int, Query(ge=1, le=1_000)] = 100,
    after: Annotated[Name | None, Query(description="The last label set of the page before.")] = None,
) -> LabelSetsResponse:
    """List the label sets by name."""
    listed = await state.store.label_sets(after or "/", limit)  # after the dot that records of other kinds begin with
    return LabelSetsResponse(label_sets=[ListedLabelSet(**asdict(label_set)) for label_set in listed])


@router.put("/label-sets/{name}", openapi_extra=documented(LabelSetRequest, _SET_EXAMPLE))
async def put_label_set(name: Name, body: LabelSetBody, state: StateDep, caller: CallerDep) -> LabelSetResponse:
    """Create or replace a label set, and learn from its examples, which are not kept."""
    await state.classifier.save_label_set(name, body.labels, body.templates, body.off_topic, caller)
    return await _described(name, state)


@router.get("/label-sets/{name}")
async def get_label_set(name: Name, state: StateDep) -> LabelSetResponse:
    """Return a label set: its labels, its templates, and how well it tells what is none of them."""
    return await _described(name, state)


@router.delete("/label-sets/{name}", status_code=204)
async def delete_label_set(name: Name, state: StateDep) -> None:
    """Delete a label set."""
    await state.store.delete_label_set(name)


async def _described(name: str, state: State) -> LabelSetResponse:
    label_set = await state.store.label_set(name)
    labels = [label if isinstance(label, str) else StoredLabel(**label) for label in label_set.definition["labels"]]
    detectors = label_set.definition.get("detectors", {})
    return LabelSetResponse(
        name=name,
        space=label_set.space,
        labels=labels,
        templates=label_set.definition["templates"],
        abstention={modality: LearnedDetector(auroc=detector["auroc"]) for modality, detector in detectors.items()},
        created=label_set.created,
        updated=label_set.updated,
    )
