"""The log holds enough to find a request again, and nothing that a client sent."""

import json
import logging
import sqlite3
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import httpx
import pytest

from service.engine.towers import Arrays, TowerError
from service.runtime.logs import JsonFormatter, described
from service.settings import Settings
from tests.conftest import serving
from tests.service.test_serving import with_towers

SECRET = "zyxwvu"
"""In every place where a client can put something."""


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, object]]]]:
    """Return what the root logger writes, as it does in a server, down to the last debug message of the service."""
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root, service = logging.getLogger(), logging.getLogger("service")
    before = service.level
    root.addHandler(handler)
    service.setLevel(logging.DEBUG)
    try:
        yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    finally:
        root.removeHandler(handler)
        service.setLevel(before)


Lines = Callable[[], list[dict[str, object]]]


def test_a_request_is_one_line_with_its_id(settings: Settings, lines: Lines) -> None:
    with serving(settings) as client:
        client.post("/embed", json={"inputs": ["red"]}, headers={"X-Request-ID": "mine-7"})
        client.post("/embed", json={"inputs": [""]}, headers={"X-Request-ID": "mine-8"})
    good, bad = (line for line in lines() if line["message"] == "request")
    assert (good["request_id"], good["method"], good["route"], good["status"]) == ("mine-7", "POST", "/embed", 200)
    assert good["level"] == "info" and float(str(good["ms"])) > 0 and "code" not in good
    assert (bad["request_id"], bad["status"], bad["code"]) == ("mine-8", 422, "invalid_input")


