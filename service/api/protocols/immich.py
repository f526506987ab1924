"""`immich`: POST /predict and GET /ping of Immich's machine learning server. CLIP is answered here, and all else
(faces, text in pictures) by the upstream that the operator names."""

from typing import Any

import httpx2
import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import PlainTextResponse, Response

from service.api.protocols.protocol import Protocol, plain_error
from service.api.protocols.vectors import vectors_of, warning_field, warnings_of
from service.api.reading import form_parts
from service.api.responses import JSON
from service.api.routes.health import healthz
from service.api.state import CallerDep, State, StateDep
from service.contract.images import header_size
from service.engine.caller import Caller
from service.engine.fetch import Headers, Url
from service.engine.inputs import Media, Text, costs_of, read
from service.errors import FetchFailed, InvalidRequest, MalformedRequest, NotReady, UnsupportedBody
from service.schemas.inputs import File, RequestModel, first_problem, parse_json

router = APIRouter(tags=["immich"])
_MOST_BYTES = 16_000_000
"""Largest answer of an upstream."""
_TASKS = frozenset({"clip", "facial-recognition", "ocr"})


class ImmichOptions(RequestModel):
    language: str | None = Field(default=None, description="Not read: the text says it.")


class ImmichEntry(RequestModel):
    modelName: str
    options: ImmichOptions = ImmichOptions()


class ImmichVisual(RequestModel):
    visual: ImmichEntry


class ImmichTextual(RequestModel):
    textual: ImmichEntry


class ImmichClip(RequestModel):
    """The form's part `entries`, of a request for a vector."""

    clip: ImmichVisual | ImmichTextual


class ImmichPrediction(BaseModel):
    clip: str = Field(description="A JSON list of numbers.")
    imageHeight: int | None = None
    imageWidth: int | None = None


_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["entries"],
                    "properties": {
                        "entries": {"type": "string", "description": "JSON: tasks, their models and options."},
                        "image": {"type": "string", "contentMediaType": "application/octet-stream"},
                        "text": {"type": "string"},
                    },
                },
                "example": {"entries": '{"clip": {"textual": {"modelName": "starter"}}}', "text": "a dog on a beach"},
            }
        },
    }
}


@router.get("/ping", response_class=PlainTextResponse)
async def ping_for_immich(state: StateDep) -> str:
    """Answer pong where /healthz says that the process is alive, else 503."""
    await healthz(state)
    return "pong"


@router.post("/predict", response_model=ImmichPrediction, openapi_extra=_FORM)
async def predict_for_immich(request: Request, state: StateDep, caller: CallerDep) -> Response:
    """Embed a picture or a text for Immich's search, or ask the upstream for what is no vector."""
    entries, content = await _read(request, state)
    tasks = parse_json(entries)
    if not isinstance(tasks, dict) or not tasks or not tasks.keys() <= _TASKS:
        raise InvalidRequest(f"entries: a JSON object whose keys are among {', '.join(sorted(_TASKS))}")
    if "clip" not in tasks:
        return await _ask_upstream(entries, content, state, caller)
    try:
        clip = ImmichClip.model_validate(tasks).clip
    except ValidationError as error:
        raise InvalidRequest(f"entries: {first_problem(error)}") from None
    entry, kind = (clip.visual, Media) if isinstance(clip, ImmichVisual) else (clip.textual, Text)
    if not isinstance(content, kind):
        raise InvalidRequest(f"entries: {'visual goes with image' if kind is Media else 'textual goes with text'}")
    model = state.model(entry.modelName)
    field = "image" if isinstance(content, Media) else "text"
    [result] = await vectors_of(model, [content], caller, field=field)
    answer: dict[str, Any] = {"clip": orjson.dumps(result.vector, option=orjson.OPT_SERIALIZE_NUMPY).decode()}
    if isinstance(content, Media):
        limits = state.settings.limits.of_images
        width, height = await model.embedder.in_worker(lambda: header_size(content.data, limits))
        answer |= {"imageHeight": height, "imageWidth": width}
    return JSON(answer | warning_field(warnings_of(field, [result])))


async def _read(request: Request, state: State) -> tuple[bytes, Media | Text]:
    """Return the form's entries, and its image or its text."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise UnsupportedBody("this route reads multipart/form-data")
    parts = await form_parts(request, state.settings, files=2, fields=2)
    form = {name: part.data if isinstance(part, File) else part for name, part in parts}
    if len(form) != len(parts) or not form.keys() <= {"entries", "image", "text"}:
        raise MalformedRequest("a form has the parts entries, and image or text, once each")
    if "entries" not in form or len(form) != 2:
        raise InvalidRequest("give entries, and exactly one of: image, text")
    if "image" in form:
        return form["entries"], Media("image", form["image"])
    text = read("text", form["text"].decode("utf-8", "replace"))
    if not isinstance(text, Text):
        raise InvalidRequest("text: it is a data: URI; a picture is sent as image")
    return form["entries"], text


async def _ask_upstream(entries: bytes, content: Media | Text, state: State, caller: Caller) -> Response:
    """Return the upstream's answer to the same form."""
    settings = state.settings
    if state.upstream is None or settings.immich_upstream is None:
        raise InvalidRequest("entries: only clip is answered here: ISTHMUS_IMMICH_UPSTREAM names a server for the rest")
    if caller.meter is not None:
        await caller.meter.take(await state.embedder.in_worker(lambda: costs_of([content], settings.limits)))
    files: dict[str, Any] = {"entries": (None, entries)}
    if isinstance(content, Media):
        files["image"] = ("image", content.data, "application/octet-stream")
    else:
        files["text"] = (None, content.text.encode())
    url = Url.parse(f"{settings.immich_upstream.rstrip('/')}/predict")
    form = httpx2.Request("POST", str(url), files=files)
    headers: Headers = {"Content-Type": form.headers["content-type"]}
    if settings.immich_upstream_key is not None:
        headers["Authorization"] = f"Bearer {settings.immich_upstream_key.get_secret_value()}"
    try:
        status, answer, _ = await state.upstream.post(url, headers, form.read(), _MOST_BYTES)
    except FetchFailed as failed:
        raise NotReady(str(failed)) from None
    if status >= 500 or status in (401, 403, 404):
        raise NotReady(f"the upstream cannot answer: its status is {status}")
    if status != 200:
        raise InvalidRequest(f"the upstream refuses this request: its status is {status}")
    return Response(answer, media_type="application/json")


PROTOCOL = Protocol("immich", router, ("/predict", "/ping"), frozenset({"/predict"}), *plain_error("Immich", "detail"))
