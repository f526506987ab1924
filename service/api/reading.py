"""An HTTP request → a validated model → embedded inputs. Every route that takes inputs reads them here.

Body = Annotated[EmbedRequest, Depends(reader(EmbedRequest, append_inputs))]

@router.post("/embed", openapi_extra=documented(EmbedRequest, files=True))
async def embed(body: Body, state: StateDep) -> Response:
    results = await embed_inputs(state.embedder, body.inputs)
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from service.contract.errors import InputError
from service.contract.tokens import Role
from service.engine import videos
from service.engine.embedder import Embedded, Embedder, Input, Media, TokenIds
from service.engine.fetch import Fetcher, Fetches, fetching
from service.engine.videos import Video
from service.errors import BodyTooLarge, InputFailed, MalformedRequest, UnsupportedBody
from service.runtime.timings import timed
from service.schemas import exact_json
from service.schemas.inputs import AnyInput, File, is_opened, size_of, to_input, url_of
from service.settings import Settings

Model = TypeVar("Model", bound=BaseModel)
Place = Callable[[dict[str, Any], list[File]], None]
"""Puts a form's files where they belong in the body, before the body is validated."""

UNKNOWN = (
    "the model's tokenizer knows no word of the text, so that its vector would be that of every such text: use a "
    "bundle whose text encoder knows this language"
)
_SMALL = 32_768  # bytes that the event loop may well decode itself: under 0.1 ms
_MOST_MEMORY = 200_000_000
"""Bytes that a body may become when it is read: 19 MB of `{},{},…` would become 461 MB."""
_MEMORY = {b"{": 240, b"[": 64, b",": 32, b":": 60, b'"': 50}
"""That each of these stands for: an object of a key, a list, a number, a place in an object, half a text."""


def append_inputs(body: dict[str, Any], files: list[File]) -> None:
    """Files are further inputs, in order."""
    if files:
        given = body.get("inputs", [])
        body["inputs"] = [*given, *files] if isinstance(given, list) else given


async def read_request(request: Request, model: type[Model], place: Place | None = None) -> Model:
    """Read a JSON body, or, where `place` says what files are, a multipart form.

    A form has parts `file`, repeated, and at most one part `request` that holds the JSON body.
    Raises MalformedRequest (400), UnsupportedBody (415), RequestValidationError (422).
    """
    settings: Settings = request.state.services.settings
    fetcher: Fetcher | None = request.state.services.fetcher
    fetching.set(None if fetcher is None else Fetches(fetcher))
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    with timed("read"):
        if media_type == "multipart/form-data" and place is not None:
            body = await _read_form(request, place, settings)
        elif media_type in ("", "application/json") or media_type.endswith("+json"):
            data = await request.body()
            if len(data) > _SMALL:
                await asyncio.sleep(0)  # a client that has gone since is noticed, and costs no reading
            body = parse_json(data)
        else:
            kinds = "application/json or multipart/form-data" if place else "application/json"
            raise UnsupportedBody(f"this route reads {kinds}")
        try:
            return model.model_validate(body, context=settings.limits)
        except ValidationError as error:
            problems = [each | {"loc": ("body", *each["loc"])} for each in error.errors(include_url=False)]
            raise RequestValidationError(problems) from None


def reader(model: type[Model], place: Place | None = None) -> Callable[[Request], Awaitable[Model]]:
    """`read_request` as a FastAPI dependency."""

    async def read(request: Request) -> Model:
        return await read_request(request, model, place)

    return read


