"""Labels, label sets, and scores."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, model_validator

from service.schemas.inputs import Inputs, ModelName, RequestModel
from service.schemas.items import Name, storable_text
from service.schemas.search import TopK

MAX_LABELS = 10_000
MAX_SCORES = 25_600
"""Inputs × top_k of one request: a response is written in one go, and must not hold the event loop."""

Words = Annotated[str, Field(min_length=1, max_length=1_000), AfterValidator(storable_text)]


class Label(RequestModel):
    name: Words
    prompts: Annotated[list[Words], Field(min_length=1, max_length=100)] = Field(
        description="Whole sentences that stand for the label, in place of the templates."
    )


def _one_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("a template must hold {} once")
    return template


def _each_once(labels: list[str | Label]) -> list[str | Label]:
    seen: set[str] = set()
    for label in labels:
        name = label if isinstance(label, str) else label.name
        if name in seen:
            raise ValueError(f"the label {name!r} is there twice")
        seen.add(name)
    return labels


Labels = Annotated[list[Words | Label], Field(min_length=1, max_length=MAX_LABELS), AfterValidator(_each_once)]
Templates = Annotated[list[Annotated[Words, AfterValidator(_one_place)]], Field(min_length=1, max_length=100)]


class LabelSetRequest(RequestModel):
    labels: Labels
    templates: Templates | None = Field(default=None, description="Without them, the bundle's for each modality.")


class ClassifyRequest(RequestModel):
    """Exactly one of labels and label_set."""

    inputs: Inputs
    model: ModelName = None
    labels: Labels | None = None
    label_set: Name | None = None
    templates: Templates | None = Field(
        default=None, description="Without them the label set's, or the bundle's for each input's modality."
    )
    top_k: TopK = 5
    threshold: float | None = Field(default=None, ge=0, le=1, description="Abstain where the best score is below it.")

    @model_validator(mode="after")
    def _bounded(self) -> "ClassifyRequest":
        if (self.labels is None) == (self.label_set is None):
            raise ValueError("give exactly one of: labels, label_set")
        if len(self.inputs) * self.top_k > MAX_SCORES:
            raise ValueError(f"inputs × top_k is at most {MAX_SCORES}")
        return self


class ScoredLabel(BaseModel):
    label: str
    score: float = Field(description="Softmax at the bundle's temperature over all the labels; they sum to 1.")
    similarity: float = Field(description="Cosine similarity of the input and the label.")


class Classified(BaseModel):
    labels: list[ScoredLabel] = Field(description="Best first, top_k of them.")
    abstained: bool


class ClassifyResponse(BaseModel):
    results: list[Classified]


class LabelSetResponse(BaseModel):
    name: str
    space: str
    labels: list[str | Label]
    templates: list[str] | None
    created: str
    updated: str
