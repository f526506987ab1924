from collections.abc import Iterator
from typing import Annotated

import pytest
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.testclient import TestClient
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

from service.api.app import create_app
from service.api.direct import Direct
from service.errors import InvalidRequest
from service.settings import Settings

router = APIRouter()


async def _body(request: Request) -> bytes:
    body = await request.body()
    if not body:
        raise InvalidRequest("there is no body")
    return body


async def _page(number: int) -> int:
    return number


def _in_a_thread(request: Request) -> str:
    return request.method


@router.post("/length")
async def length(body: Annotated[bytes, Depends(_body)]) -> Response:
    return JSONResponse({"bytes": len(body)}, 202)


@router.get("/named/{name}")
async def named(name: str) -> JSONResponse:
    return JSONResponse({"name": name})


@router.get("/paged")
async def paged(number: Annotated[int, Depends(_page)]) -> JSONResponse:
    return JSONResponse({"number": number})


@router.get("/method")
async def method(name: Annotated[str, Depends(_in_a_thread)]) -> JSONResponse:
    return JSONResponse({"method": name})


@router.get("/model")
async def model() -> dict[str, int]:
    return {"one": 1}


@router.get("/plain")
async def plain() -> JSONResponse:
    return JSONResponse({"plain": True})


def _app(*, direct: bool) -> FastAPI:
    app = FastAPI()

    @app.exception_handler(InvalidRequest)
    async def refuse(request: Request, error: Exception) -> Response:
        return JSONResponse({"route": request.scope["route"].path, "error": str(error)}, 422)

    if direct:
        app.router.routes.insert(0, Direct([router]))
    app.include_router(router)
    return app


@pytest.fixture(scope="module")
def clients() -> Iterator[tuple[TestClient, TestClient]]:
    """The same routes with the table before them, and without."""
    with TestClient(_app(direct=True)) as direct, TestClient(_app(direct=False)) as usual:
        yield direct, usual


@pytest.mark.parametrize(
    ("verb", "path", "content"),
    [
        ("POST", "/length", b"abc"),
        ("POST", "/length", b""),
        ("GET", "/length", None),
        ("POST", "/length/", b"abc"),
        ("GET", "/named/a", None),
        ("GET", "/paged?number=3", None),
        ("GET", "/paged?number=x", None),
        ("GET", "/method", None),
        ("GET", "/model", None),
        ("GET", "/plain?more=1", None),
        ("DELETE", "/plain", None),
        ("GET", "/nothing", None),
    ],
)
def test_the_table_of_routes_changes_no_answer(
    verb: str, path: str, content: bytes | None, clients: tuple[TestClient, TestClient]
) -> None:
    direct, usual = (client.request(verb, path, content=content) for client in clients)
    assert (direct.status_code, direct.content, direct.headers) == (usual.status_code, usual.content, usual.headers)


def test_only_routes_made_of_the_request_alone_are_in_it() -> None:
    table = Direct([router])
    asked = [
        (route.path, {"method": next(iter(route.methods)), "path": route.path, "query_string": b""})
        for route in router.routes
    ]
    inside = {path for path, scope in asked if table.matches(scope)[0] is Match.FULL}
    assert inside == {"/length", "/plain"}


@pytest.mark.parametrize("path", ["/embed", "/search", "/search/batch", "/v1/embeddings"])
def test_the_routes_that_are_asked_most_are_in_it(path: str) -> None:
    table = create_app(Settings()).routes[0]
    assert isinstance(table, Direct)
    scope = {"method": "POST", "path": path, "query_string": b""}
    assert table.matches(scope)[0] is Match.FULL and table.matches(scope | {"method": "GET"})[0] is Match.NONE
