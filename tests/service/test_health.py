import asyncio
import logging
from pathlib import Path

import httpx
import pytest

from service.api.app import create_app, open_parts
from service.engine.towers import Arrays
from service.settings import Settings
from service.store.errors import StoreError
from tests import tiny_bundle
from tests.conftest import redis_server, served, serving


def test_a_server_that_works_is_alive_and_ready(shared_client: httpx.Client) -> None:
    assert shared_client.get("/healthz").json() == {"status": "ok"}
    response = shared_client.get("/readyz")
    assert response.status_code == 200
    assert response.json()["status"] == "ready"
    towers = {"tower.image", "tower.audio", "tower.text"}
    assert set(response.json()["checks"]) == towers | {"workers", "store", "jobs", "accepting", "disk"}
    assert response.json()["failing"] == []
    assert response.json()["providers"] == dict.fromkeys(
        ("tower.image", "tower.audio", "tower.text"), "CPUExecutionProvider"
    )


def test_models_describes_the_bundle(shared_client: httpx.Client) -> None:
    (model,) = shared_client.get("/models").json()["models"]
    assert model["name"] == "tiny"
    assert {modality: tower["provider"] for modality, tower in model["towers"].items()} == dict.fromkeys(
        ("image", "audio", "text"), "CPUExecutionProvider"
    )
    assert model["evaluation"] == {"test": True}


def test_readiness_names_what_is_broken(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        provider = "none"
        precision = "fp32"
        choice = None

        def run(self, arrays: Arrays) -> None:
            raise RuntimeError("secret detail")

    async def main() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        parts = await asyncio.to_thread(open_parts, settings)
        parts.models[0].towers["audio"] = Broken()
        app = create_app(settings, parts)
        async with app.router.lifespan_context(app) as state:

            async def with_state(scope, receive, send):  # a server's part of the lifespan protocol
                await app(scope | {"state": dict(state)}, receive, send)

            transport = httpx.ASGITransport(with_state)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                broken = await client.get("/readyz")
                alive = await client.get("/healthz")
                await state["services"].close()
                return broken, alive, await client.get("/readyz")

    with caplog.at_level(logging.CRITICAL):
        broken, alive, closed = asyncio.run(main())
    assert broken.status_code == 503
    assert broken.json()["checks"] == {
        "tower.image": True,
        "tower.audio": False,
        "tower.text": True,
        "workers": True,
        "store": True,
        "jobs": True,
        "accepting": True,
        "disk": True,
    }
    assert broken.json()["failing"] == ["tower.audio"]
    assert "secret" not in broken.text
    assert alive.status_code == 200
    assert closed.json()["checks"]["workers"] is False


def test_a_store_filled_in_another_space_stops_the_start(settings: Settings, tmp_path: Path) -> None:
    with serving(settings) as client:
        response = client.post("/items", json={"items": [{"id": "a", "text": "red"}]})
        assert response.status_code == 200, response.text
    other = tiny_bundle.build(tmp_path / "other", seed=1)
    with pytest.raises(StoreError):
        open_parts(settings.model_copy(update={"bundle": other.path}))


@pytest.mark.usefixtures("patient_redis")
def test_without_redis_it_is_degraded_and_goes_on(settings: Settings, tmp_path: Path, free_port: int) -> None:
    url = f"redis://127.0.0.1:{free_port}/0"
    with serving(settings.model_copy(update={"redis_url": url})) as client:
        away = client.get("/readyz")
        assert (away.status_code, away.json()["status"], away.json()["failing"]) == (200, "degraded", ["redis"])
        assert 'isthmus_check{check="redis"} 0.0' in client.get("/metrics").text
        assert client.post("/embed", json={"inputs": ["red"]}).status_code == 200
        with redis_server(tmp_path, free_port):
            assert client.get("/readyz").json()["status"] == "ready"
            assert 'isthmus_check{check="redis"} 1.0' in client.get("/metrics").text


def test_a_disk_with_too_little_room_is_named(settings: Settings) -> None:
    with serving(settings.model_copy(update={"min_free_bytes": 2**62})) as client:
        found = client.get("/readyz")
    assert (found.status_code, found.json()["status"], found.json()["failing"]) == (200, "degraded", ["disk"])


def test_a_server_that_is_about_to_end_says_so_and_still_answers(settings: Settings) -> None:
    with served(settings) as (server, client):
        assert "connection" not in client.get("/healthz").headers
        server.state.draining.set()
        draining = client.get("/readyz")
        assert (draining.status_code, draining.json()["failing"]) == (503, ["accepting"])
        last = client.post("/embed", json={"inputs": ["red"]})
        assert (last.status_code, last.headers["connection"]) == (200, "close")
