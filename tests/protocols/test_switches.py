"""Some things hold for every protocol: it is off until it is named, it has its own error for what no route answers,
and the key that its clients cannot send is checked at the start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest

from service.api.app import open_parts
from service.api.keys import create_key
from service.api.protocols.registry import PROTOCOLS, READS, protocol_of
from service.runtime.quotas import Limit
from service.settings import ProtocolName, Settings, SettingsError, read_settings
from tests.conftest import serving
from tests.protocols.conftest import LONG

WORDS = {
    "openai": lambda answer: answer["error"]["message"],
    "jina": lambda answer: answer["detail"],
    "cohere": lambda answer: answer["message"],
    "tei": lambda answer: answer["error"],
    "ollama": lambda answer: answer["error"],
    "weaviate": lambda answer: answer["error"],
    "immich": lambda answer: answer["detail"],
    "mcp": lambda answer: answer["error"]["message"],
}
"""Where each protocol's clients look for the message of an error."""


def test_every_name_has_a_protocol() -> None:
    assert set(PROTOCOLS) == set(get_args(ProtocolName)) == set(WORDS)


@pytest.mark.parametrize("name", sorted(set(PROTOCOLS) - {"openai", "jina"}))
def test_a_protocol_is_off_until_it_is_named(name: ProtocolName, shared_client: httpx.Client) -> None:
    for path in PROTOCOLS[name].reads:
        answer = shared_client.post(path, json={})
        assert answer.status_code == 404
        assert WORDS[name](answer.json()).startswith(f"the protocol {name} is off on this server: ISTHMUS_PROTOCOLS")


def test_errors_have_the_form_of_the_nearest_protocol() -> None:
    paths: dict[str, Any] = {"/v1/embeddings": "openai", "/v1": "openai", "/v1/rerank": "jina", "/v2/x": "cohere"}
    paths |= {"/tei": "tei", "/teiler": None, "/v10": None, "/meta": "weaviate", "/embed": None}
    for path, name in paths.items():
        protocol = protocol_of(path)
        assert (protocol.name if protocol else None) == name, path


BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": ("/v1/embeddings", {"model": "tiny", "input": ["red", LONG, "red Жук Жук Жук"]}),
    "jina": ("/v1/rerank", {"model": "tiny", "query": "red", "documents": [LONG]}),
    "cohere": ("/v2/embed", {"model": "tiny", "input_type": "search_query", "texts": ["red", LONG]}),
    "tei": ("/tei/embed", {"inputs": ["red", "blue"]}),
    "ollama": ("/api/embed", {"model": "tiny", "input": ["red", LONG]}),
    "weaviate": ("/vectorize", {"texts": ["red", LONG]}),
}


@pytest.fixture(scope="module")
def keys(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, dict[str, str]]]:
    """A server, and keys: one that may write alone, and for each protocol one that may embed two inputs a day."""
    folder = tmp_path_factory.mktemp("switches")
    file = folder / "keys.json"
    clear = {name: create_key(file, name, ["read"], [Limit.parse("items=2/day")])[1] for name in BODIES}
    clear["writer"] = create_key(file, "writer", ["write"])[1]
    settings = Settings(
        bundle=bundle_dir,
        store=folder / "store",
        device="cpu",
        threads=1,
        protocols=tuple(PROTOCOLS),
        keys=file,
        max_body_bytes=20_000,
    )
    with serving(settings) as client:
        yield client, clear


