import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from fastapi import FastAPI

from service.__main__ import main
from service.commands import serve
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import serving

DEADLINE_S = 60.0


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if not name.startswith("ISTHMUS_")}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=DEADLINE_S, env=given | environment
    )


@contextmanager
def started(bundle: Path, store: Path, stderr: int | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    arguments = ["serve", "--bundle", str(bundle), "--store", str(store), "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "service", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said.startswith("listening on http://127.0.0.1:"), said
        yield process, said.removeprefix("listening on ").strip()
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def test_a_fresh_interpreter_loads_no_training_library() -> None:
    program = "import service.api.app, sys; print({'torch', 'transformers', 'training'} & set(sys.modules))"
    done = python("-c", program)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_serve_says_where_and_ends_well_when_told_to(bundle_dir: Path, tmp_path: Path) -> None:
    with started(bundle_dir, tmp_path / "store") as (process, url):
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving tiny, weights: commercial use not known, because of ")
        response = httpx.post(f"{url}/embed", json={"inputs": ["red"]}, trust_env=False)
        assert response.status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) in (0, -signal.SIGTERM)


def test_a_server_that_drains_works_on_and_can_be_hurried(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_DRAIN_S", "600")
    with started(bundle_dir, tmp_path / "store") as (process, url), httpx.Client(base_url=url, trust_env=False) as http:
        assert http.get("/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        for _ in range(2_000):  # each look is a request, and waits for nothing else
            if http.get("/readyz").json()["failing"] == ["accepting"]:
                break
        else:
            raise AssertionError("it does not say that it drains")
        last = http.post("/embed", json={"inputs": ["red"]})
        assert (last.status_code, last.headers["connection"]) == (200, "close")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) in (0, -signal.SIGTERM)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere what waits to be accepted is lost")
def test_at_the_end_whoever_is_in_is_answered(bundle_dir: Path, tmp_path: Path) -> None:
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with started(bundle_dir, tmp_path / "store") as (process, url), ExitStack() as open_ones:
        address = (urlsplit(url).hostname, urlsplit(url).port)
        idle, silent, beginning, never = (
            open_ones.enter_context(socket.create_connection(address, timeout=DEADLINE_S)) for _ in range(4)
        )
        idle.sendall(request)
        received = b""
        while not received.endswith(b'{"status":"ok"}'):
            received += idle.recv(65_536)
        beginning.sendall(request[:20])
        process.send_signal(signal.SIGTERM)
        assert idle.recv(65_536) == b"", "one that was answered and asks nothing is let go"
        beginning.sendall(request[20:])
        silent.sendall(request)
        for each in (beginning, silent):
            received = b"".join(iter(lambda each=each: each.recv(65_536), b""))
            assert received.startswith(b"HTTP/1.1 200")
            assert b"\r\nconnection: close\r\n" in received.lower()
        assert never.recv(65_536) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=DEADLINE_S)
        assert process.wait(DEADLINE_S) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--port", "http"], {}, "ISTHMUS_PORT is 'http'"),
        ([], {"ISTHMUS_DEVICE": "tpu"}, "ISTHMUS_DEVICE is 'tpu'"),
        (["--host", "203.0.113.1"], {}, "ISTHMUS_HOST '203.0.113.1'"),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_line(
    arguments: list[str],
    environment: dict[str, str],
    said: str,
    bundle_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("service.runtime.logs.configure", lambda level: None)  # whose stream ends with this test
    defaults = {"ISTHMUS_BUNDLE": str(bundle_dir), "ISTHMUS_STORE": str(tmp_path / "store"), "ISTHMUS_PORT": "0"}
    for name, value in (defaults | environment).items():
        monkeypatch.setenv(name, value)
    assert main(["serve", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def test_a_start_without_its_bundle_ends_with_one_line(tmp_path: Path) -> None:
    done = python("-m", "service", "serve", "--port", "0", "--bundle", str(tmp_path), "--store", str(tmp_path / "s"))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ") and f"{tmp_path} holds no readable manifest.json" in lines[0]


def test_check_verifies_a_bundle(bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(bundle_dir)]) == 0
    assert capsys.readouterr().out.count(": ok") == 3
    damaged = python("-m", "service", "check", str(tmp_path))
    assert damaged.returncode == 2
    assert damaged.stderr.startswith("error: ")


def test_a_reader_that_has_seen_enough_ends_a_command_in_silence() -> None:
    command = [sys.executable, "-m", "service", "openapi"]  # more than a pipe holds
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # with it, Python drops what a write leaves, and sees no error
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 1)


def test_openapi_needs_no_bundle_and_describes_every_body() -> None:
    done = python("-m", "service", "openapi", ISTHMUS_BUNDLE="/nonexistent")
    assert done.returncode == 0, done.stderr
    document = yaml.safe_load(done.stdout)

    def references(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(target := node.get("$ref"), str):
                yield target
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    def there(target: str) -> bool:
        _, _, kind, name = target.split("/")
        return name in document["components"][kind]

    dangling = {target for target in references(document) if not there(target)}
    assert dangling == set()
    assert {"/embed", "/search", "/classify", "/items", "/score", "/models", "/v1/embeddings"} <= set(document["paths"])
    for path in ("/embed", "/search", "/classify", "/items", "/score"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        assert set(content) == {"application/json", "multipart/form-data"}, path
    assert "x-definitions" not in done.stdout


def test_commands_answer_in_json(bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str | Path, code: int = 0) -> list[dict[str, Any]]:
        assert main([*map(str, arguments), "--json"]) == code
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    store, keys = tmp_path / "store", tmp_path / "keys.json"
    with serving(Settings(bundle=bundle_dir, store=store, device="cpu", threads=1)) as client:
        client.post("/items", json={"items": [{"id": "a", "text": "red"}]}).raise_for_status()
    capsys.readouterr()
    [checked] = told("check", bundle_dir)
    assert checked["ok"] and checked["name"] == "tiny" and "image" in checked["towers"]
    [checked] = told("check", store)
    assert checked["ok"] and all(check["ok"] and check["what"] for check in checked["checks"])
    [copied] = told("backup", store, tmp_path / "copy")
    assert copied == {"file": str(tmp_path / "copy"), "items": 1, "jobs": str(tmp_path / "copy.jobs")}
    [restored] = told("restore", tmp_path / "copy", tmp_path / "again")
    assert restored == {"store": str(tmp_path / "again"), "items": 1, "jobs": str(tmp_path / "again/jobs")}
    other = tiny_bundle.build(tmp_path / "other", seed=1).path
    [planned] = told("reembed", store, "--bundle", other, "--dry-run")
    assert (planned["embedded"], planned["left_out"]) == ({"text": 1}, {})
    [carried] = told("reembed", store, tmp_path / "new", "--bundle", other)
    assert (carried["store"], carried["embedded"]) == (str(tmp_path / "new"), {"text": 1})
    [made] = told("keys", "create", "--name", "n", "--scopes", "read", "--file", keys)
    [listed] = told("keys", "list", "--file", keys)
    assert made.pop("key") and made == listed and listed["scopes"] == ["read"] and listed["state"] == "valid"
    [gone] = told("keys", "revoke", made["id"], "--file", keys)
    assert (gone["id"], gone["state"]) == (made["id"], "revoked")


def test_what_cannot_be_listened_at_is_said_with_the_next_step(
    bundle_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.runtime.logs.configure", lambda level: None)  # whose stream ends with this test
    serve = ["serve", "--bundle", str(bundle_dir), "--store", str(tmp_path / "store")]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main([*serve, "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"ISTHMUS_PORT {port}: cannot listen there: Address already in use" in said and "--port" in said
    assert main([*serve, "--host", "192.0.2.1"]) == 2
    assert "Choose an address of this machine by --host" in capsys.readouterr().err


def resident() -> int:
    """Bytes of this process's memory."""
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


def test_memory_between_blocks_in_use_goes_back_to_the_system() -> None:
    library = ctypes.CDLL(None)
    library.malloc.restype = ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    blocks = [library.malloc(60_000) for _ in range(2_000)]  # 120 MB, each too small for pages of its own
    for block in blocks:
        ctypes.memset(block, 1, 60_000)
    for block in blocks[:-1]:
        library.free(block)
    before = resident()
    notify = serve.uvicorn_config(FastAPI(), Settings()).callback_notify
    assert notify is not None
    asyncio.run(notify())
    assert before - resident() > 80_000_000
    library.free(blocks[-1])
