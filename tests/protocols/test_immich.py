"""Immich's machine learning: the forms that immich-app/immich server/src/repositories/machine-learning.repository.ts
(commit 028fab83fded0590eca2772ef2add592294749ac) sends, answered as machine-learning/immich_ml/main.py (commit
02470112126684dd0898985262f26f2814b5280a) answers; what is not CLIP goes to an upstream, a real server on loopback."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.app import open_parts
from service.settings import Settings, SettingsError
from tests.conftest import DEADLINE_S, serving
from tests.protocols.conftest import Native, same

pytestmark = pytest.mark.client("golden")
VISUAL = {"clip": {"visual": {"modelName": "tiny"}}}
TEXTUAL = {"clip": {"textual": {"modelName": "tiny", "options": {"language": "en"}}}}
FACES = {
    "facial-recognition": {
        "detection": {"modelName": "buffalo_l", "options": {"minScore": 0.7}},
        "recognition": {"modelName": "buffalo_l"},
    }
}
FOUND = {"facial-recognition": [], "imageHeight": 30, "imageWidth": 40}


def predict(client: httpx.Client, entries: Any, image: bytes | None = None, **more: Any) -> httpx.Response:
    """Ask as a browser's FormData writes it: a Blob has the file name `blob`."""
    parts: dict[str, Any] = {"entries": (None, entries if isinstance(entries, str) else json.dumps(entries))}
    parts |= {name: (None, value) for name, value in more.items()}
    return client.post("/predict", files=parts | ({} if image is None else {"image": ("blob", image)}))


def test_pictures(server: httpx.Client, native: Native, png: Callable[..., bytes], picture: str) -> None:
    answer = predict(server, VISUAL, png("red"))
    assert answer.status_code == 200 and set(answer.json()) == {"clip", "imageHeight", "imageWidth"}
    same(json.loads(answer.json()["clip"]), native({"image": picture})[0])
    assert (answer.json()["imageHeight"], answer.json()["imageWidth"]) == (30, 40)


def test_texts(server: httpx.Client, native: Native) -> None:
    answer = predict(server, TEXTUAL, text="a red dog").json()
    assert set(answer) == {"clip"}
    same(json.loads(answer["clip"]), native("a red dog")[0])


def test_ping(server: httpx.Client) -> None:
    answer = server.get("/ping")
    assert (answer.status_code, answer.text) == (200, "pong")
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize(
    ("entries", "image", "more", "status", "names"),
    [
        ("{", None, {"text": "red"}, 400, "JSON"),
        ({}, None, {"text": "red"}, 422, "entries"),
        ({"clip": {"visual": {}}}, b"x", {}, 422, "modelName"),
        ({"clip": {"visual": {"modelName": "other"}}}, b"x", {}, 404, "no such model"),
        ({"clip": {"visual": {"modelName": "tiny", "options": {"crop": 1}}}}, b"x", {}, 422, "crop"),
        (VISUAL, None, {"text": "red"}, 422, "visual goes with image"),
        (TEXTUAL, b"x", {}, 422, "textual goes with text"),
        (VISUAL, b"x", {}, 415, "image[0]"),
        (TEXTUAL, None, {"text": ""}, 422, "text[0]"),
        (VISUAL, b"x", {"text": "red"}, 422, "exactly one of: image, text"),
        (VISUAL, None, {}, 422, "exactly one of: image, text"),
        (VISUAL, b"x", {"assetId": "1"}, 400, "entries, and image or text"),
        ({**VISUAL, **FACES}, b"x", {}, 422, "facial-recognition"),
        ({"pets": {}}, b"x", {}, 422, "entries"),
        ({"clip": {"visual": {"modelName": "tiny"}, "long" * 1_000: 1}}, b"x", {}, 422, "entries: clip"),
        (FACES, b"x", {}, 422, "ISTHMUS_IMMICH_UPSTREAM"),
    ],
)
def test_refusals(
    server: httpx.Client, entries: Any, image: bytes | None, more: dict[str, str], status: int, names: str
) -> None:
    answer = predict(server, entries, image, **more)
    assert answer.status_code == status and names in answer.json()["detail"], answer.text
    assert len(answer.content) < 500