@pytest.mark.parametrize("name", BODIES)
def test_keys_limits_and_errors_hold_in_the_protocols_own_form(
    name: str, keys: tuple[httpx.Client, dict[str, str]]
) -> None:
    client, clear = keys
    path, body = BODIES[name]

    def sent(key: str | None, **content: Any) -> httpx.Response:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {clear[key]}"} if key else {})
        return client.post(path, headers=headers, **content)

    def says(answer: httpx.Response, status: int, words: str) -> None:
        assert answer.status_code == status, answer.text
        assert words in WORDS[name](answer.json()), answer.text

    says(sent(None, json=body), 401, "API key")
    says(sent("writer", json=body), 403, "scope read")
    says(sent(name, content=b"{"), 400, "JSON")
    says(sent(name, content=b"[]"), 422, "not valid")
    says(sent(name, content=b" " * 20_001), 413, "larger than 20000 bytes")
    says(client.post(path, content="x", headers={"Authorization": f"Bearer {clear[name]}"}), 400, "JSON")
    first = sent(name, json=body)
    assert first.status_code == 200 and first.headers["ratelimit-remaining"] == "0", first.text
    limited = sent(name, json=body)
    says(limited, 429, "used up")
    assert int(limited.headers["retry-after"]) > 0


@pytest.mark.parametrize("name", sorted(set(BODIES) - {"tei"}))
def test_what_was_not_read_is_told(name: str, server: httpx.Client) -> None:
    path, body = BODIES[name]
    answer = server.post(path, json=body).json()
    if name == "openai":
        assert answer["data"][1]["truncated"] and answer["data"][2]["unknown"] > 0.5
    else:
        [warning] = answer.get("meta", answer)["warnings"]
        assert "only a part was read" in warning and warning.partition(":")[0].endswith("]")


def test_settings_that_are_wrong_stop_the_start(bundle_dir: Path, tmp_path: Path) -> None:
    for wrong in (
        {"protocols": "openai,grpc"},
        {"protocols": "tei,openai,tei"},
        {"protocol_keys": "weaviate"},
        {"protocol_keys": "grpc=0123456789ab"},
        {"protocol_keys": "weaviate=0123456789ab"},  # a protocol that is off
    ):
        with pytest.raises(SettingsError, match=f"ISTHMUS_{next(iter(wrong)).upper()}"):
            read_settings(**wrong)
    assert read_settings(protocols="").protocols == ()
    create_key(tmp_path / "keys.json", "reader", ["read"])
    common: dict[str, Any] = {
        "bundle": bundle_dir,
        "store": tmp_path / "store",
        "protocols": "weaviate",
        "protocol_keys": "weaviate=0123456789ab",
    }
    with pytest.raises(SettingsError, match="ISTHMUS_KEYS is not set"):
        open_parts(Settings(**common))
    with pytest.raises(SettingsError, match="has no such key"):
        open_parts(Settings(**common, keys=tmp_path / "keys.json"))


def test_a_slash_at_the_end_needs_no_other_key(keyed: tuple[httpx.Client, str]) -> None:
    client, clear = keyed
    for path in sorted(READS):
        answer = client.post(f"{path}/", json={}, headers={"Authorization": f"Bearer {clear}"})
        assert answer.status_code == 307, answer.text
    assert client.post("/items/", json={}, headers={"Authorization": f"Bearer {clear}"}).status_code == 403


@pytest.mark.parametrize(
    ("path", "body", "where"),
    [
        ("/v1/embeddings", {"model": "tiny", "input": "red", "truncate": "START"}, "body.truncate"),
        ("/classify", {"inputs": ["red"], "labels": [5]}, "body.labels.0"),
        ("/classify", {"inputs": ["red"], "labels": ["red"], "templates": {"Smell!": ["{}"]}}, "body.templates"),
        ("/embed", {"inputs": ["red"], "list[1]": 5}, "body.list[1]"),
    ],
)
def test_a_refusal_names_the_place_and_nothing_of_the_inside(
    server: httpx.Client, path: str, body: Any, where: str
) -> None:
    answer = server.post(path, json=body)
    assert answer.status_code == 422 and "function" not in answer.text and "literal" not in answer.text
    problem = answer.json()
    places = (
        [".".join(map(str, each["loc"])) for each in problem["errors"]]
        if "errors" in problem
        else [problem["error"]["param"]]
    )
    assert all(place.startswith(where) for place in places), places
