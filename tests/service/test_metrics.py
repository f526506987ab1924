"""/metrics: every stage is in it, and no client can make it grow."""

import asyncio
import re
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.middleware import Middleware

from service.api.middleware import Context
from service.runtime.metrics import Metrics
from service.settings import Settings
from tests.conftest import serving


def families(client: httpx.Client) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Samples by name and sorted labels."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_every_stage_of_a_request_is_measured(
    settings: Settings, png: Callable[..., bytes], wav: Callable[..., bytes]
) -> None:
    with serving(settings) as client:
        client.put("/collections/default", json={"keywords": ["title"]})
        items = [{"id": "a", "text": "red", "metadata": {"title": "red"}}]
        client.post("/items", json={"items": items}).raise_for_status()
        client.post("/items", files=[("file", ("b", png())), ("file", ("c", wav()))]).raise_for_status()
        client.post("/search", json={"query": "red", "keywords": {"query": "red"}}).raise_for_status()
        client.post("/classify", json={"inputs": ["red"], "labels": ["red", "blue"]}).raise_for_status()
        client.post("/embed", json={"inputs": [""]})
        client.get("/readyz")
        found = families(client)
    stages = {dict(labels)["stage"] for labels in found["isthmus_stage_seconds_count"]}
    assert stages == {"read", "cache", "decode", "queue", "model", "search", "index", "keywords", "write", "classify"}
    for modality in ("image", "audio", "text"):
        tower = (("modality", modality), ("model", "tiny"))
        for name in ("decode_seconds", "queue_seconds", "batch_items", "batch_seconds"):
            assert found[f"isthmus_{name}_count"][tower] >= 1, (name, modality)
        assert found["isthmus_queue_capacity"][tower] == settings.queue_inputs
        assert found["isthmus_check"][(("check", f"tower.{modality}"),)] == 1
    assert found["isthmus_rejections_total"][(("reason", "invalid_input"),)] == 1
    assert found["isthmus_requests_in_flight"][()] == 1, "the one that asks"
    assert found["isthmus_cache_bytes"][(("model", "tiny"),)] > 0
    assert found["isthmus_store_bytes"][()] > 0
    assert found["isthmus_store_free_bytes"][()] > 0
    assert found["process_resident_memory_bytes"][()] > 0
    [build] = found["isthmus_build_info"]
    assert {"version", "model", "space"} == dict(build).keys()


@pytest.mark.parametrize("server", ["httptools", "any"])
def test_what_a_client_writes_makes_no_new_label(settings: Settings, server: str) -> None:
    if server == "httptools":
        with serving(settings) as client:
            before = set(_series(client.get("/metrics").text))
            for number in range(20):
                client.get(f"/nothing-{number}", params={f"a{number}": "b"}, headers={f"X-{number}": "c"})
                client.get(f"/items/{number}")
                client.put(f"/label-sets/set-{number}", json={"labels": ["a"]})
                client.put(f"/collections/collection-{number}", json={})
                client.post("/embed", json={"inputs": ["a"], "model": f"model-{number}"})
            after = set(_series(client.get("/metrics").text))
    else:  # uvicorn's other parser takes any word for a method
        metrics = Metrics()
        app = FastAPI(middleware=[Middleware(Context, metrics=metrics)])

        async def ask() -> None:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
                await client.request("GET", "/")
                for number in range(20):
                    await client.request(f"METHOD{number}", "/")

        before = set(_series(metrics.render().decode()))
        asyncio.run(ask())
        after = set(_series(metrics.render().decode()))
    fresh = {re.sub(r'le="[^"]*"', "", each) for each in after - before}
    assert 1 <= len(fresh) < 80
    assert not any(re.search(r"(nothing|set|collection|model|METHOD)-?\d", each) for each in fresh)


def _series(text: str) -> list[str]:
    return [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
