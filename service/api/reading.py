"""Every route reads its body here: an HTTP request becomes a validated model, whose inputs are the engine's.

Body = Annotated[EmbedRequest, Depends(reader(EmbedRequest, append_inputs))]

@router.post("/embed", openapi_extra=documented(EmbedRequest, EXAMPLE, files=True))
async def embed(body: Body, state: StateDep, caller: CallerDep) -> Response:
    results = await state.embedder.embed(body.inputs, caller)
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.errors import MalformedRequest, UnsupportedBody
from service.runtime.timings import timed
from service.runtime.workers import Workers
from service.schemas.inputs import File, append_files, parse_json
from service.settings import Settings

Model = TypeVar("Model", bound=BaseModel)
Place = Callable[[dict[str, Any], list[File]], None]
"""Puts a form's files where they belong in the body, before the body is validated."""

A_PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGOQkztxQk6O8YScHAMDAwAbJwMOzKw0UAAAAABJRU5ErkJggg=="
)
"""A PNG of four pixels in base64, for examples of bodies."""

_COPIED_BYTES = 2**20
"""Largest file of a form that the event loop copies itself, in 0.2 ms."""
_SMALL = 32_768
"""Bytes of a body that the event loop may well read itself: under 0.1 ms."""


def append_inputs(body: dict[str, Any], files: list[File]) -> None:
    """Give files, in order, to the inputs and the parts of fused ones that have no input; append the others as further
    inputs."""
    if files:
        body["inputs"] = append_files(body.get("inputs", []), files)


async def known_parameters(request: Request) -> None:
    """Refuse query parameters that the route does not take: one that is misspelled, or belongs into the body, would
    silently be left out, and something else be searched or deleted. Raises RequestValidationError."""
    parameters = {parameter.alias for parameter in request.scope["route"].dependant.query_params}
    if unknown := sorted(set(request.query_params) - parameters):
        takes = f"this route takes {', '.join(sorted(parameters))}" if parameters else "this route takes none"
        problem = {"type": "extra_forbidden", "loc": ("query", unknown[0]), "msg": f"unknown query parameter: {takes}"}
        raise RequestValidationError([problem])


def reader(model: type[Model], place: Place | None = None) -> Callable[[Request], Awaitable[Model]]:
    """Return a FastAPI dependency that reads a JSON body, or, where `place` says what files are, a multipart form.

    A form has parts `file`, repeated, and at most one part `request` that holds the JSON body. What is large is read in
    a thread. Raises MalformedRequest (400), UnsupportedBody (415), RequestValidationError (422).
    """

    async def read(request: Request) -> Model:
        settings: Settings = request.state.services.settings
        readers: Workers = request.state.services.readers
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        arrange = place if media_type == "multipart/form-data" else None
        with timed("read"):
            files: list[File] = []
            if arrange is not None:
                data, files = await _read_form(request, settings)
            elif media_type in ("", "application/json") or media_type.endswith("+json"):
                # Not request.body(), which would keep it for as long as the request is there.
                data = b"".join([part async for part in request.stream()])
            else:
                kinds = "application/json or multipart/form-data" if place else "application/json"
                raise UnsupportedBody(f"this route reads {kinds}")

            def validated() -> Model:
                body = parse_json(data)
                if arrange is not None:
                    if not isinstance(body, dict):
                        raise MalformedRequest("the part called request is not a JSON object")
                    body = {name: content for name, content in body.items() if content is not None}
                    arrange(body, files)
                try:
                    return model.model_validate(body, context=settings.limits)
                except ValidationError as error:
                    found_errors = error.errors(include_url=False, include_context=False, include_input=False)
                    problems = [problem | {"loc": ("body", *problem["loc"])} for problem in found_errors]
                del body  # in this thread: of millions of values that takes long
                raise RequestValidationError(problems)

            small = len(data) + sum(len(file.data) for file in files) <= _SMALL
            return validated() if small else await readers.run(validated)

    return read


def documented(
    model: type[BaseModel], example: Mapping[str, Any], *, files: bool = False, required: bool = True
) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that uses `reader`, with a body that can be sent as it is.

    The app moves x-definitions to the components.
    """
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {}) | {model.__name__: schema}
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    content: dict[str, Any] = {"application/json": {"schema": reference, "example": example}}
    if files:
        content["multipart/form-data"] = {
            "schema": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "file": {
                        "type": "array",
                        "items": {"type": "string", "contentMediaType": "application/octet-stream"},
                        "description": "Images, sounds and videos, told apart by their content.",
                    },
                    "request": {**reference, "description": "The JSON body, without the inputs that are files."},
                },
            },
            "encoding": {"request": {"contentType": "application/json"}},
        }
    return {"requestBody": {"required": required, "content": content}, "x-definitions": definitions}


class _Form(MultiPartParser):
    """Notes whether the form was complete: an incomplete one would silently lose its last file."""

    whole = False
    spool_max_size = 0  # without end
    """Files stay in memory, of which `BodyLimit` has room for them: a disk for temporary files may be full, slow or
    read-only, and is no place for what clients send."""

    def on_end(self) -> None:
        self.whole = True


async def _read_form(request: Request, settings: Settings) -> tuple[bytes, list[File]]:
    """Return the part called request, or an empty object, and the files. Raises MalformedRequest."""
    files: list[File] = []
    body = b"{}"
    for name, part in await form_parts(request, settings, files=settings.limits.inputs, fields=1):
        if name == "request":
            body = part if isinstance(part, bytes) else part.data
        elif name == "file" and isinstance(part, File):
            files.append(part)
        else:
            raise MalformedRequest("a form has parts called file (with a file name) and request, and no others")
    return body, files


async def form_parts(
    request: Request, settings: Settings, *, files: int, fields: int
) -> list[tuple[str, File | bytes]]:
    """Return the parts of a multipart form by name: those with a file name as files. Raises MalformedRequest."""
    size = settings.limits.body_bytes
    reading = _Form(request.headers, request.stream(), max_files=files, max_fields=fields, max_part_size=size)
    try:
        form = await reading.parse()
    except MultiPartException:
        raise MalformedRequest("the form cannot be read, or has too many parts") from None
    try:
        if not reading.whole:
            raise MalformedRequest("the form breaks off")
        return [
            (name, await _file(part) if isinstance(part, UploadFile) else part.encode())
            for name, part in form.multi_items()
        ]
    finally:
        await form.close()


async def _file(part: UploadFile) -> File:
    """Return a part as a file, and let go of what the form holds of it."""
    large = (part.size or 0) > _COPIED_BYTES
    data = await asyncio.to_thread(part.file.read) if large else part.file.read()
    await part.close()
    return File(part.filename or "", data)
