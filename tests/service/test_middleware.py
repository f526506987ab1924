import gzip
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from service.settings import Settings
from tests.conftest import serving


def test_a_request_id_goes_in_and_out_or_is_made(shared_client: httpx.Client) -> None:
    assert shared_client.get("/healthz", headers={"X-Request-ID": "mine-7"}).headers["x-request-id"] == "mine-7"
    made = {shared_client.get("/healthz").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    evil = shared_client.get("/healthz", headers={"X-Request-ID": "a b;<script>"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", evil)
    assert "x-request-id" in shared_client.get("/nothing").headers


def test_server_timing_names_the_stages(shared_client: httpx.Client) -> None:
    timing = shared_client.post("/embed", json={"inputs": ["photo of photo"]}).headers["server-timing"]
    stages = dict(re.fullmatch(r"(\w+);dur=([0-9.]+)", part).groups() for part in timing.split(", "))
    assert {"read", "cache", "decode", "queue", "model", "total"} == set(stages)
    searched = shared_client.post("/search", json={"query": "photo"}).headers["server-timing"]
    assert {"decode", "queue", "model", "search"} <= {part.partition(";")[0] for part in searched.split(", ")}


def test_a_body_that_states_it_is_too_large_is_refused_unread(settings: Settings) -> None:
    with serving(settings.model_copy(update={"max_body_bytes": 1000})) as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address, timeout=20) as connection:
            kind = "Content-Type: application/json"
            head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{kind}\r\nContent-Length: 1001\r\n\r\n"
            connection.sendall(head.encode())
            answer = connection.recv(65_536)  # not one byte of the body was sent
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"body_too_large" in answer
        response = client.post("/embed", content=b"x" * 1500, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        assert client.post("/embed", json={"inputs": ["red"]}).status_code == 200


def test_a_body_that_grows_too_large_is_refused(settings: Settings) -> None:
    with serving(settings.model_copy(update={"max_body_bytes": 1000})) as client:
        chunks = (b"x" * 400 for _ in range(4))
        response = client.post("/embed", content=chunks, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"y" * 2000
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        response = client.post("/embed", content=iter([form]), headers=headers)
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        assert client.post("/embed", json={"inputs": ["red"]}).status_code == 200


def test_a_coding_that_nobody_takes_off_is_refused(shared_client: httpx.Client) -> None:
    body = b'{"inputs":["red"]}'
    for coding in ("gzip", "br", "zstd", "deflate", "identity, gzip"):
        for path, kind in (("/embed", "json"), ("/v1/embeddings", "json"), ("/items", "json"), ("/embed", "form")):
            headers = {"Content-Type": f"application/{kind}", "Content-Encoding": coding}
            refused = shared_client.post(path, content=gzip.compress(body), headers=headers)
            assert (refused.status_code, refused.headers["accept-encoding"]) == (415, "identity")
    for content in (body, iter([body])):
        headers = {"Content-Type": "application/json", "Content-Encoding": "identity"}
        assert shared_client.post("/embed", content=content, headers=headers).status_code == 200
    # Of a job gzip is known by its first bytes, and said to be: others are not.
    lines = {"Content-Type": "application/jsonl", "Content-Encoding": "gzip"}
    assert shared_client.post("/jobs", content=gzip.compress(b""), headers=lines).status_code == 202
    assert shared_client.post("/jobs", content=b"x", headers=lines | {"Content-Encoding": "br"}).status_code == 415
    assert shared_client.get("/healthz", headers={"Content-Encoding": "br"}).status_code == 200, "there is no body"


def test_head_is_get_without_the_body(client: httpx.Client) -> None:
    client.post("/items", json={"items": [{"id": "a", "text": "red"}]})
    document = client.get("/openapi.json").json()
    routes = [path for path, methods in document["paths"].items() if "get" in methods]
    known = {"{id}": "a", "{name}": "default"}
    assert len(routes) > 12
    for route in [*routes, "/openapi.json", "/playground/app.js", "/nowhere"]:
        path = re.sub(r"{\w+}", lambda found: known[found[0]], route)
        got, told = client.get(path), client.head(path)
        assert (told.status_code, told.content) == (got.status_code, b""), path
        assert told.headers.get("content-type") == got.headers.get("content-type"), path
    refused = client.head("/embed")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    assert (
        'isthmus_requests_total{method="HEAD",route="/items/{id:path}",status="200"} 1.0' in client.get("/metrics").text
    )


@pytest.mark.parametrize(
    ("asked", "led"),
    [
        ("/embed/", "/embed"),
        ("/v1/embeddings/", "/v1/embeddings"),
        ("/models/?a=/b/", "/models?a=/b/"),
        ("/playground", "/playground/"),
    ],
)
def test_a_redirect_leads_to_where_the_client_comes_from(
    shared_client: httpx.Client, settings: Settings, asked: str, led: str
) -> None:
    answered = shared_client.get(asked)
    assert answered.status_code == 307
    # A proxy, with another name and scheme, and perhaps a path that it takes off.
    for seen in ("https://example.org", "https://example.org/under/isthmus"):
        assert urljoin(seen + asked, answered.headers["location"]) == seen + led


def test_a_path_that_the_proxy_leaves_on_is_taken_off(settings: Settings) -> None:
    with serving(settings.model_copy(update={"root_path": "/under/isthmus"})) as client:
        for path in ("", "/under/isthmus"):
            assert client.post(f"{path}/embed", json={"inputs": ["red"]}).status_code == 200
            assert client.get(f"{path}/playground/app.js").status_code == 200
            assert client.get(f"{path}/embed/?a=b").headers["location"] == "/under/isthmus/embed?a=b"
        assert client.get("/under/isthmuses").status_code == 404


def test_a_client_that_goes_away_is_counted_and_harms_nobody(client: httpx.Client, wav: Callable[..., bytes]) -> None:
    address = (client.base_url.host, client.base_url.port)
    sound = wav(seconds=120.0)
    head = (
        "POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: "
    )
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + sound + b"\r\n--x--\r\n"
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
    # The answer to a later request shows that the server has noticed: both go through one event loop.
    for _ in range(50):
        assert client.post("/embed", files={"file": ("b", sound)}).status_code == 200
        if "isthmus_disconnects_total 1.0" in client.get("/metrics").text:
            break
    else:
        raise AssertionError("the disconnect was not counted")


def test_metrics_are_the_apps_own(bundle_dir: Path, tmp_path: Path) -> None:
    settings = Settings(bundle=bundle_dir, store=tmp_path / "a", device="cpu", threads=1)
    with serving(settings) as one, serving(settings.model_copy(update={"store": tmp_path / "b"})) as two:
        one.post("/embed", json={"inputs": ["red"]})
        one.post("/embed", json={"inputs": ["red", ""]})
        text, other = one.get("/metrics").text, two.get("/metrics").text
    assert 'isthmus_requests_total{method="POST",route="/embed",status="200"} 1.0' in text
    assert 'isthmus_requests_total{method="POST",route="/embed",status="422"} 1.0' in text
    assert 'isthmus_rejections_total{reason="invalid_input"} 1.0' in text
    assert 'isthmus_cache_total{result="hit"} 1.0' in text
    assert 'isthmus_batch_items_count{modality="text",model="tiny"} 1.0' in text
    assert 'isthmus_queue_depth{modality="image",model="tiny"} 0.0' in text
    assert "/embed" not in other


def test_files_of_a_form_need_no_disk(
    shared_client: httpx.Client, png: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk for temporary files may be full or read-only, and is no place for what clients send."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    files = [("file", ("a.png", png() + bytes(2**21))), ("file", ("b.png", png()))]
    response = shared_client.post("/embed", files=files)
    assert response.status_code == 200, response.text
    first, second = response.json()["embeddings"]
    assert first["embedding"] == second["embedding"]
