"""What holds for every protocol: it is off until it is named, it has its own error for what no route answers, and the
key that its clients cannot send is checked at the start."""

from pathlib import Path
from typing import Any, get_args

import httpx
import pytest

from service.api.app import open_parts
from service.api.keys import create_key
from service.api.protocols.registry import PROTOCOLS, protocol_of
from service.settings import ProtocolName, Settings, SettingsError, read_settings

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


@pytest.mark.parametrize("name", set(PROTOCOLS) - {"openai", "jina"})
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


def test_settings_that_are_wrong_stop_the_start(bundle_dir: Path, tmp_path: Path) -> None:
    for wrong in ({"protocols": "openai,grpc"}, {"protocol_keys": "weaviate"}, {"protocol_keys": "grpc=0123456789ab"}):
        with pytest.raises(SettingsError, match=f"ISTHMUS_{next(iter(wrong)).upper()}"):
            read_settings(**wrong)
    assert read_settings(protocols="").protocols == ()
    create_key(tmp_path / "keys.json", "reader", ["read"])
    common: dict[str, Any] = {
        "bundle": bundle_dir,
        "store": tmp_path / "store",
        "protocol_keys": "weaviate=0123456789ab",
    }
    with pytest.raises(SettingsError, match="ISTHMUS_KEYS is not set"):
        open_parts(Settings(**common))
    with pytest.raises(SettingsError, match="has no such key"):
        open_parts(Settings(**common, keys=tmp_path / "keys.json"))
