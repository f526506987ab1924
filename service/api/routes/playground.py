"""GET / and GET /docs: the playground and the reference of the API, pages for people; their files are in /playground.

Neither needs a key: they hold no data, and ask for it themselves. `middleware.SecurityHeaders` keeps the page to them.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

router = APIRouter(tags=["service"])

FOLDER = Path(__file__).parents[2] / "playground"

_FRESH = {"Cache-Control": "no-cache"}  # asked for again, and answered 304 until the service is another


@router.get("/", response_class=FileResponse, responses={200: {"content": {"text/html": {}}}})
async def playground() -> FileResponse:
    """Return the playground: a page that searches, classifies, shows and fills collections in a browser."""
    return FileResponse(FOLDER / "index.html", media_type="text/html", headers=_FRESH)


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    """Return the reference of the API, from which each operation can be tried in a browser."""
    return FileResponse(FOLDER / "docs.html", media_type="text/html", headers=_FRESH)


class Files(StaticFiles):
    """Serves scripts, styles and icons of the playground."""

    def __init__(self) -> None:
        super().__init__(directory=FOLDER)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_FRESH)
        return response
