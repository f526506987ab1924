"""Over a real socket: clients that go away, full queues, deadlines, dead workers, and the end of the server."""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.api.app import Parts, open_parts
from service.api.keys import create_key
from service.commands import serve
from service.commands.serve import Server
from service.engine import handling as modalities
from service.engine.towers import Arrays
from service.runtime.logs import caller
from service.settings import Settings
from service.store import SqliteStore
from tests.conftest import DEADLINE_S, patient, served, serving
from tests.service.slow import WAIT_S, Slow


@contextmanager
def with_towers(
    settings: Settings, wrap: Callable[[Any], Any]
) -> Iterator[tuple[Server, httpx.Client, dict[str, Any]]]:
    """The service with each tower inside what `wrap` makes of it."""
    parts: Parts = open_parts(patient(settings))
    towers = parts.models[0].towers
    wrapped = {modality: wrap(tower) for modality, tower in towers.items()}
    towers.update(wrapped)
    with served(settings, parts) as (server, client):
        try:
            yield server, client, wrapped
        finally:
            for tower in wrapped.values():
                if isinstance(tower, Slow):
                    tower.released.set()


def sent(client: httpx.Client, *texts: str) -> socket.socket:
    """A request on a connection of its own, whole, and not yet answered."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=WAIT_S)
    body = json.dumps({"inputs": texts}).encode()
    length = f"Content-Length: {len(body)}"
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    wanted = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    text = client.get("/metrics").text
    return float(re.search(rf"^{name}{{{wanted}}} (\S+)$" if wanted else rf"^{name} (\S+)$", text, re.M).group(1))


def until(said: Callable[[], bool]) -> None:
    """Wait until something is so. Each look is a request, so this waits on the server's loop, until a deadline."""
    end = time.monotonic() + DEADLINE_S
    while not said():
        assert time.monotonic() < end, "it did not come about"


def in_queue(client: httpx.Client) -> float:
    return metric(client, "isthmus_queue_depth", modality="text", model="tiny")


def test_a_client_that_goes_away_costs_no_model_call(settings: Settings) -> None:
    with with_towers(settings.model_copy(update={"batch_tokens": 1}), lambda tower: Slow(tower, held=True)) as (
        _,
        client,
        towers,
    ):
        tower = towers["text"]
        running = sent(client, "red")
        assert tower.entered.wait(WAIT_S)
        gone = [sent(client, word) for word in ("cat", "dog", "barks")]
        until(lambda: in_queue(client) == 4)
        for connection in gone:
            connection.close()
        until(lambda: in_queue(client) == 1)
        tower.released.set()
        assert running.recv(65_536).startswith(b"HTTP/1.1 200")
        running.close()
        assert client.post("/embed", json={"inputs": ["blue"]}).status_code == 200
        # One collated ahead while its client was there may not be dropped from a call; none is here, at one each.
        assert tower.rows == 2
        until(lambda: metric(client, "isthmus_disconnects_total") == 3)


@pytest.mark.parametrize(
    ("kind", "begun"),
    [
        ("application/json", b'{"inputs": ["red'),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF',
        ),
    ],
    ids=["JSON", "form"],
)
def test_a_client_that_goes_away_in_the_middle_of_its_body_is_no_failure(
    client: httpx.Client, kind: str, begun: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    before = metric(client, "isthmus_disconnects_total")
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 5000\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=WAIT_S) as connection:
        connection.sendall(head.encode() + begun)
    until(lambda: metric(client, "isthmus_disconnects_total") == before + 1)
    assert "unexpected failure" not in caplog.text


def test_a_full_queue_is_429_with_a_time_to_come_again(settings: Settings) -> None:
    small = settings.model_copy(update={"max_inputs": 2, "queue_inputs": 2})
    with with_towers(small, lambda tower: Slow(tower, held=True)) as (_, client, towers), sent(client, "red", "blue"):
        assert towers["text"].entered.wait(WAIT_S)
        refused = client.post("/embed", json={"inputs": ["green"]})
        assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        openai = client.post("/v1/embeddings", json={"model": "tiny", "input": "green"})
        assert (openai.status_code, openai.json()["error"]["type"]) == (429, "rate_limit_error")
        assert "retry-after" in openai.headers
        assert client.get("/healthz").status_code == 200
        towers["text"].released.set()
        until(lambda: in_queue(client) == 0)
        assert client.post("/embed", json={"inputs": ["green"]}).status_code == 200


