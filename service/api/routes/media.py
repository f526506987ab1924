"""GET /previews/{id} and GET /media/{id}."""

import hashlib
import re
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from starlette.responses import StreamingResponse

from service.api.middleware import HEAD
from service.api.problems import problem
from service.api.state import State, StateDep
from service.engine.originals import OTHER, Original, open_original
from service.errors import NotFound
from service.schemas.items import ItemId, Name
from service.store import DEFAULT_COLLECTION, Item

router = APIRouter(tags=["items"])

_FRESH = {"Cache-Control": "private, no-cache"}  # the item may be replaced: its ETag tells
_CHUNK_BYTES = 256 * 1024
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_NO_ROOT = (
    "this server gives out no original files: start it with --media FOLDER (ISTHMUS_MEDIA), and the files below that "
    "folder can be read"
)


@router.get(
    "/previews/{id:path}",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {}, "image/webp": {}, "audio/mpeg": {}}},
        304: {"description": "It is as it was"},
    },
)
async def get_preview(
    id: ItemId,
    request: Request,
    state: StateDep,
    collection: Name = DEFAULT_COLLECTION,
    replacements: Annotated[
        int | None, Query(description="Any number: a page that stored another picture asks for it by a new address.")
    ] = None,
) -> Response:
    """Return the stored preview of an image (JPEG) or a sound (MP3) where the setting `previews` is on, else 404."""
    preview = await state.store.preview(collection, id)
    headers = _FRESH | {"ETag": f'"{hashlib.sha256(preview.data).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(preview.data, media_type=preview.media_type, headers=headers)


@router.get(
    "/media/{id:path}",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"description": "A part of the file: Range asked for it"},
        304: {"description": "It is as it was"},
        416: {"description": "The file has no such part"},
    },
)
async def get_media(id: ItemId, request: Request, state: StateDep, collection: Name = DEFAULT_COLLECTION) -> Response:
    """Return the file that an item was made from, where it lies below a folder that the setting `media` names, else
    404. Takes Range for one part. What is no picture, sound or video comes as a file to be saved."""
    if not state.settings.media:
        raise NotFound(_NO_ROOT)
    original = await find_original(await state.store.get(collection, id), state)
    if original is None:
        raise NotFound(
            f"no file of the item {id!r} lies below the folders of --media, or it was changed since it was indexed: "
            "run `isthmus index` again"
        )
    return _answer(original, id, request, state)


async def find_original(item: Item, state: State) -> Original | None:
    """Open the file of an item, or return None where the server gives out no such file."""
    if not state.settings.media:
        return None
    return await state.media_readers.run(partial(open_original, state.settings.media, item.id, item.metadata))


async def read_original(item: Item, state: State) -> bytes | None:
    """Return the whole file of a picture or a sound, or None where there is none or it is larger than any input."""
    original = await find_original(item, state)
    if original is None or original.size > state.settings.max_body_bytes:
        return None
    return await state.media_readers.run(partial(original.read, 0, original.size))


def _answer(original: Original, id: str, request: Request, state: State) -> Response:
    headers = _FRESH | {"ETag": f'"{original.tag}"', "Accept-Ranges": "bytes"}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if original.media_type == OTHER:
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(id.rpartition('/')[2], safe='')}"
    start, end, status = 0, original.size, 200
    if (part := _RANGE.fullmatch(request.headers.get("range", ""))) and request.headers.get(
        "if-range", headers["ETag"]
    ) == headers["ETag"]:
        bounds = _bounds(part[1], part[2], original.size)
        if bounds is None:
            extent = {"Content-Range": f"bytes */{original.size}"}
            return problem(request.url.path, 416, "range_not_satisfiable", "the file has no such part", headers=extent)
        (start, end), status = bounds, 206
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{original.size}"
    headers["Content-Length"] = str(end - start)
    if request.scope.get(HEAD):
        return Response(status_code=status, headers=headers, media_type=original.media_type)
    return StreamingResponse(_read(original, start, end, state), status, headers, original.media_type)


def _bounds(first: str, last: str, size: int) -> tuple[int, int] | None:
    """Return the start and the end of the part that a Range names; None where the file has no byte of it."""
    if first:
        start, end = int(first), min(int(last) + 1, size) if last else size
    else:  # so many of the last bytes
        start, end = max(0, size - int(last or 0)), size
    return (start, end) if start < end else None


async def _read(original: Original, start: int, end: int, state: State) -> AsyncIterator[bytes]:
    while start < end:
        data = await state.media_readers.run(partial(original.read, start, min(_CHUNK_BYTES, end - start)))
        if not data:  # it is shorter by now: the connection is closed, which says that the answer is not whole
            return
        yield data
        start += len(data)
