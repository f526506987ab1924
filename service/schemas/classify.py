"""Labels, label sets, and scores."""

from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from service.contract.bundle import Modality
from service.engine.inputs import parts_of, uri_kind
from service.schemas.embed import InputProblem, OnError
from service.schemas.inputs import AnyInput, Inputs, ModelName, Number, RequestModel, limits_of
from service.schemas.items import Name, storable_text
from service.schemas.search import TopK

MAX_LABELS = 10_000
MAX_EXAMPLES = 4_096
"""Largest number of examples of a label set."""
_MOST_MODALITIES = 16
MAX_SCORES = 25_600
"""Largest inputs × top_k of one request: a response is written at once, and must not hold the event loop."""


def _words(value: str) -> str:
    if uri_kind(value):
        raise ValueError("a data: URI is no label: a label is words, and its examples may be images and sounds")
    return storable_text(value)


Words = Annotated[str, Field(min_length=1, max_length=1_000), AfterValidator(_words)]


class Label(RequestModel):
    name: Words
    prompts: Annotated[list[Words], Field(min_length=1, max_length=100)] | None = Field(
        default=None, description="Whole sentences that stand for the label, in place of the templates."
    )


class TaughtLabel(Label):
    examples: Annotated[list[AnyInput], Field(max_length=100)] = Field(
        default=[], description="A handful of inputs that show the label; they move it for inputs of their modality."
    )


def _one_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError("a template must hold {} once")
    return template


def _each_once(labels: Sequence[str | Label]) -> Sequence[str | Label]:
    names: set[str] = set()
    for label in labels:
        name = label if isinstance(label, str) else label.name
        if name in names:
            raise ValueError(f"the label {name!r} is there twice")
        names.add(name)
    return labels


Labels = Annotated[
    list[Words | Label], Field(min_length=1, max_length=MAX_LABELS, fail_fast=True), AfterValidator(_each_once)
]
TaughtLabels = Annotated[
    list[Words | TaughtLabel], Field(min_length=1, max_length=MAX_LABELS, fail_fast=True), AfterValidator(_each_once)
]
SameTemplates = Annotated[list[Annotated[Words, AfterValidator(_one_place)]], Field(min_length=1, max_length=100)]


def _few(templates: Any) -> Any:
    if isinstance(templates, dict) and len(templates) > _MOST_MODALITIES:
        raise ValueError(f"templates are for {_MOST_MODALITIES} modalities at most")
    return templates


Templates = SameTemplates | Annotated[dict[Modality, SameTemplates], BeforeValidator(_few)]
"""Templates for inputs of every modality, or by modality."""


class LabelSetRequest(RequestModel):
    labels: TaughtLabels
    templates: Templates | None = Field(default=None, description="Without them, the bundle's for each modality.")
    off_topic: Annotated[list[AnyInput], Field(max_length=MAX_EXAMPLES)] = Field(
        default=[],
        description="Inputs that are of none of the labels. With them and the examples (two of each, at least, of a "
        "modality) the set learns to say `none of these`; without, the bundle's own detector is asked.",
    )

    @model_validator(mode="after")
    def _bounded(self) -> "LabelSetRequest":
        shown = chain(self.off_topic, *(label.examples for label in self.taught))
        if sum(len(parts_of(given)) for given in shown) > MAX_EXAMPLES:
            raise ValueError(f"examples and off-topic inputs, parts too, are at most {MAX_EXAMPLES} in one label set")
        if self.off_topic and not any(label.examples for label in self.taught):
            raise ValueError("off_topic needs examples of labels to be told from")
        return self

    @property
    def taught(self) -> list[TaughtLabel]:
        return [label for label in self.labels if isinstance(label, TaughtLabel)]


class Grid(RequestModel):
    rows: int = Field(ge=1, le=16, strict=True)
    columns: int = Field(ge=1, le=16, strict=True)


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
    threshold: Number | None = Field(default=None, ge=0, le=1, description="Abstain where the best score is below it.")
    abstain: StrictBool | Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=False,
        description="Abstain where a learned detector takes the input to be of none of the labels: where `on_topic` is "
        "below this, 0.5 for true. The detector is the label set's own, or the bundle's.",
    )
    grid: Grid | None = Field(default=None, description="Classify the cells of each image too.")
    on_error: OnError = "fail"

    @model_validator(mode="after")
    def _bounded(self, info: ValidationInfo) -> "ClassifyRequest":
        if (self.labels is None) == (self.label_set is None):
            raise ValueError("give exactly one of: labels, label_set")
        if len(self.inputs) * self.top_k > MAX_SCORES:
            raise ValueError(f"inputs × top_k is at most {MAX_SCORES}")
        if self.grid is not None:
            most = limits_of(info).inputs
            cells = self.grid.rows * self.grid.columns
            if len(self.inputs) * (cells + 1) > most:
                raise ValueError(f"inputs and their cells are at most {most} in one request")
            if len(self.inputs) * (cells + 1) * self.top_k > MAX_SCORES:
                raise ValueError(f"inputs × cells × top_k is at most {MAX_SCORES}")
        return self


class ScoredLabel(BaseModel):
    label: str
    score: float = Field(description="Softmax at the bundle's temperature over all the labels; they sum to 1.")
    similarity: float = Field(description="Cosine similarity of the input and the label.")
    probability: float | None = Field(
        default=None,
        description="Of the label by itself, whatever the others are. There where the bundle has a `bias`, as an "
        "imported SigLIP has, for inputs of the modality that it learned: not for texts, nor for a tower added since.",
    )


class Classified(BaseModel):
    labels: list[ScoredLabel] = Field(description="Best first, top_k of them.")
    abstained: bool
    on_topic: float | None = Field(
        default=None, description="With `abstain`: how likely the input is of one of the labels at all."
    )
    cells: list[list["Classified"]] | None = Field(default=None, description="With `grid`: row by row.")
    error: InputProblem | None = Field(default=None, description="With `on_error`: there are no labels then.")


class ClassifyResponse(BaseModel):
    results: list[Classified]
    warnings: list[str] | None = Field(
        default=None,
        description="Inputs and labels of which the model's tokenizer knows little; absent where there are none.",
    )


class StoredLabel(BaseModel):
    name: str
    prompts: list[str] | None = None
    examples: int | None = Field(default=None, description="How many it was taught by.")

    @model_serializer(mode="wrap")
    def _without_nulls(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in whole(self).items() if value is not None}


class LearnedDetector(BaseModel):
    auroc: float = Field(description="Of telling the examples from the off-topic inputs, each unseen; 0.5 is chance.")


class ListedLabelSet(BaseModel):
    name: str
    created: str
    updated: str


class LabelSetsResponse(BaseModel):
    label_sets: list[ListedLabelSet]


class LabelSetResponse(BaseModel):
    name: str
    space: str
    labels: list[str | StoredLabel]
    templates: list[str] | dict[str, list[str]] | None
    abstention: dict[str, LearnedDetector] = Field(description="By modality.")
    created: str
    updated: str