def test_where_every_queue_is_full_a_body_is_not_even_waited_for(settings: Settings) -> None:
    small = settings.model_copy(update={"modalities": ("text",), "max_inputs": 1, "queue_inputs": 1})
    with with_towers(small, lambda tower: Slow(tower, held=True)) as (_, client, towers), sent(client, "red") as first:
        until(lambda: in_queue(client) == 1)
        for path in ("/embed", "/v1/embeddings", "/classify"):
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=WAIT_S) as second:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                second.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())  # not a byte of its body
                answered = second.recv(65_536)
            assert answered.startswith(b"HTTP/1.1 429") and b"retry-after: 1\r\n" in answered
        assert client.post("/search", json={"vector": [1.0, 0.0]}).status_code == 422  # read: it needs no model
        towers["text"].released.set()
        assert first.recv(65_536).startswith(b"HTTP/1.1 200")


def test_past_the_deadline_is_504(settings: Settings) -> None:
    hasty = settings.model_copy(update={"request_deadline_s": 0.05})
    with with_towers(hasty, lambda tower: Slow(tower, held=True)) as (_, client, towers):
        late = client.post("/embed", json={"inputs": ["red"]})
        assert (late.status_code, late.json()["code"]) == (504, "deadline_exceeded")
        assert in_queue(client) == 0
        towers["text"].released.set()


class Mortal:
    """Ends the thread that runs it, as often as it is told to."""

    def __init__(self, tower: Any) -> None:
        self.tower, self.deaths = tower, 0
        self.provider, self.precision, self.choice = tower.provider, tower.precision, None

    def run(self, arrays: Arrays) -> np.ndarray:
        if self.deaths:
            self.deaths -= 1
            raise SystemExit
        return self.tower.run(arrays)


