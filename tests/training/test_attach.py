"""`attach`: towers trained into the space of an embedding API, a real server here, and a bundle that asks it."""

import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from isthmus_client.retries import Retries
from service.commands.check import check_bundle
from service.contract.bundle import Bundle, read_bundle
from service.contract.endpoint import PROBE, request_of, shape_of, vectors_of
from service.engine.opening import open_engine
from service.settings import Settings, SettingsError
from tests.conftest import serving
from tests.service.media import b64
from tests.training import spaces, tiny
from training.encode import endpoint
from training.encode.endpoint import Endpoint, EndpointError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

ROUTES = {"openai": "/v1/embeddings", "ollama": "/api/embed", "tei": "/embed"}
_WORDS = {word: np.random.default_rng(place).normal(size=12) for place, word in enumerate(tiny.WORDS)}


def vector_of(text: str) -> list[float]:
    known = [_WORDS.get(word, np.zeros(12)) for word in text.lower().split()]
    return [float(one) for one in (np.sum(known, axis=0) + 0.01)]


class Api:
    """An embedding API of all three shapes. `answers` are statuses that it gives first, each with a Retry-After."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.keys: list[str | None] = []
        self.answers: list[tuple[int, str]] = []
        self.other = 1.0
        self.hangs = threading.Event()
        self.hangs.set()
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                texts = asked["inputs"] if self.path == ROUTES["tei"] else asked["input"]
                api.keys.append(self.headers["authorization"])
                api.hangs.wait(10)
                status, wait = api.answers.pop(0) if api.answers else (200, "")
                if "refuse me" in texts:
                    status = 400
                rows = [[api.other * one for one in vector_of(text)][:: 1 if api.other == 1 else -1] for text in texts]
                body: Any = {"error": "no"}
                if status == 200:
                    api.texts += texts
                    body = {
                        ROUTES["openai"]: {
                            "data": [{"index": n, "embedding": row} for n, row in enumerate(rows)][::-1]
                        },
                        ROUTES["ollama"]: {"embeddings": rows},
                        ROUTES["tei"]: rows,
                    }[self.path]
                content = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                if wait:
                    self.send_header("retry-after", wait)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def url(self, shape: str = "openai") -> str:
        return f"http://127.0.0.1:{self.server.server_port}{ROUTES[shape]}"


@pytest.fixture(scope="module")
def _api() -> Iterator[Api]:
    api = Api()
    thread = threading.Thread(target=api.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield api
    api.server.shutdown()
    thread.join()
    api.server.server_close()


@pytest.fixture
def api(_api: Api) -> Api:
    _api.answers, _api.other, _api.keys = [], 1.0, []
    _api.hangs.set()
    return _api


@pytest.fixture(scope="module")
def attached(_api: Api, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Pictures and sounds in the API's space. The API dies once while it embeds the captions."""
    folder = tmp_path_factory.mktemp("attached")
    recipe = spaces.recipe(tiny_root, folder, "image", "audio")
    out = folder / "bundle"
    arguments = (recipe, "--endpoint", _api.url(), "--model", "m", "--cache", folder / "cache", "--out", out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint, "_PATIENT", Retries(attempts=1))
        _api.answers = [(200, ""), (200, ""), (200, ""), (500, "")]
        assert spaces.run("attach", *arguments, "--work", folder / "work") == 2
        gave = set(_api.texts) - {PROBE}
        assert gave
        assert spaces.run("attach", *arguments, "--work", folder / "work") == 0
    checked = [text for text in gave if _api.texts.count(text) > 1]
    assert len(checked) <= 16, "what it gave is asked for again by the check of the graph alone"
    return read_bundle(out)


def settings(bundle: Bundle, store: Path, **given: Any) -> Settings:
    return Settings(bundle=bundle.path, store=store, device="cpu", threads=1, fetch_allow=("127.0.0.0/8",), **given)


def found(client: httpx.Client, query: Any, status: int = 200) -> Any:
    response = client.post("/search", json={"query": query, "top_k": 1})
    assert response.status_code == status, response.text
    return response.json()["results"][0] if status == 200 else response


def test_texts_keep_their_vectors_and_a_store_that_was_filled_before_answers_pictures_and_sounds(
    attached: Bundle, api: Api, tiny_root: Path, tmp_path: Path
) -> None:
    manifest = attached.manifest
    assert (manifest.dimensions, set(manifest.towers)) == (12, {"image", "audio", "text"})
    means = {kind: np.array(mean) for kind, mean in manifest.means.items()}
    assert np.linalg.norm(means["text"]) > 0.2
    for kind in ("image", "audio"):
        assert abs(means[kind] @ means["text"]) < 0.01, "media have nothing of what all texts have in common"
    check_bundle(attached.path)
    with serving(settings(attached, tmp_path, endpoint=api.url(), endpoint_key="secret")) as client:
        texts = [f"a picture of {name}" for name in tiny.COLOURS] + ["the sound of red", "the sound of blue"]
        items = [{"id": text, "vector": vector_of(text), "modality": "text"} for text in texts]
        assert client.post("/items", json={"items": items}).status_code == 200
        same = found(client, "a picture of green")
        assert same["id"] == "a picture of green" and same["score"] == pytest.approx(1, abs=1e-5)
        assert api.keys and set(api.keys) == {"Bearer secret"}
        files, names = spaces.pictures(tiny_root)
        hits = [
            found(client, {"image": b64(file.read_bytes())})["id"].endswith(name)
            for file, name in zip(files, names, strict=True)
        ]
        assert np.mean(hits) > 0.6
        assert client.get("/readyz").status_code == 200
        assert "secret" not in (attached.path / "manifest.json").read_text()


