"""The inference server of Weaviate's multi2vec-clip and multi2vec-bind: the bodies that weaviate/weaviate sends and
reads in modules/multi2vec-clip/clients/vectorizer.go (commit f90bfd0ff173a8396ad51f7c098acfbb49aa7aaa), meta.go and
startup.go, and modules/multi2vec-bind/clients/vectorizer.go (commit f2f0838fe81235b2771f75436d970a1c652c25fc); answered
as weaviate/multi2vec-clip-inference app.py (commit ce5618ac3f0f6cae7a11ff0c82cbb78f5e73e6bb) answers."""

from typing import Any

import httpx
import pytest

from tests.protocols.conftest import Native, refused, same

pytestmark = pytest.mark.client("golden")


def plain(uri: str) -> str:
    """The base64 of a data: URI, which is what Weaviate keeps and sends."""
    return uri.partition(",")[2]


def test_clip(server: httpx.Client, native: Native, picture: str) -> None:
    # vecRequest of multi2vec-clip: both lists always; Go writes a nil slice as null.
    answer = server.post("/vectorize", json={"texts": ["red", "blue"], "images": [plain(picture)]})
    assert answer.status_code == 200 and set(answer.json()) == {"textVectors", "imageVectors"}
    same(answer.json()["textVectors"], native("red", "blue"))
    same(answer.json()["imageVectors"], native({"image": picture}))
    texts = server.post("/vectorize", json={"texts": ["red"], "images": None}).json()
    assert texts["imageVectors"] == [] and len(texts["textVectors"]) == 1


def test_bind(server: httpx.Client, native: Native, picture: str, sound: str) -> None:
    body = {"texts": ["red"], "images": [plain(picture)], "audio": [plain(sound)]}
    answer = server.post("/vectorize", json=body).json()
    assert set(answer) == {"textVectors", "imageVectors", "audioVectors"}
    same(answer["audioVectors"], native({"audio": sound}))


def test_startup_and_meta(server: httpx.Client) -> None:
    for path in ("/.well-known/ready", "/.well-known/live"):
        answer = server.get(path)
        assert (answer.status_code, answer.content) == (204, b"")
    assert server.get("/meta").json()["name"] == "tiny"


@pytest.mark.parametrize(
    ("body", "status", "names"),
    [
        ({"texts": [], "images": []}, 422, "at least one of"),
        ({"texts": ["red"], "imu": ["x"]}, 422, "imu"),
        ({"texts": ["red"], "thermal": ["x"]}, 422, "thermal"),
        ({"texts": ["red"], "depth": ["x"]}, 422, "depth"),
        ({"texts": ["red", ""]}, 422, "texts[1]"),
        ({"images": ["!"]}, 422, "images[0]"),
        ({"images": ["http://127.0.0.1/a.png"]}, 422, "images[0]"),
        ({"texts": ["red"], "model": "other"}, 422, "model"),
        ({"texts": ["red"] * 257}, 422, "at most 256 texts"),
        ({"texts": ["red"] * 256, "images": ["x"]}, 422, "at most 256 inputs"),
        ({"texts": ["red"], "audio": ["!"]}, 422, "audio[0]"),
    ],
)
def test_refusals(server: httpx.Client, body: Any, status: int, names: str) -> None:
    refused(server, "/vectorize", body, status, names, lambda answer: answer["error"])


def test_a_module_without_a_key_has_the_one_of_its_protocol(keyed: tuple[httpx.Client, str], picture: str) -> None:
    client, clear = keyed
    assert client.get("/.well-known/ready").status_code == 204
    assert client.post("/vectorize", json={"texts": ["red"]}).status_code == 200
    # A request that is over the limit uses up nothing, in whichever of its lists.
    assert client.post("/vectorize", json={"texts": ["blue", "dog"], "images": [plain(picture)]}).status_code == 429
    for _ in range(2):
        assert client.post("/vectorize", json={"texts": ["red"]}).status_code == 200
    limited = client.post("/vectorize", json={"texts": ["red"]})
    assert limited.status_code == 429 and "used up" in limited.json()["error"] and limited.headers["retry-after"]
    shown = client.post("/vectorize", json={"texts": ["red"]}, headers={"Authorization": f"Bearer {clear}"})
    assert shown.status_code == 200
    wrong = client.post("/vectorize", json={"texts": ["red"]}, headers={"Authorization": "Bearer x"})
    assert wrong.status_code == 401 and "error" in wrong.json()
    page = client.post("/vectorize", json={"texts": ["red"]}, headers={"Origin": "https://example.org"})
    assert page.status_code == 403
    assert client.post("/embed", json={"inputs": ["red"]}).status_code == 401
