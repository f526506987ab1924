"""A server with a bundle that means something: red finds red images, tone a 440 Hz tone."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from isthmus_client import Isthmus


@pytest.fixture
def space(client: httpx2.Client) -> Iterator[Isthmus]:
    with Isthmus(str(client.base_url)) as space:
        yield space


@pytest.fixture
def shared_space(shared_client: httpx2.Client) -> Iterator[Isthmus]:
    with Isthmus(str(shared_client.base_url)) as space:
        yield space


@pytest.fixture
def media(tmp_path: Path, png: object, wav: object) -> Path:
    """red.png, blue.png, tone.wav, and broken.png, which is none."""
    assert callable(png) and callable(wav)
    folder = tmp_path / "media"
    folder.mkdir()
    (folder / "red.png").write_bytes(png("red"))
    (folder / "blue.png").write_bytes(png("blue"))
    (folder / "tone.wav").write_bytes(wav())
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return folder