def test_a_worker_that_dies_is_replaced_and_its_request_answered(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with with_towers(settings, Mortal) as (_, client, towers):
        towers["text"].deaths = 1
        assert client.post("/embed", json={"inputs": ["red"]}).status_code == 200
        towers["text"].deaths = 2
        failed = client.post("/embed", json={"inputs": ["blue"]})
        assert (failed.status_code, failed.json()["code"]) == (500, "inference_failed")
        assert client.get("/readyz").status_code == 200
        assert client.post("/embed", json={"inputs": ["blue"]}).status_code == 200
        assert metric(client, "isthmus_worker_restarts_total", modality="text", model="tiny") == 3


@pytest.mark.parametrize("pictures", [1, 3])
def test_a_thread_that_dies_while_it_decodes_costs_no_input(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    png: Callable[..., bytes],
    pictures: int,
) -> None:
    deaths = 0
    read = modalities.see_image

    def mortal(*given: Any) -> Any:
        nonlocal deaths
        if deaths:
            deaths -= 1
            raise SystemExit
        return read(*given)

    monkeypatch.setattr(modalities, "see_image", mortal)
    files = [("file", ("a", png((10 * each, 0, 0)))) for each in range(pictures)]
    with serving(settings) as client:
        deaths = 1
        assert client.post("/embed", files=files).status_code == 200
        deaths = 2
        failed = client.post("/embed", files=[("file", ("a", png((0, 0, 90))))])
        assert (failed.status_code, failed.json()["code"]) == (500, "inference_failed")
        assert client.get("/readyz").status_code == 200


def test_readiness_sees_a_worker_that_cannot_be_replaced(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    wav: Callable[..., bytes],
) -> None:
    start = threading.Thread.start

    def no_threads(thread: threading.Thread) -> None:
        if thread.name == "audio-model":
            raise RuntimeError("can't start new thread")
        start(thread)

    with with_towers(settings, Mortal) as (_, client, towers):
        assert client.get("/readyz").status_code == 200
        monkeypatch.setattr("threading.Thread.start", no_threads)
        towers["audio"].deaths = 1
        for _ in range(2):  # the first one's own canary kills the worker
            ready = client.get("/readyz")
            assert ready.status_code == 503
            checks = ready.json()["checks"]
            assert checks["tower.audio"] is False
            assert checks["workers"] is False
            assert checks["tower.text"] is True
        monkeypatch.undo()
        assert client.get("/readyz").status_code == 200, "this brings it back: a proxy sends nothing else meanwhile"
        assert client.post("/embed", files={"file": ("a", wav())}).status_code == 200


def test_what_is_under_way_at_the_end_is_finished(settings: Settings) -> None:
    with with_towers(settings, lambda tower: Slow(tower, held=True)) as (server, client, towers):
        tower = towers["text"]
        with ThreadPoolExecutor() as pool:
            requests = [pool.submit(client.post, "/embed", json={"inputs": [word]}) for word in ("red", "dog", "cat")]
            assert tower.entered.wait(WAIT_S)
            until(lambda: in_queue(client) == 3)
            server.should_exit = True
            tower.released.set()
            assert [request.result(WAIT_S).status_code for request in requests] == [200, 200, 200]


def test_what_is_not_finished_within_the_grace_is_answered_all_the_same(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = settings.model_copy(update={"shutdown_grace_s": 0, "batch_tokens": 1})
    with with_towers(brief, lambda tower: Slow(tower, held=True)) as (server, client, towers):
        tower = towers["text"]
        with ThreadPoolExecutor() as pool:
            words = ("red", "dog", "cat", "green")
            requests = [pool.submit(client.post, "/embed", json={"inputs": [word]}) for word in words]
            assert tower.entered.wait(WAIT_S)
            until(lambda: in_queue(client) == 4)
            closing = threading.Event()
            embedder = server.state.models["tiny"].embedder
            close = embedder.close

            async def closed() -> None:
                task = asyncio.create_task(close())
                for _ in range(10):  # until its queues are closed; it then waits for the call that is held
                    await asyncio.sleep(0)
                closing.set()
                await task

            monkeypatch.setattr(embedder, "close", closed)
            server.should_exit = True
            assert closing.wait(WAIT_S)
            tower.released.set()
            answers = [request.result(WAIT_S) for request in requests]
            assert sorted(answer.status_code for answer in answers) == [200, 503, 503, 503]
            assert {answer.json()["code"] for answer in answers if answer.status_code == 503} == {"not_ready"}


def test_what_has_not_ended_by_the_last_moment_is_told_to_come_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_ANSWERING_S", 0)
    parts = open_parts(settings)
    with served(settings.model_copy(update={"shutdown_grace_s": 0}), parts) as (server, client):
        goes, reading = threading.Event(), threading.Semaphore(0)
        vector = {"vector": [1.0] * 16}
        assert client.post("/items", json={"items": [{"id": "a"} | vector]}).status_code == 200
        assert isinstance(parts.store, SqliteStore) and server._loop is not None
        readers = parts.store._readers

        def read() -> None:
            reading.release()
            assert goes.wait(WAIT_S)

        for _ in range(4):  # all that one caller may have
            asyncio.run_coroutine_threadsafe(readers.run(read), server._loop)
            assert reading.acquire(timeout=WAIT_S)
        try:
            with ThreadPoolExecutor() as pool:
                search = pool.submit(client.post, "/search", json={"query": vector})
                until(lambda: client.get("/healthz").is_success and bool(readers._places._lines))
                server.should_exit = True
                answer = search.result(WAIT_S)
        finally:
            goes.set()
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["retry-after"] == "1"


def test_while_a_keys_large_body_is_read_anothers_is_read_too(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    (flood, key), (_, other) = (create_key(file, name, ["read"]) for name in ("flood", "other"))
    large = {"inputs": ["red" + " " * 5_000] * 10}

    def embed(key: str) -> httpx.Response:
        return client.post("/embed", json=large, headers={"Authorization": f"Bearer {key}"})

    with served(settings.model_copy(update={"keys": file})) as (server, client):
        readers, begun, goes = server.state.readers, threading.Event(), threading.Event()

        def read() -> None:
            begun.set()
            assert goes.wait(WAIT_S)

        assert server._loop is not None
        caller.set(flood.id)
        asyncio.run_coroutine_threadsafe(readers.run(read), server._loop)
        caller.set(None)
        assert begun.wait(WAIT_S)
        try:
            with ThreadPoolExecutor() as pool:
                waiting = pool.submit(embed, key)
                until(lambda: client.get("/healthz").is_success and bool(readers._places._lines))
                assert embed(other).status_code == 200
                assert not waiting.done()
                goes.set()
                assert waiting.result(WAIT_S).status_code == 200
        finally:
            goes.set()
