"""GET /previews/{id}."""

import hashlib

from fastapi import APIRouter, Request, Response

from service.api.state import StateDep
from service.schemas.items import ItemId, Name
from service.store import DEFAULT_COLLECTION

router = APIRouter(tags=["items"])

_FRESH = {"Cache-Control": "private, no-cache"}  # the item may be replaced: its ETag tells


@router.get(
    "/previews/{id:path}",
    response_class=Response,
    responses={
        200: {"content": {"image/jpeg": {}, "image/webp": {}, "audio/mpeg": {}}},
        304: {"description": "It is as it was"},
    },
)
async def get_preview(id: ItemId, request: Request, state: StateDep, collection: Name = DEFAULT_COLLECTION) -> Response:
    """Return the stored preview of an image (JPEG) or a sound (MP3) where the setting `previews` is on, else 404."""
    preview = await state.store.preview(collection, id)
    headers = _FRESH | {"ETag": f'"{hashlib.sha256(preview.data).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(preview.data, media_type=preview.media_type, headers=headers)
