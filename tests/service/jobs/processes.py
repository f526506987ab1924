"""Servers as processes of their own, which can be killed; and waiting for jobs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import DEADLINE_S

LINES = {"content-type": "application/jsonl"}
_ROOT = Path(__file__).parents[3]


@contextmanager
def server(bundle: Path, store: Path, module: str = "service", port: int = 0, **variables: object) -> Iterator[Any]:
    """`python -m service serve`, killed at the end where it still runs. Gives (process, client)."""
    variables |= {"threads": 1, "queue_s": 600}
    environment = os.environ | {f"ISTHMUS_{name.upper()}": str(value) for name, value in variables.items()}
    arguments = ("--bundle", str(bundle), "--store", str(store), "--port", str(port), "--device", "cpu")
    started = subprocess.Popen(
        [sys.executable, "-m", module, "serve", *arguments, "--log-level", "error"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=_ROOT,
    )
    assert started.stdout is not None
    try:
        address = started.stdout.readline().split()[-1]
        with httpx.Client(base_url=address, timeout=DEADLINE_S, trust_env=False) as client:
            yield started, client
    finally:
        kill(started)
        started.stdout.close()


def kill(started: "subprocess.Popen[str]") -> None:
    """-9."""
    started.send_signal(signal.SIGKILL)
    started.wait(DEADLINE_S)


def lines(items: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


def submitted(client: httpx.Client, items: Sequence[Any], **more: Any) -> str:
    answer = client.post("/jobs", content=lines(items), headers=LINES | more.pop("headers", {}), **more)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def ended(client: httpx.Client, id: str) -> dict[str, Any]:
    """The job once it has ended; each look is a request to its server."""
    for _ in range(20_000):
        job: dict[str, Any] = client.get(f"/jobs/{id}").json()
        if job["state"] not in ("queued", "running"):
            return job
    raise AssertionError(f"the job did not end: {job}")


def begun(client: httpx.Client, id: str, done: int = 1) -> dict[str, Any]:
    """The job once so many of its items are done, and not all."""
    for _ in range(20_000):
        job: dict[str, Any] = client.get(f"/jobs/{id}").json()
        if job["done"] >= done:
            break
    assert done <= job["done"] < job["total"], job
    return job


def stored(client: httpx.Client, **params: Any) -> dict[str, dict[str, Any]]:
    """Return every item by its id; none is there twice."""
    found: dict[str, dict[str, Any]] = {}
    cursor = None
    while True:
        page = client.get("/items", params={"limit": 1_000} | params | ({"cursor": cursor} if cursor else {})).json()
        for item in page["items"]:
            assert item["id"] not in found
            found[item["id"]] = item
        if (cursor := page["next_cursor"]) is None:
            return found


def errors(client: httpx.Client, id: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.get(f"/jobs/{id}/errors").text.splitlines()]