def documented(model: type[BaseModel], *, files: bool = False) -> dict[str, Any]:
    """The `openapi_extra` of a route that uses `reader`. The app moves x-definitions to the components."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {}) | {model.__name__: schema}
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    content: dict[str, Any] = {"application/json": {"schema": reference}}
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
    return {"requestBody": {"required": True, "content": content}, "x-definitions": definitions}


async def to_inputs(values: Sequence[AnyInput | TokenIds], role: Role = "query") -> list[Input | Video | InputError]:
    """Schema inputs → pipeline inputs, in order; large base64 is decoded in a thread; URLs are fetched, if that is on.

    Raises RateLimited, DeadlineExceeded.
    """
    fetched = await _fetched(values)

    def convert() -> list[Input | Video | InputError]:
        return [fetched[at] if at in fetched else _to_input(value, role) for at, value in enumerate(values)]

    waiting = [value for at, value in enumerate(values) if at not in fetched]
    if sum(map(size_of, waiting)) <= _SMALL and not any(map(is_opened, waiting)):
        return convert()
    return await asyncio.to_thread(convert)


async def _fetched(values: Sequence[AnyInput | TokenIds]) -> dict[int, Input | InputError]:
    """What is at the URLs among the inputs, by their places; nothing where none is fetched."""
    fetches = fetching.get()
    wanted = {at: url for at, value in enumerate(values) if (url := url_of(value))} if fetches else {}
    if fetches is None or not wanted:
        return {}
    found = await fetches.all(list(wanted.values()))
    return {
        at: each if isinstance(each, InputError) else Media(kind, each)
        for (at, (kind, _)), each in zip(wanted.items(), found, strict=True)
    }


async def embed_inputs(
    embedder: Embedder,
    values: Sequence[AnyInput | TokenIds],
    role: Role = "query",
    *,
    background: bool = False,
    stored: bool = False,
    admit_unknown: bool = False,
) -> list[Embedded | InputError]:
    """Schema inputs → vectors, in order; an input that cannot be read or embedded is an InputError in its place.

    So is a text of which the tokenizer knows nothing, unless `admit_unknown`: its vector is that of every such text.
    With `stored`, long sounds have their moments, as videos have.
    """
    inputs = await to_inputs(values, role)
    readable = [each for each in inputs if not isinstance(each, InputError)]
    made = await videos.embed(embedder, readable, background=background, stored=stored) if readable else []
    embedded = iter(made)
    results = [each if isinstance(each, InputError) else next(embedded) for each in inputs]
    return results if admit_unknown else [known(each) for each in results]


def known(result: Embedded | InputError) -> Embedded | InputError:
    """The result, or the error that it is where the tokenizer knows nothing of a text."""
    return InputError(UNKNOWN) if isinstance(result, Embedded) and result.unknown == 1 else result


def unknown_warning(where: str, result: Embedded | InputError) -> list[str]:
    """What to say of a text of which the tokenizer knows less than half; nothing of other inputs."""
    if not isinstance(result, Embedded) or result.unknown <= 0.5:
        return []
    if result.unknown == 1:
        return [f"{where}: {UNKNOWN}"]
    return [
        f"{where}: the model's tokenizer does not know {result.unknown:.0%} of the text, which says little about it"
    ]


def all_embedded(results: Sequence[Embedded | InputError], *, field: str | None = "inputs") -> list[Embedded]:
    """The results, if none is an error. Raises InputFailed for the first that is, with its index in `field`.

    With `field=None` there is one input and no list.
    """
    embedded = []
    for index, result in enumerate(results):
        if isinstance(result, InputError):
            raise InputFailed(index if field else None, result, field=field or "query")
        embedded.append(result)
    return embedded


def _to_input(value: AnyInput | TokenIds, role: Role) -> Input | Video | InputError:
    try:
        return to_input(value, role)
    except InputError as error:
        return error


def _memory_of(body: bytes) -> int:
    """About what the body becomes, at most; what is written inside of texts is first taken for JSON, too."""
    rough = sum(each * body.count(mark) for mark, each in _MEMORY.items())
    if rough <= _MOST_MEMORY:
        return rough
    letters = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = np.logical_xor.accumulate(letters == ord('"'))
    outside = letters[~inside].tobytes()
    # Of a text, its end is outside and its beginning is not.
    return sum(each * outside.count(mark) * (2 if mark == b'"' else 1) for mark, each in _MEMORY.items())


def parse_json(body: bytes) -> Any:
    """Raises BodyTooLarge where it would fill the memory, MalformedRequest."""
    if len(body) > _SMALL and _memory_of(body) > _MOST_MEMORY:
        raise BodyTooLarge("the body holds too many values")
    # orjson refuses NaN, Infinity, numbers that overflow, lone surrogates and bottomless nesting.
    try:
        return exact_json.loads(body)
    except orjson.JSONDecodeError:
        raise MalformedRequest("the body is not valid JSON") from None


class _Form(MultiPartParser):
    """Knows whether it was whole: of one that breaks off, the last file would be missing without a word."""

    whole = False

    def on_end(self) -> None:
        self.whole = True


async def _read_form(request: Request, place: Place, settings: Settings) -> Any:
    limits = settings.limits
    reading = _Form(
        request.headers, request.stream(), max_files=limits.inputs, max_fields=1, max_part_size=limits.body_bytes
    )
    try:
        form = await reading.parse()
    except MultiPartException:
        raise MalformedRequest("the form cannot be read, or has too many parts") from None
    try:
        if not reading.whole:
            raise MalformedRequest("the form breaks off")
        files: list[File] = []
        body: Any = {}
        for name, part in form.multi_items():
            if name == "request":
                body = parse_json(await part.read() if isinstance(part, UploadFile) else part.encode())
            elif name == "file" and isinstance(part, UploadFile):
                files.append(File(part.filename or "", await part.read()))
            else:
                raise MalformedRequest("a form has parts called file (with a file name) and request, and no others")
    finally:
        await form.close()
    if not isinstance(body, dict):
        raise MalformedRequest("the part called request is not a JSON object")
    body = {name: given for name, given in body.items() if given is not None}
    place(body, files)
    return body