def test_an_endpoint_that_fails_says_so_to_everyone_who_waits(attached: Bundle, api: Api, tmp_path: Path) -> None:
    with serving(settings(attached, tmp_path, endpoint=api.url(), request_deadline_s=7)) as client:
        client.post("/items", json={"items": [{"id": "x", "vector": vector_of("red"), "modality": "text"}]})
        api.answers = [(429, "0"), (503, "")]
        assert found(client, "red")["id"] == "x"  # it was asked again
        api.answers = [(429, "60")]
        busy = found(client, "blue", 429)
        assert int(busy.headers["retry-after"]) == 60 and "embedding API" in busy.json()["detail"]
        api.answers = [(401, "")]
        assert "refuses this server" in found(client, "green", 503).json()["detail"]
        many = client.post("/embed", json={"inputs": ["white", "refuse me"], "on_error": "null"}).json()["embeddings"]
        assert many[0].get("error") is None and many[1]["error"]["code"] == "inference_failed"
        api.hangs.clear()
        assert found(client, "very plain", 503).json()["code"] == "not_ready"
        assert client.post("/search", json={"query": {"vector": vector_of("red")}}).status_code == 200
        api.hangs.set()
        assert client.get("/readyz").status_code == 200
        assert found(client, "very plain")["id"] == "x"


def test_another_model_behind_the_same_address_is_noticed(attached: Bundle, api: Api, tmp_path: Path) -> None:
    with serving(settings(attached, tmp_path, endpoint=api.url())) as client:
        client.post("/items", json={"items": [{"id": "x", "vector": vector_of("red"), "modality": "text"}]})
        assert found(client, "blue")["id"] == "x"
        api.other = -0.5  # from one call to the next
        assert "are not those of the model 'm'" in found(client, "red", 503).json()["detail"]


def test_vectors_of_another_model_in_the_cache_are_not_taken(
    api: Api, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (spaces.recipe(tiny_root, tmp_path, "image"), "--endpoint", api.url(), "--model", "m")
    arguments += ("--cache", tmp_path / "cache", "--work", tmp_path / "work", "--out")
    assert spaces.run("attach", *arguments, tmp_path / "one") == 0
    api.other = -0.5
    assert spaces.run("attach", *arguments, tmp_path / "two") == 2
    said = capsys.readouterr().err
    assert "gives other vectors for m than when it made those in" in said
    shutil.rmtree(re.findall(r"those in (\S+): delete", said)[0])
    assert spaces.run("attach", *arguments, tmp_path / "two") == 0


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (None, "set ISTHMUS_ENDPOINT"),
        ("http://127.0.0.1:9/chat", "no route that embeds"),
        ("http://127.0.0.1:9/embed", "of the shape openai"),
        ("ftp://x/v1/embeddings", "not a URL"),
    ],
)
def test_a_wrong_address_is_told_at_the_start(attached: Bundle, tmp_path: Path, address: str | None, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        open_engine(settings(attached, tmp_path, endpoint=address))


def test_a_file_of_vectors_alone_makes_towers_without_texts(tiny_root: Path, tmp_path: Path) -> None:
    recipe = spaces.recipe(tiny_root, tmp_path, "image")
    file = tmp_path / "vectors.jsonl"
    texts = [form.format(name) for name in tiny.COLOURS for form in ("a picture of {}", "very plain {} photo")]
    file.write_text("".join(json.dumps({"text": text, "vector": vector_of(text)}) + "\n" for text in texts))
    arguments = (recipe, "--model", "m", "--vectors", file, "--cache", tmp_path / "cache", "--work", tmp_path / "work")
    assert spaces.run("attach", *arguments, "--out", tmp_path / "bundle") == 0
    assert set(read_bundle(tmp_path / "bundle").manifest.towers) == {"image"}
    file.write_text(json.dumps({"text": "a picture of red", "vector": [1.0]}) + "\n{}")
    assert spaces.run("attach", *arguments, "--out", tmp_path / "bundle") == 2


@pytest.mark.parametrize("shape", ROUTES)
def test_every_shape_is_asked_and_read(api: Api, shape: str) -> None:
    assert shape_of(api.url(shape)) == shape
    opened = Endpoint.open(api.url(shape), "m", None)
    np.testing.assert_allclose(opened(["red", "blue"]), [vector_of("red"), vector_of("blue")], rtol=1e-6)
    api.answers = [(400, "")]
    with pytest.raises(EndpointError, match="answers 400"):
        opened(["red"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"data": []}',
        b'{"data": [{"index": 0, "embedding": [0, 0]}]}',
        b'{"data": [{"index": 0, "embedding": "x"}]}',
        b'{"data": [{"index": 7, "embedding": [1]}]}',
        b'{"data": [{"index": Infinity, "embedding": [1]}]}',
        b"[" * 100_000,
    ],
)
def test_an_answer_without_vectors_is_refused(body: bytes) -> None:
    assert json.loads(request_of("openai", "m", ["x"])) == {"model": "m", "input": ["x"]}
    with pytest.raises(ValueError, match="the answer holds"):
        vectors_of("openai", body, 1)
