"""Schemas of GET /models, GET /healthz and GET /readyz, and the problem that any route can return."""

from typing import Literal

from pydantic import BaseModel, Field

from service.contract.bundle import Encoder, Modality, Precision, Preprocessing
from service.contract.licences import Licence, Terms
from service.engine.providers import ServedPrecision


class TowerDescription(BaseModel):
    encoder: Encoder
    projector: str
    precision: ServedPrecision
    """The precision that is served."""
    precisions: list[Precision]
    """The precisions that the bundle has."""
    provider: str
    lanes: int
    """Calls of the tower that run at once."""
    tuned: bool
    """Whether a profile of `isthmus tune` chose runtime, precision, threads and batch."""
    preprocessing: Preprocessing


class ModelDescription(BaseModel):
    name: str
    created: str
    space: str
    dimensions: int
    matryoshka: list[int]
    temperature: float
    bias: float | None
    """The bias of a sigmoid's space: sigmoid(similarity / temperature + bias) is a label's own probability."""
    towers: dict[Modality, TowerDescription]
    evaluation: dict[str, float | int | bool | str | list[float]]
    licences: list[Licence]
    """Licences of every part of the weights: the data sets that they learned from, and the encoders."""
    terms: list[Terms]
    """Terms of access to data, which are no licences of the weights."""
    commercial: bool | None
    """Whether the licences of all parts allow commercial use; null: of some it is not known, which counts as no."""


class ModelsResponse(BaseModel):
    models: list[ModelDescription]
    previews: bool = Field(description="Whether previews of what is stored from now on are kept.")


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    status: Literal["ready", "degraded", "not_ready"]
    """degraded: what failed can be done without for a while, and requests should still come here."""
    checks: dict[str, bool]
    failing: list[str]
    """The names of the checks that failed."""
    providers: dict[str, str]
    """The ONNX Runtime provider that each tower obtained, by the name of its check."""


class FieldError(BaseModel):
    loc: list[str | int]
    msg: str


class Problem(BaseModel):
    """RFC 9457. `code` is stable; `index` is the input's, in a batch."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    index: int | None = None
    errors: list[FieldError] | None = None