class Upstream:
    """A server that remembers what it is asked, and answers as it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], bytes]] = []
        self.answer, self.status, self.hangs = json.dumps(FOUND).encode(), 200, threading.Event()
        self.hangs.set()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                upstream.asked.append((self.path, {name.lower(): given for name, given in self.headers.items()}, body))
                upstream.hangs.wait(DEADLINE_S)
                self.send_response(upstream.status)
                self.send_header("Location", "http://127.0.0.1:1/predict")
                self.send_header("Content-Length", str(len(upstream.answer)))
                self.end_headers()
                self.wfile.write(upstream.answer)

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: Any) -> None: ...  # a client that waits no longer

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    upstream = Upstream()
    thread = threading.Thread(target=upstream.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield upstream
    upstream.server.shutdown()
    upstream.server.server_close()
    thread.join(10)


def with_upstream(bundle: Path, folder: Path, url: str, **more: Any) -> Settings:
    common: dict[str, Any] = {"bundle": bundle, "store": folder / "store", "device": "cpu", "threads": 1}
    return Settings(**common, protocols=("immich",), immich_upstream=url, **more)


PASSING: dict[str, Any] = {"fetch_allow": "127.0.0.0/8", "immich_upstream_key": "hidden"}


@pytest.fixture(scope="module")
def passing(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory, upstream: Upstream) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("immich")
    with serving(with_upstream(bundle_dir, folder, upstream.url, **PASSING)) as client:
        yield client


@pytest.fixture(autouse=True)
def afresh(upstream: Upstream) -> None:
    upstream.asked.clear()
    upstream.status, upstream.answer = 200, json.dumps(FOUND).encode()


def test_faces_are_asked_of_the_upstream(passing: httpx.Client, upstream: Upstream, png: Callable[..., bytes]) -> None:
    answer = predict(passing, FACES, png("red"))
    assert (answer.status_code, answer.json()) == (200, FOUND)
    [(path, headers, body)] = upstream.asked
    assert path == "/predict" and headers["authorization"] == "Bearer hidden"
    assert json.dumps(FACES).encode() in body and png("red") in body
    assert predict(passing, VISUAL, png("red")).status_code == 200 and len(upstream.asked) == 1


@pytest.mark.parametrize(
    ("status", "answered", "says"),
    [(500, 503, "cannot answer"), (401, 503, "cannot answer"), (400, 422, "refuses"), (302, 422, "302")],
)
def test_what_the_upstream_says_instead(
    passing: httpx.Client, upstream: Upstream, png: Callable[..., bytes], status: int, answered: int, says: str
) -> None:
    upstream.status, upstream.answer = status, b"a secret of its own"
    answer = predict(passing, FACES, png("red"))
    assert answer.status_code == answered and says in answer.json()["detail"] and "secret" not in answer.text


def test_an_upstream_that_is_too_slow_or_says_too_much(
    bundle_dir: Path, tmp_path: Path, passing: httpx.Client, upstream: Upstream, png: Callable[..., bytes]
) -> None:
    upstream.answer = b"x" * 16_000_001
    assert predict(passing, FACES, png("red")).status_code == 503
    upstream.hangs.clear()
    hasty = with_upstream(bundle_dir, tmp_path, upstream.url, **PASSING, request_deadline_s=0.2)
    with serving(hasty) as client:
        try:
            slow = predict(client, FACES, png("red"))
            assert slow.status_code in (503, 504) and "hidden" not in slow.text
        finally:
            upstream.hangs.set()


def test_its_address_is_checked_as_that_of_a_url(bundle_dir: Path, tmp_path: Path, upstream: Upstream) -> None:
    for wrong in (upstream.url, "http://user@example.org", "ftp://example.org", "http://2130706433:3003"):
        with pytest.raises(SettingsError, match="ISTHMUS_IMMICH_UPSTREAM"):
            open_parts(with_upstream(bundle_dir, tmp_path, wrong))


def test_a_key_of_its_own(keyed: tuple[httpx.Client, str], png: Callable[..., bytes]) -> None:
    client, _ = keyed
    assert client.get("/ping").text == "pong"
    for _ in range(3):
        assert predict(client, TEXTUAL, text="red").status_code == 200
    limited = predict(client, VISUAL, png("red"))
    assert limited.status_code == 429 and "used up" in limited.json()["detail"]
