"""A store that another bundle filled: what the start says of it, and the command that carries it over."""

import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import closing

import pytest

from service.__main__ import main
from service.contract.bundle import read_bundle
from service.jobs.ledger import FILE as LEDGER
from service.settings import Settings
from service.store import SqliteStore, carry_over, schema, upkeep
from tests import tiny_bundle
from tests.conftest import serving
from tests.service.media import b64
from tests.service.test_items_routes import upsert
from tests.service.test_main import python
from tests.service.test_serving import until


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_bundle.build(tmp_path_factory.mktemp("bundles") / "other", name="successor", seed=1).path


@pytest.fixture
def media(tmp_path, png, wav):
    folder = tmp_path / "media"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "red.png").write_bytes(png("red"))
    (folder / "tone.wav").write_bytes(wav())
    return folder


def fill(client, png, wav):
    client.put("/collections/words", json={"keywords": ["title"], "index": "hnsw"})
    client.put("/collections/empty", json={})
    upsert(
        client,
        {"id": "words", "text": "a red dog", "metadata": {"title": "Dogs"}, "collection": "words"},
        {"id": "pictures/red.png", "image": b64(png("red")), "metadata": {"n": 1}},
        {"id": "tone.wav", "audio": b64(wav())},
        {"id": "given", "vector": [1.0] * tiny_bundle.DIMENSIONS},
        {"id": "gone.png", "image": b64(png("blue"))},
    )
    assert client.put("/label-sets/colours", json={"labels": ["red", "blue"]}).is_success


def served_by(bundle, store, **more):
    return serving(Settings(bundle=bundle, store=store, device="cpu", lanes=1, threads=1, **more))


def space_of(bundle):
    return read_bundle(bundle).manifest.space


def score(client, query, id, **more):
    hits = client.post("/search", json={"query": query, **more}).json()["results"]
    return next(hit["score"] for hit in hits if hit["id"] == id)


def test_a_store_of_another_bundle_is_refused_and_the_one_command_carries_it_over(
    settings, other, png, wav, tmp_path, monkeypatch
):
    settings = settings.model_copy(update={"previews": True})
    with serving(settings) as client:
        fill(client, png, wav)
        lines = '{"id": "from a job", "text": "a green cat", "collection": "words"}\n'
        job = client.post("/jobs", content=lines, headers={"content-type": "application/jsonl"}).json()["id"]
        until(lambda: client.get(f"/jobs/{job}").json()["state"] == "done")
        before = client.get("/items").json()["items"]
    rows = (settings.store / schema.FILE).read_bytes()

    refused = python("-m", "service", "serve", "--bundle", str(other), "--store", str(settings.store), "--port", "0")
    assert refused.returncode == 2
    said = refused.stderr
    assert f"by the bundle tiny, in the space {space_of(settings.bundle)}" in said
    assert f"the bundle successor is of the space {space_of(other)}" in said
    assert "Nothing in it was changed or deleted" in said
    assert (settings.store / schema.FILE).read_bytes() == rows
    [line] = [line.strip() for line in said.splitlines() if line.startswith("    ")]

    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)  # as it is pasted
    assert done.returncode == 0, done.stderr
    aside = settings.store / f"old.{space_of(settings.bundle)}"
    assert "5 items embedded again (2 from texts, 3 from previews, smaller than their files were)" in done.stdout
    assert "1  vector: it was given as a vector, such as 'given'" in done.stdout and str(aside) in done.stdout

    with served_by(other, settings.store, previews=True) as client:
        items = client.get("/items").json()["items"]
        assert items == [item for item in before if item["id"] != "given"], "ids, metadata, dates, and their order"
        assert score(client, "red", "pictures/red.png") > 0.9 and score(client, "blue", "gone.png") > 0.9
        assert client.get("/items/gone.png?include=preview").json()["preview"]["embedded"] is True
        assert client.get("/previews/tone.wav").headers["content-type"] == "audio/mpeg"
        assert {each["name"] for each in client.get("/collections").json()["collections"]} >= {"words", "empty"}
        assert client.get("/collections/words").json()["index"] == "hnsw"
        found = client.post("/search", json={"query": "Dogs", "mode": "keyword", "collection": "words"}).json()
        assert [hit["id"] for hit in found["results"]] == ["words"]
        best = client.post("/classify", json={"inputs": ["a blue"], "label_set": "colours"}).json()
        assert best["results"][0]["labels"][0]["label"] == "blue"
        assert client.get(f"/jobs/{job}").json()["state"] == "done"
    assert not list(settings.store.glob("new.*")) and all(good for good, _ in upkeep.check(settings.store))
    with served_by(settings.bundle, aside) as client:  # the old one is a store
        assert client.get("/items").json()["items"] == before

    assert main(shlex.split(line)[3:]) == 0, "once more: nothing to do"
