"""Java's own client, which asks to go on in HTTP/2 (h2c) with every request that it sends in the clear."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.conftest import DEADLINE_S

CLIENT = Path(__file__).parent / "java" / "Client.java"


@pytest.mark.full
def test_what_java_sends_is_read(shared_client: httpx.Client) -> None:
    java = shutil.which("java")
    if java is None:
        assert "CI" not in os.environ, "java is not installed: `make tools` installs it"
        pytest.skip("java is not installed")
    base_url = str(shared_client.base_url).rstrip("/")
    # It starts in half the time without the compiler that would make it quick later.
    command = [java, "-XX:TieredStopAtLevel=1", "-Xshare:auto", str(CLIENT), base_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    answers = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert [(status, version) for status, version, _ in answers] == [
        *[("200", "HTTP_1_1")] * 4,
        ("404", "HTTP_1_1"),
    ]
    vectors = [json.loads(body)["embeddings"][0]["embedding"] for _, _, body in answers[:2]]
    assert vectors[0] == vectors[1]
    assert vectors[0] == shared_client.post("/embed", json={"inputs": ["red"]}).json()["embeddings"][0]["embedding"]
