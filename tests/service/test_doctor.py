"""`isthmus doctor` finds a machine that can serve, and each thing that may be lacking."""

import json
import os
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest

from service.commands.doctor import Check, examine
from service.settings import Settings
from service.store import schema
from tests import tiny_bundle
from tests.conftest import serving

ROOT = Path(__file__).parents[2]


def checked(bundle: Path, store: Path, port: int) -> dict[str, Check]:
    return {each.what: each for each in examine(str(bundle), str(store), str(port))}


def test_a_machine_that_can_serve(bundle_dir: Path, tmp_path: Path, free_port: int) -> None:
    found = checked(bundle_dir, tmp_path / "store", free_port)
    assert {name: each.state for name, each in found.items() if each.state == "missing"} == {}
    assert list(found) == [
        *(
            "python",
            "packages",
            "onnxruntime",
            "heic",
            "video",
            "settings",
            "bundle",
            "tower.image",
            "tower.audio",
            "tower.text",
        ),
        *("store", "redis", "port", "disk", "memory"),
    ]
    assert "CPUExecutionProvider" in found["tower.text"].detail
    assert not (tmp_path / "store").exists(), "looking changes nothing"


def test_every_lack_comes_with_the_next_step(bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_REDIS_URL", "redis://127.0.0.1:1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = checked(tmp_path / "nothing", tmp_path / "store", taken.getsockname()[1])
    lacking = {name: each for name, each in found.items() if each.state != "ok"}
    assert {name: each.state for name, each in lacking.items()} == {
        "bundle": "missing",
        "port": "missing",
        "redis": "note",
    }
    assert all(each.next_step for each in lacking.values())


def test_a_damaged_bundle(tmp_path: Path, free_port: int) -> None:
    bundle = tiny_bundle.build(tmp_path / "bundle").path
    graph = next(bundle.glob("*.onnx"))
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    found = checked(bundle, tmp_path / "store", free_port)["bundle"]
    assert found.state == "missing" and "damaged" in found.detail


def test_a_store_of_another_space_and_one_that_is_none(bundle_dir: Path, tmp_path: Path, free_port: int) -> None:
    other = tiny_bundle.build(tmp_path / "other", seed=1).path
    store = tmp_path / "store"
    with serving(Settings(bundle=other, store=store, device="cpu", threads=1)) as client:
        client.post("/items", json={"items": [{"id": "a", "text": "red"}]})
    assert checked(other, store, free_port)["store"].detail.endswith(f": 1 items of the space {_space(other)}")
    refused = checked(bundle_dir, store, free_port)["store"]
    assert refused.state == "missing" and f"another bundle (tiny, space {_space(other)})" in refused.detail
    assert f"reembed {store} --bundle {bundle_dir}" in str(refused.next_step)
    (store / schema.FILE).write_bytes(b"not a database, and longer than a header of one would be" * 100)
    assert checked(other, store, free_port)["store"].state == "missing"


def _space(bundle: Path) -> str:
    return str(json.loads((bundle / "manifest.json").read_text())["space"])


def test_a_server_that_is_there_already_is_recognised(client: httpx.Client, bundle_dir: Path, tmp_path: Path) -> None:
    found = checked(bundle_dir, tmp_path / "other", client.base_url.port or 0)["port"]
    assert (found.state, "already, and is ready" in found.detail) == ("note", True)


def test_a_redis_that_answers(
    bundle_dir: Path, tmp_path: Path, free_port: int, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_REDIS_URL", redis_url)
    assert checked(bundle_dir, tmp_path, free_port)["redis"].state == "ok"


def test_a_setting_that_makes_no_sense(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_THREADS", "many")
    *_, last = examine(str(bundle_dir))
    assert (last.what, last.state) == ("settings", "missing") and "ISTHMUS_THREADS" in last.detail


def test_missing_packages_are_named_and_nothing_else_is_needed_to_say_so(tmp_path: Path) -> None:
    # -S leaves out every installed package, as on a machine where none is.
    program = "from service.commands.doctor import examine; [print(e.what, e.state, e.detail) for e in examine()]"
    described = tmp_path / "isthmus-0.1.0.dist-info"
    described.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = "".join(f"Requires-Dist: {line}\n" for line in [*project["dependencies"], "ray[data]; extra == 'ray'"])
    (described / "METADATA").write_text(f"Metadata-Version: 2.4\nName: isthmus\nVersion: 0.1.0\n{needed}")
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].startswith("packages missing anyio, click, cryptography")
    assert "isthmus-client" in lines[1] and "ray" not in lines[1]
    assert "onnxruntime or onnxruntime-gpu" in lines[1]
    assert lines[-1].startswith("the rest missing")
