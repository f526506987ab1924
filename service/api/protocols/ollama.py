"""`ollama`: POST /api/embed and GET /api/tags, for Ollama's clients."""

import time
from collections.abc import Collection
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, BeforeValidator, Field, StrictBool, model_validator

from service.api.protocols.protocol import Protocol, plain_error
from service.api.protocols.vectors import Warnings, vectors_of, warning_field, warnings_of
from service.api.reading import documented, reader
from service.api.responses import JSON, encoded
from service.api.state import CallerDep, StateDep
from service.schemas.inputs import RequestModel, Strings

router = APIRouter(prefix="/api", tags=["ollama"])


def _nothing(value: Any) -> Any:
    return [] if value == "" else value


class OllamaEmbedRequest(RequestModel):
    model: str
    input: Annotated[Strings, BeforeValidator(_nothing)] = Field(
        default=[],
        description="A string that is a data: URI of an image, a sound or a video is that file. With no input, or an "
        "empty string alone, the answer has no embeddings, as Ollama's.",
    )
    truncate: StrictBool = Field(
        default=True, description="false: a text that is longer than the model reads is an error."
    )
    dimensions: Annotated[int, Field(ge=1, strict=True)] | None = None
    options: dict[str, Any] = Field(
        default={}, max_length=64, description="Of generation and of the machine: they change no vector. Not num_ctx."
    )
    keep_alive: float | str | None = Field(default=None, description="Not read: a model stays open.")

    @model_validator(mode="after")
    def _own_length(self) -> "OllamaEmbedRequest":
        if self.options.get("num_ctx") is not None:
            raise ValueError("options.num_ctx: the bundle says how much of a text is read")
        return self


class OllamaEmbedResponse(BaseModel):
    model: str
    embeddings: list[list[float]]
    total_duration: int = Field(description="Nanoseconds.")
    load_duration: int
    prompt_eval_count: int = Field(description="Tokens of the texts.")
    warnings: Warnings = None


class OllamaModel(BaseModel):
    name: str
    model: str
    modified_at: str
    digest: str = Field(description="The space's id.")
    details: dict[str, Any]


class OllamaModels(BaseModel):
    models: list[OllamaModel]


Body = Annotated[OllamaEmbedRequest, Depends(reader(OllamaEmbedRequest))]
_EXAMPLE = {"model": "starter", "input": ["a dog on a beach", "heavy rain"]}


@router.post("/embed", response_model=OllamaEmbedResponse, openapi_extra=documented(OllamaEmbedRequest, _EXAMPLE))
async def embed_like_ollama(body: Body, state: StateDep, caller: CallerDep) -> JSON:
    """Embed texts; a model's name may end in :latest."""
    start_ns = time.perf_counter_ns()
    model = state.model(_listed_name(body.model, {*state.models, *state.settings.aliases}))
    results = await vectors_of(model, body.input, caller, field="input", cut=body.truncate) if body.input else []
    return JSON(
        {
            "model": body.model,
            "embeddings": [encoded(result.vector, body.dimensions, "float") for result in results],
            "total_duration": time.perf_counter_ns() - start_ns,
            "load_duration": 0,
            "prompt_eval_count": sum(result.tokens for result in results),
        }
        | warning_field(warnings_of("input", results))
    )


@router.get("/tags")
async def list_ollama_models(state: StateDep) -> OllamaModels:
    """List the served bundles and their aliases in the shape of Ollama's clients."""
    models = []
    for name in (*state.models, *state.settings.aliases):
        manifest = state.model(name).manifest
        precisions = {channel.tower.precision for channel in state.model(name).embedder.channels.values()}
        details = {
            "format": "onnx",
            "family": "isthmus",
            "families": list(manifest.towers),
            "parameter_size": "",
            "quantization_level": ", ".join(sorted(precisions)),
        }
        created = manifest.created if "T" in manifest.created else f"{manifest.created}T00:00:00Z"
        models.append(OllamaModel(name=name, model=name, modified_at=created, digest=manifest.space, details=details))
    return OllamaModels(models=models)


def _listed_name(name: str, names: Collection[str]) -> str:
    """Return the listed name that a client means: to Ollama `a` and `a:latest` are one model."""
    plain = name.removesuffix(":latest")
    return next((candidate for candidate in (name, plain, f"{plain}:latest") if candidate in names), name)


PROTOCOL = Protocol("ollama", router, ("/api",), frozenset({"/api/embed"}), *plain_error("Ollama", "error"))
