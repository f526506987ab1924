"""Keys say who may do what: every route of the app is asked over a socket, with keys and without."""

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from fastapi.routing import APIRoute
from starlette.routing import Mount, Route

from service.api import auth
from service.api.app import create_app
from service.api.auth import local_names, scope_of
from service.api.direct import Direct
from service.api.keys import Scope, create_key, revoke_key
from service.runtime.quotas import Limit
from service.settings import Settings, SettingsError, read_settings
from tests import tiny_bundle
from tests.conftest import DEADLINE_S, redis_server, serving
from tests.service.test_main import started

OPEN = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/"), ("GET", "/docs")}
READING_POSTS = {
    "/embed",
    "/search",
    "/search/batch",
    "/search/script",
    "/classify",
    "/score",
    "/v1/embeddings",
    "/v1/rerank",
}


def routes() -> list[tuple[str, str]]:
    """Return every (method, path) that the app answers, from its own table of routes."""
    found = []
    waiting = list(create_app(Settings()).routes)
    while waiting:
        route: Any = waiting.pop()
        if isinstance(route, APIRoute | Route):
            found += [(method, route.path) for method in sorted(route.methods or ())]
        elif isinstance(route, Mount):
            found.append(("GET", f"{route.path}/a.js"))
        elif not isinstance(route, Direct):  # a router that is included
            assert route.include_context.prefix == "", "this test does not know prefixes of included routers"
            waiting += route.original_router.routes
    return sorted(found)


def filled(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "x", path)


@pytest.fixture(scope="module")
def keyed(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, dict[str, str]]]:
    """A server with keys, and a key of each scope in the clear."""
    folder = tmp_path_factory.mktemp("keyed")
    scopes: tuple[Scope, ...] = ("read", "write")
    clear = {scope: create_key(folder / "keys.json", scope, [scope])[1] for scope in scopes}
    settings = Settings(bundle=bundle_dir, store=folder / "store", device="cpu", threads=1, keys=folder / "keys.json")
    with serving(settings) as client:
        yield client, clear


def bearing(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize(("method", "path"), routes())
def test_every_route_is_closed_but_for_those_that_are_listed(
    method: str, path: str, keyed: tuple[httpx.Client, dict[str, str]]
) -> None:
    client, keys = keyed
    path = filled(path)
    if (method.replace("HEAD", "GET"), path) in OPEN or path.startswith("/playground/"):
        assert client.request(method, path).status_code not in (401, 403)
        return
    without = client.request(method, path)
    assert without.status_code == 401
    assert without.headers["www-authenticate"] == 'Bearer realm="isthmus"'
    wanted: Scope = "write"
    if method in ("GET", "HEAD", "OPTIONS") or path in READING_POSTS:
        wanted = "read"
    for scope, key in keys.items():
        status = client.request(method, path, headers=bearing(key)).status_code
        assert (status not in (401, 403)) is (scope == wanted), (scope, status)


def test_what_is_not_there_is_closed_too(keyed: tuple[httpx.Client, dict[str, str]]) -> None:
    client, keys = keyed
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"):
        assert client.request(method, "/healthz").status_code == 401, method
    assert client.get("/nothing", headers=bearing(keys["read"])).status_code == 404
    # As they are, past a client that would tidy them up.
    targets = ["/nothing", "/healthz/", "/healthz/x", "//healthz/x", "/playground", "/HEALTHZ", "/healthz/../items"]
    targets += ["/openapi.json", "/%2e%2e/healthz", "/healthz%00", "/healthz;x", "*", "/playground/../items"]
    for target in targets:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=DEADLINE_S) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            answer = connection.recv(65_536)
        under = target.startswith("/playground/")  # static files alone answer there, and they look for files only
        assert answer[9:12] in ((b"404", b"401") if under else (b"401", b"400")), (target, answer)


