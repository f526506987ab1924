"""A server with a bundle that means something: red finds red images, tone a 440 Hz tone."""

from collections.abc import Iterator

import httpx2
import pytest

from isthmus_client import Isthmus


@pytest.fixture
def shared_space(shared_client: httpx2.Client) -> Iterator[Isthmus]:
    with Isthmus(str(shared_client.base_url)) as space:
        yield space
