import asyncio

import httpx
import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware

from service import errors
from service.api import problems
from service.api.middleware import Context
from service.contract.errors import BadMedia, InputError, MediaTooLarge, UnsupportedMedia
from service.runtime.metrics import Metrics


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidRequest("x"), 422, "invalid_request"),
        (errors.MalformedRequest("x"), 400, "malformed_request"),
        (errors.NotFound("x"), 404, "not_found"),
        (errors.NotFound("x", code="item_not_found"), 404, "item_not_found"),
        (errors.BodyTooLarge("x"), 413, "body_too_large"),
        (errors.UnsupportedBody("x"), 415, "unsupported_body"),
        (errors.Overloaded("x"), 429, "overloaded"),
        (errors.NotReady("x"), 503, "not_ready"),
        (errors.DeadlineExceeded("x"), 504, "deadline_exceeded"),
        (InputError("x"), 422, "invalid_input"),
        (UnsupportedMedia("x"), 415, "unsupported_media"),
        (MediaTooLarge("x"), 413, "media_too_large"),
        (BadMedia("x"), 422, "undecodable_media"),
        (errors.InferenceFailed("x"), 500, "inference_failed"),
        (errors.FetchDisabled("x"), 422, "url_fetch_disabled"),
        (errors.InputFailed(3, BadMedia("x")), 422, "undecodable_media"),
        (ValueError("x"), 500, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_the_table(error: Exception, status: int, code: str) -> None:
    assert problems.status_and_code(error) == (status, code)


def get(path: str, error: Exception) -> httpx.Response:
    async def main() -> httpx.Response:
        app = FastAPI(middleware=[Middleware(Context, metrics=Metrics())])
        problems.install(app)

        @app.get(path)
        async def fail() -> None:
            raise error

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get(path)

    return asyncio.run(main())


def test_overload_says_when_to_try_again() -> None:
    response = get("/x", errors.Overloaded("busy", retry_after_s=3))
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


def test_a_failed_input_is_named() -> None:
    body = get("/x", errors.InputFailed(3, BadMedia("the image is corrupt"))).json()
    assert (body["index"], body["detail"]) == (3, "inputs[3]: the image is corrupt")
    alone = get("/x", errors.InputFailed(None, BadMedia("the image is corrupt"), field="query")).json()
    assert "index" not in alone
    assert alone["detail"] == "query: the image is corrupt"


def test_what_nobody_expected_is_logged_and_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    response = get("/x", RuntimeError("/secret/path at 10.0.0.1"))
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "internal_error"
    assert "secret" not in response.text
    assert "x-request-id" in response.headers
    assert "secret" in caplog.text


def test_openais_routes_speak_openais_language() -> None:
    body = get("/v1/x", errors.Overloaded("busy")).json()
    error = {"message": "busy", "type": "rate_limit_error", "param": None, "code": "overloaded"}
    assert body == {"error": error, "detail": "busy"}


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("DELETE", "/items/kept?colection=other", "colection: unknown query parameter: this route takes collection"),
        ("POST", "/search?collection=other", "collection: unknown query parameter: this route takes none"),
        (
            "GET",
            "/items?limit=1&modalities=image",
            "modalities: unknown query parameter: this route takes col",
        ),
        ("GET", "/collections?name=other", "name: unknown query parameter: this route takes none"),
    ],
)
def test_a_parameter_that_is_none_is_refused(method: str, path: str, said: str, client: httpx.Client) -> None:
    assert client.post("/items", json={"items": [{"id": "kept", "text": "red"}]}).status_code == 200
    answer = client.request(method, path, json={"query": "red"} if method == "POST" else None)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    [error] = answer.json()["errors"]
    assert f"{error['loc'][-1]}: {error['msg']}".startswith(said)
    assert client.get("/items/kept").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [("/healthz?verbose=1", None), ("/v1/embeddings?api-version=2", {"model": "tiny", "input": "red"})],
)
def test_probes_and_clients_of_others_may_add_parameters(
    path: str, body: dict[str, str] | None, client: httpx.Client
) -> None:
    assert (client.get(path) if body is None else client.post(path, json=body)).status_code == 200