def test_an_exemption_is_an_exact_path() -> None:
    assert {path for _, path in OPEN} == auth.OPEN
    assert scope_of("GET", "/playground/app.js") is None
    assert scope_of("POST", "/playground/app.js") == "write"
    assert scope_of("GET", "/playgrounds") == "read"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ([], "missing_api_key"),
        ([("Authorization", "")], "missing_api_key"),
        ([("Authorization", "Bearer")], "missing_api_key"),
        ([("Authorization", "Basic aXN0aG11cw==")], "missing_api_key"),
        ([("Authorization", "Bearer a"), ("Authorization", "Bearer b")], "missing_api_key"),
        ([("Authorization", "Bearer nonsense")], "invalid_api_key"),
        ([("Authorization", "Bearer isthmus_" + "0" * 12 + "_" + "A" * 43)], "invalid_api_key"),
        ([("Authorization", "Bearer " + "x" * 20_000)], "invalid_api_key"),
        ([("Authorization", b"Bearer \xff\xfe")], "invalid_api_key"),
    ],
)
def test_a_refusal_says_what_is_missing(
    headers: list[tuple[str, Any]], code: str, keyed: tuple[httpx.Client, dict[str, str]]
) -> None:
    client, _ = keyed
    for path in ("/embed", "/v1/embeddings"):
        response = client.post(path, json={}, headers=httpx.Headers(headers))
        assert response.status_code == 401
        body = response.json()
        assert (body["error"] if path.startswith("/v1") else body)["code"] == code


def test_a_key_in_the_query_is_no_key(keyed: tuple[httpx.Client, dict[str, str]]) -> None:
    client, keys = keyed
    assert client.get("/items", params={"api_key": keys["read"]}).status_code == 401


def test_a_refused_upload_is_answered_though_it_is_not_read(keyed: tuple[httpx.Client, dict[str, str]]) -> None:
    client, _ = keyed
    for content in (b"x" * 3_000_000, (b"x" * 100_000 for _ in range(30))):
        assert client.post("/embed", content=content).status_code == 401
    assert client.get("/healthz").status_code == 200


def test_openais_client_shows_its_key(keyed: tuple[httpx.Client, dict[str, str]]) -> None:
    client, keys = keyed
    base = f"{client.base_url}/v1"
    with openai.OpenAI(base_url=base, api_key=keys["read"], max_retries=0) as good:
        assert len(good.embeddings.create(model="tiny", input="red").data) == 1
    for key, error in ((keys["write"], openai.PermissionDeniedError), ("unused", openai.AuthenticationError)):
        with openai.OpenAI(base_url=base, api_key=key, max_retries=0) as refused, pytest.raises(error):
            refused.embeddings.create(model="tiny", input="red")


