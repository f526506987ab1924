"""`weaviate`: the inference server of Weaviate's modules multi2vec-clip and multi2vec-bind."""

from itertools import chain, islice
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field, ValidationInfo, model_validator

from service.api.protocols.protocol import Protocol, plain_error
from service.api.protocols.vectors import Warnings, warning_field, warnings_of
from service.api.reading import documented, reader
from service.api.responses import JSON
from service.api.routes.health import healthz, readyz
from service.api.state import CallerDep, StateDep
from service.engine.inputs import Embedded, Input, raise_first
from service.errors import NotReady
from service.schemas.inputs import RequestModel, at_most, limits_of, read_as

router = APIRouter(tags=["weaviate"])
Texts = Annotated[list[Annotated[Input, read_as("text")]], at_most(lambda limits: limits.inputs, "texts")]
Images = Annotated[list[Annotated[Input, read_as("image")]], at_most(lambda limits: limits.inputs, "images")]
Sounds = Annotated[list[Annotated[Input, read_as("audio")]], at_most(lambda limits: limits.inputs, "audio")]
Videos = Annotated[list[Annotated[Input, read_as("video")]], at_most(lambda limits: limits.inputs, "video")]
_Kind = Literal["texts", "images", "audio", "video"]
_KINDS: dict[_Kind, str] = {
    "texts": "textVectors",
    "images": "imageVectors",
    "audio": "audioVectors",
    "video": "videoVectors",
}


class WeaviateRequest(RequestModel):
    """A request has at least one list that is not empty. imu, thermal and depth, which no tower reads, must be."""

    texts: Texts = Field(default=[])
    images: Images = Field(default=[], description="base64, as are the other media.")
    audio: Sounds = Field(default=[])
    video: Videos = Field(default=[])
    imu: Annotated[list[str], Field(max_length=0)] = Field(default=[])
    thermal: Annotated[list[str], Field(max_length=0)] = Field(default=[])
    depth: Annotated[list[str], Field(max_length=0)] = Field(default=[])

    @model_validator(mode="after")
    def _some_and_few(self, info: ValidationInfo) -> Self:
        count, most = sum(map(len, self.lists.values())), limits_of(info).inputs
        if not count:
            raise ValueError(f"give at least one of: {', '.join(_KINDS)}")
        if count > most:
            raise ValueError(f"at most {most} inputs in one request, in all of: {', '.join(_KINDS)}")
        return self

    @property
    def lists(self) -> dict[_Kind, list[Input]]:
        return {kind: getattr(self, kind) for kind in _KINDS}


class WeaviateResponse(BaseModel):
    textVectors: list[list[float]]
    imageVectors: list[list[float]]
    audioVectors: list[list[float]] | None = Field(default=None, description="Where there was audio.")
    videoVectors: list[list[float]] | None = Field(default=None, description="Where there was video.")
    warnings: Warnings = None


Body = Annotated[WeaviateRequest, Depends(reader(WeaviateRequest))]
_EXAMPLE = {"texts": ["a dog on a beach"], "images": []}


@router.post("/vectorize", response_model=WeaviateResponse, openapi_extra=documented(WeaviateRequest, _EXAMPLE))
async def vectorize_for_weaviate(body: Body, state: StateDep, caller: CallerDep) -> JSON:
    """Embed each list with the default model."""
    answer: dict[str, Any] = {"textVectors": [], "imageVectors": []}
    warnings: list[str] = []
    # One call: a key's limits have room for all of the request, or none of it counts.
    results = iter(await state.default.embedder.embed(list(chain(*body.lists.values())), caller))
    for kind, inputs in body.lists.items():
        if inputs:
            list_results = list(islice(results, len(inputs)))
            raise_first(list_results, field=kind)
            embedded = [result for result in list_results if isinstance(result, Embedded)]
            answer[_KINDS[kind]] = [result.vector for result in embedded]
            warnings += warnings_of(kind, embedded)
    return JSON(answer | warning_field(warnings))


@router.get("/meta")
async def describe_for_weaviate(state: StateDep) -> dict[str, Any]:
    """Return the default model; Weaviate shows it in its own /v1/meta."""
    manifest = state.default.manifest
    fields: dict[str, Any] = {"name": manifest.name, "created": manifest.created, "space": manifest.space}
    return fields | {"dimensions": manifest.dimensions, "towers": list(manifest.towers)}


@router.get("/.well-known/live", status_code=204, response_class=Response)
async def is_live_for_weaviate(state: StateDep) -> None:
    """Answer 204 where /healthz says that the process is alive, else 503."""
    await healthz(state)


@router.get("/.well-known/ready", status_code=204, response_class=Response)
async def is_ready_for_weaviate(state: StateDep) -> None:
    """Answer 204 where /readyz says that requests may come, else 503."""
    if (await readyz(state)).status_code != 200:
        raise NotReady("not ready: GET /readyz names what is missing")


_UNDER = ("/vectorize", "/meta", "/.well-known")
PROTOCOL = Protocol("weaviate", router, _UNDER, frozenset({"/vectorize"}), *plain_error("Weaviate", "error"))