def test_a_slow_request_is_warned_of_with_its_stages(
    settings: Settings, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.middleware.SLOW_REQUEST_S", 1e-9)
    with serving(settings) as client:
        client.post("/embed", json={"inputs": ["red"]}, headers={"X-Request-ID": "slow-1"})
        metrics = client.get("/metrics").text
    slow = next(line for line in lines() if line["message"] == "slow request")
    assert (slow["request_id"], slow["level"], slow["route"]) == ("slow-1", "warning", "/embed")
    stages = slow["stages"]
    assert isinstance(stages, dict)
    assert {"read_ms", "cache_ms", "decode_ms", "queue_ms", "model_ms"} == set(stages)
    assert 'isthmus_slow_requests_total{route="/embed"} 1.0' in metrics
    monkeypatch.setattr("service.api.middleware.SLOW_REQUEST_S", 60.0)
    with serving(settings) as client:
        client.get("/healthz")
    assert [line["route"] for line in lines() if line["message"] == "slow request"] == ["/embed", "/metrics"]


def _secretive(client: httpx.Client, png: bytes, wav: bytes) -> None:
    """Requests of every kind, good and bad, each with the secret wherever it may stand."""
    name = f"{SECRET}.png"
    client.get(f"/{SECRET}", params={"x": SECRET})
    client.request("PROPFIND", "/embed")
    client.post("/embed", json={"inputs": [f"red {SECRET}"]})
    client.post("/embed", json={"inputs": [SECRET, {"image": SECRET}], "on_error": "null"})
    client.post("/embed", json={"inputs": [{"image": f"https://{SECRET}.example/"}], SECRET: SECRET})
    client.post("/embed", content=f'{{"{SECRET}'.encode(), headers={"content-type": "application/json"})
    client.post("/embed", content=SECRET.encode(), headers={"content-type": f"text/{SECRET}"})
    client.post("/embed", files={"file": (name, png[:40] + SECRET.encode())})
    client.post("/embed", files={SECRET: (name, png)})
    client.post("/embed", json={"inputs": ["x"], "model": SECRET})
    metadata = {"title": SECRET, SECRET: 1}
    client.put(f"/collections/{SECRET}", json={"index": "flat", "keywords": [SECRET]})
    client.put("/collections/default", json={"keywords": ["title"]})
    items = [{"id": SECRET, "text": f"{SECRET} red", "metadata": metadata}]
    client.post("/items", json={"items": items}).raise_for_status()
    client.post("/items", json={"items": [{**items[0], "collection": SECRET}]})
    client.post("/items", files={"file": (name, png)}).raise_for_status()
    client.post("/items", files={"file": (f"{SECRET}.wav", wav)}).raise_for_status()
    client.get(f"/items/{SECRET}").raise_for_status()
    client.get(f"/items/no-{SECRET}")
    query = {"query": SECRET, "filter": {"title": SECRET}, "keywords": {"query": f'"{SECRET}* AND ('}}
    client.post("/search", json=query).raise_for_status()
    client.post("/search", json={"query": SECRET, "filter": {"title": {f"${SECRET}": 1}}})
    client.post("/search", json={"query": {"id": f"no-{SECRET}"}})
    client.post("/classify", json={"inputs": ["red"], "labels": [SECRET, "red"]}).raise_for_status()
    client.put(f"/label-sets/{SECRET}", json={"labels": [SECRET]})
    client.post("/classify", json={"inputs": ["red"], "label_set": f"no-{SECRET}"})
    client.post("/v1/embeddings", json={"model": SECRET, "input": SECRET})
    client.post("/items/delete", json={"ids": [SECRET]}).raise_for_status()


class Quoting:
    """A tower that fails with an exception that quotes what it was given, and is caused by another that does."""

    def __init__(self, tower: object) -> None:
        self.provider, self.precision, self.choice = "CPUExecutionProvider", "fp32", None

    def run(self, arrays: Arrays) -> None:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ValueError(f"cannot embed {SECRET!r}") from error


def test_no_log_line_holds_what_a_client_sent(
    settings: Settings,
    lines: Lines,
    png: Callable[..., bytes],
    wav: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.api.middleware.SLOW_REQUEST_S", 1e-9)
    headers = dict.fromkeys(("Authorization", "User-Agent", "Cookie", "X-API-Key", "Traceparent"), SECRET)
    headers["X-Request-ID"] = f"<{SECRET}>"
    with serving(settings) as client:
        client.headers.update(headers)
        _secretive(client, png(), wav())
        exported = client.get("/metrics").text
    with with_towers(settings, Quoting) as (_, client, _):
        client.headers.update(headers)
        assert client.post("/embed", json={"inputs": [SECRET]}).status_code == 500
        assert client.get("/readyz").status_code == 503
    logged = lines()
    assert len([line for line in logged if line["message"] == "request"]) >= 25
    assert any("in run" in str(line.get("exception")) for line in logged), "the failure was not logged"
    assert [line for line in logged if SECRET in json.dumps(line)] == []
    assert SECRET not in exported


def _caught(raiser: Callable[[], object]) -> BaseException:
    try:
        raiser()
    except BaseException as error:
        return error
    raise AssertionError


def test_exceptions_are_named_by_kind_and_place() -> None:
    def fail() -> None:
        try:
            int(SECRET)
        except ValueError:
            raise ExceptionGroup(SECRET, [KeyError(SECRET)]) from None

    text = "\n".join(described(_caught(fail)))
    assert text.startswith("ExceptionGroup\n") and "KeyError" in text and f"{__file__}:" in text and "in fail" in text
    assert SECRET not in text and "ValueError" not in text, "what `from None` hides is hidden"


def test_what_operators_need_is_told() -> None:
    with sqlite3.connect(":memory:") as connection:
        wrong = _caught(lambda: connection.execute(f"SELECT {SECRET}"))
    connection.close()
    first = [next(iter(described(each))) for each in (wrong, _caught(Path("/nowhere/x").read_bytes))]
    assert first == ["sqlite3.OperationalError: SQLITE_ERROR", "FileNotFoundError: No such file or directory"]
    assert next(iter(described(TowerError("no CUDA here")))).endswith("TowerError: no CUDA here")


def test_debug_logs_all_of_it(lines: Lines) -> None:
    try:
        raise ValueError(SECRET)
    except ValueError:
        record = logging.LogRecord("service", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    assert SECRET in JsonFormatter(quoting=True).format(record)
    assert SECRET not in JsonFormatter().format(record)


def test_of_other_libraries_one_line_is_logged() -> None:
    record = logging.LogRecord("asyncio", logging.ERROR, "", 0, f"never retrieved\nfuture: {SECRET}", (), None)
    assert json.loads(JsonFormatter().format(record))["message"] == "never retrieved"