def test_a_revoked_key_is_out_within_seconds_and_a_new_one_is_in(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, clear = create_key(path, "one", ["read"])
    keyed = settings.model_copy(update={"keys": path})
    second = keyed.model_copy(update={"store": tmp_path / "second"})
    with serving(keyed) as one, serving(second) as other:
        assert one.get("/items", headers=bearing(clear)).status_code == 200
        assert other.get("/items", headers=bearing(clear)).status_code == 200
        _, added = create_key(path, "two", ["read"])
        revoke_key(path, key.id)
        for client in (one, other):
            until(client, clear, 401)
            assert client.get("/items", headers=bearing(added)).status_code == 200
        path.write_text("{}}")
        until(one, added, 503)
        ready = one.get("/readyz")
        assert (ready.status_code, ready.json()["checks"]["keys"]) == (503, False)


def until(client: httpx.Client, key: str, status: int) -> None:
    """Asking again and again is what a client would do: nothing else says when the server has looked."""
    deadline = time.monotonic() + DEADLINE_S
    while client.get("/items", headers=bearing(key)).status_code != status:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("shared", [False, True])
def test_a_key_that_is_used_up_gets_429(
    shared: bool, settings: Settings, tmp_path: Path, png: Callable[..., bytes], request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "keys.json"
    limits = ["requests=6/month", "items=5/month", "characters=10/month", "pixels=3000/month"]
    key, clear = create_key(path, "small", ["read"], [Limit.parse(each) for each in limits])
    _, free = create_key(path, "free", ["read"])
    update: dict[str, Any] = {"keys": path}
    if shared:
        request.getfixturevalue("patient_redis")
        update["redis_url"] = request.getfixturevalue("redis_url")
    with serving(settings.model_copy(update=update)) as client:

        def embed(*inputs: Any, key: str = clear) -> httpx.Response:
            return client.post("/embed", json={"inputs": inputs}, headers=bearing(key))

        first = embed("red", "blue")
        assert first.status_code == 200
        assert first.headers["ratelimit"].startswith('"requests/2592000";r=5;t=')
        assert '"items/2592000";r=3;' in first.headers["ratelimit"]
        assert '"characters/2592000";r=3;' in first.headers["ratelimit"]
        assert (first.headers["ratelimit-limit"], first.headers["ratelimit-remaining"]) == ("10", "3")
        assert '"pixels/2592000";q=3000;w=2592000' in first.headers["ratelimit-policy"]
        refused = embed("green")  # five characters
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert 0 < int(refused.headers["retry-after"]) <= 2 * 2_592_000 / 10
        files = {"file": ("a.png", png("red", size=(50, 50)))}
        assert client.post("/embed", files=files, headers=bearing(clear)).status_code == 200
        refused = client.post("/embed", files=files, headers=bearing(clear))
        assert (refused.status_code, refused.json()["code"]) == (429, "rate_limited")
        assert '"pixels/2592000";r=500;' in refused.headers["ratelimit"]
        assert client.get("/items", headers=bearing(clear)).status_code == 200
        assert client.get("/items", headers=bearing(clear)).status_code == 200
        over = client.post("/v1/embeddings", json={"input": "a", "model": "tiny"}, headers=bearing(clear))
        assert (over.status_code, over.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(over.headers["retry-after"]) > 0
        other = embed("green", key=free)
        assert other.status_code == 200 and "ratelimit" not in other.headers
        assert (
            'isthmus_rejections_total{reason="rate_limited"} 3.0' in client.get("/metrics", headers=bearing(free)).text
        )
        assert key.id not in client.get("/metrics", headers=bearing(free)).text


def test_stored_vectors_are_counted(settings: Settings, tmp_path: Path) -> None:
    """Nothing is embedded, but a key that may store so many items may not store more of them as vectors."""
    _, clear = create_key(tmp_path / "keys.json", "k", ["read", "write"], [Limit.parse("items=3/month")])
    update = {"keys": tmp_path / "keys.json", "store": tmp_path / "store"}
    with serving(settings.model_copy(update=update)) as client:

        def post(path: str, body: Any) -> int:
            return client.post(path, json=body, headers=bearing(clear)).status_code

        one = {"vector": [1.0] + [0.0] * (tiny_bundle.DIMENSIONS - 1)}
        assert post("/items", {"items": [{"id": f"{number}", **one} for number in range(2)]}) == 200
        assert post("/search", {"query": one}) == 200, "a search stores nothing"
        assert post("/items", {"items": [{"id": "a", **one}, {"id": "b", **one}]}) == 429
        assert post("/items", {"items": [{"id": "a", "text": "red"}]}) == 200
        assert post("/items", {"items": [{"id": "c", **one}]}) == 429


def test_seconds_of_sound_are_counted(settings: Settings, tmp_path: Path, wav: Callable[..., bytes]) -> None:
    _, clear = create_key(tmp_path / "keys.json", "k", ["read"], [Limit.parse("seconds=10/month")])
    with serving(settings.model_copy(update={"keys": tmp_path / "keys.json"})) as client:

        def status(data: bytes) -> int:
            return client.post("/embed", files={"file": ("a", data)}, headers=bearing(clear)).status_code

        assert status(wav(seconds=7.0)) == 200
        assert status(wav(hertz=330.0, seconds=7.0)) == 429
        assert client.post("/embed", json={"inputs": ["red"]}, headers=bearing(clear)).status_code == 200
        assert status(wav(hertz=330.0, seconds=2.5)) == 200


def test_a_forged_header_does_not_use_up_a_key(settings: Settings, tmp_path: Path, png: Callable[..., bytes]) -> None:
    _, clear = create_key(tmp_path / "keys.json", "k", ["read"], [Limit.parse("pixels=1000/month")])
    forged = bytearray(png("red", size=(20, 20)))
    forged[16:24] = b"\x7f\xff\xff\xff" * 2  # width and height, in IHDR
    with serving(settings.model_copy(update={"keys": tmp_path / "keys.json"})) as client:
        for data, status in ((bytes(forged), (413, 415, 422)), (png("red", size=(20, 20)), (200,))):
            response = client.post("/embed", files={"file": ("a.png", data)}, headers=bearing(clear))
            assert response.status_code in status, response.text


@pytest.mark.usefixtures("patient_redis")
def test_limits_outlast_redis(settings: Settings, tmp_path: Path, free_port: int) -> None:
    _, clear = create_key(tmp_path / "keys.json", "k", ["read"], [Limit.parse("items=2/month")])
    update = {"keys": tmp_path / "keys.json", "redis_url": f"redis://127.0.0.1:{free_port}/0"}
    with redis_server(tmp_path, free_port), serving(settings.model_copy(update=update)) as client:
        assert client.post("/embed", json={"inputs": ["a"] * 2}, headers=bearing(clear)).status_code == 200
        assert client.post("/embed", json={"inputs": ["b"]}, headers=bearing(clear)).status_code == 429
    with serving(settings.model_copy(update=update)) as client:  # nobody is there now
        assert client.post("/embed", json={"inputs": ["a"] * 2}, headers=bearing(clear)).status_code == 200
        assert client.post("/embed", json={"inputs": ["b"]}, headers=bearing(clear)).status_code == 429
        metrics = client.get("/metrics", headers=bearing(clear)).text
        assert "isthmus_limiter_errors_total 0.0" not in metrics


# Without keys: what a page in somebody's browser may do with a server that only its reader reaches.


def test_pages_of_other_sites_change_nothing(client: httpx.Client) -> None:
    body = {"items": [{"id": "a", "text": "red"}]}
    host = f"{client.base_url.host}:{client.base_url.port}"
    for origin in ("https://evil.example", "null", f"http://{host}.evil.example", "http://127.0.0.1:1"):
        refused = client.post("/items", json=body, headers={"Origin": origin})
        assert (refused.status_code, refused.json()["code"]) == (403, "cross_origin"), origin
    # What a form can send without asking first: it must not depend on the content type.
    plain = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    assert client.post("/items/delete", content=json.dumps({"filter": {}}), headers=plain).status_code == 403
    assert client.get("/items").json()["items"] == []
    assert client.post("/items", json=body, headers={"Origin": f"http://{host}"}).status_code == 200
    assert client.get("/items", headers={"Origin": "https://evil.example"}).status_code == 200
    assert "access-control-allow-origin" not in client.get("/items", headers={"Origin": "https://evil.example"}).headers


def test_a_name_that_resolves_to_this_machine_gets_nothing(client: httpx.Client) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1"):
        refused = client.get("/items", headers={"Host": host})
        assert (refused.status_code, refused.json()["code"]) == (421, "unknown_host"), host
    for host in (
        "localhost",
        "LOCALHOST:8000",
        "app.localhost",
        "127.0.0.1:1",
        "[::1]:8000",
        "192.168.1.7",
        "localhost.",
    ):
        assert client.get("/items", headers={"Host": host}).status_code == 200, host


def test_names_that_are_listed_are_answered(settings: Settings) -> None:
    with serving(settings.model_copy(update={"hosts": ("isthmus.example",)})) as client:
        assert client.get("/healthz", headers={"Host": "Isthmus.example:443"}).status_code == 200
        assert client.get("/healthz", headers={"Host": "other.example"}).status_code == 421


@pytest.mark.parametrize(
    ("hosts", "host", "keyed", "names"),
    [
        ((), "127.0.0.1", False, frozenset()),
        ((), "::1", False, frozenset()),
        ((), "localhost", False, frozenset()),
        ((), "0.0.0.0", False, None),
        ((), "127.0.0.1", True, None),
        (("A.example",), "0.0.0.0", False, frozenset({"a.example"})),
    ],
)
def test_which_names_a_server_answers_to(hosts: tuple[str, ...], host: str, keyed: bool, names: object) -> None:
    assert local_names(hosts, host, keyed) == names


def test_cors_is_off_unless_sites_are_listed(settings: Settings, client: httpx.Client) -> None:
    preflight = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    assert client.options("/embed", headers=preflight).status_code == 405
    with serving(settings.model_copy(update={"origins": ("https://app.example",)})) as listed:
        answer = listed.options("/embed", headers=preflight)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-credentials" not in answer.headers
        assert listed.options("/embed", headers=preflight | {"Origin": "https://evil.example"}).status_code == 400
        headers = {"Origin": "https://app.example"}
        embedded = listed.post("/embed", json={"inputs": ["red"]}, headers=headers)
        assert (embedded.status_code, embedded.headers["access-control-allow-origin"]) == (200, "https://app.example")
        assert listed.post("/embed", json={"inputs": [""]}, headers=headers).headers["access-control-allow-origin"]


@pytest.mark.parametrize("origin", ["*", "app.example", "https://app.example/", "HTTPS://app.example", "null"])
def test_what_is_no_origin_stops_the_start(origin: str) -> None:
    with pytest.raises(SettingsError, match="ISTHMUS_ORIGINS"):
        read_settings(origins=origin)


def test_answers_carry_the_headers_of_security(shared_client: httpx.Client) -> None:
    for response in (shared_client.get("/models"), shared_client.get("/nothing"), shared_client.post("/embed")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
    page = shared_client.get("/metrics").headers  # no JSON: a browser might take it for a page
    policy = dict(part.strip().split(" ", 1) for part in page["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert "unsafe" not in page["content-security-policy"] and "*" not in page["content-security-policy"]
    assert page.get_list("content-security-policy") == [page["content-security-policy"]]


def test_the_document_says_which_scope_each_operation_needs() -> None:
    document = yaml.safe_load((Path(__file__).parents[2] / "openapi.yaml").read_text())
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            needed = scope_of(method.upper(), path)
            assert operation["security"] == ([{"key": [needed]}] if needed else []), path
            assert ({"401", "403", "429"} <= set(operation["responses"])) is (needed is not None), path


def test_the_log_names_the_key_and_never_shows_it(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, clear = create_key(tmp_path / "keys.json", "k", ["read"])
    monkeypatch.setenv("ISTHMUS_KEYS", str(tmp_path / "keys.json"))
    with started(bundle_dir, tmp_path / "store", stderr=subprocess.PIPE) as (process, url):
        for shown, status in ((clear, 200), (clear[:-1], 401)):
            assert httpx.get(f"{url}/items", headers=bearing(shown), trust_env=False).status_code == status
        process.terminate()
        _, logged = process.communicate(timeout=DEADLINE_S)
    lines = [json.loads(line) for line in logged.splitlines()]
    requests = [(line["status"], line.get("key")) for line in lines if line["message"] == "request"]
    assert requests == [(200, key.id), (401, None)]
    assert clear[21:41] not in logged
