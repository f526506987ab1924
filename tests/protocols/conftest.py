"""A server that speaks every protocol, and what /embed says of the same inputs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.api.keys import create_key
from service.api.protocols.registry import PROTOCOLS
from service.runtime.quotas import Limit
from service.settings import Settings
from tests.conftest import serving

ALL = tuple(PROTOCOLS)
ALIASES = ("nomic:latest=tiny",)
LONG = "red " * 100
"""More words than the tiny bundle's text tower reads."""
Native = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def server(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    store = tmp_path_factory.mktemp("protocols") / "store"
    settings = Settings(
        bundle=bundle_dir, store=store, device="cpu", threads=1, protocols=ALL, previews=True, model_aliases=ALIASES
    )
    with serving(settings) as client:
        yield client


@pytest.fixture(scope="module")
def keyed(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, str]]:
    """A server with keys, and a key that may read. Weaviate and Immich, which send no key, have one of their own that
    may embed three items a day."""
    folder = tmp_path_factory.mktemp("keyed")
    _, clear = create_key(folder / "keys.json", "reader", ["read"])
    few, _ = create_key(folder / "keys.json", "modules", ["read"], [Limit.parse("items=3/day")])
    settings = Settings(
        bundle=bundle_dir,
        store=folder / "store",
        device="cpu",
        threads=1,
        protocols=ALL,
        keys=folder / "keys.json",
        protocol_keys=(f"weaviate={few.id}", f"immich={few.id}"),
    )
    with serving(settings) as client:
        yield client, clear


@pytest.fixture
def native(server: httpx.Client) -> Native:
    """The vectors that POST /embed gives."""

    def embed(*inputs: Any, **more: Any) -> np.ndarray:
        answer = server.post("/embed", json={"inputs": list(inputs), **more})
        assert answer.status_code == 200, answer.text
        return np.array([each["embedding"] for each in answer.json()["embeddings"]])

    return embed


def same(given: Any, expected: np.ndarray) -> None:
    """The contract of every protocol: its vectors are those of /embed."""
    assert np.abs(np.array(given, np.float64) - expected).max() <= 1e-6


def refused(
    client: httpx.Client, path: str, body: Any, status: int, names: str, message: Callable[[dict[str, Any]], str]
) -> None:
    """The request is refused in the protocol's own form, and the message names what is wrong."""
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert names in message(answer.json()), answer.text
