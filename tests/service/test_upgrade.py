"""A store whose vectors are mapped into another bundle's space: `upgrade`."""

import io
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from service.__main__ import main
from service.contract.vectors import l2_normalise
from service.retrieval.mapping import Adapter, kept
from service.store import Entry, Moment, upkeep
from tests import tiny_bundle
from tests.conftest import serving
from tests.service.media import b64
from tests.service.test_reembed import held, in_store, item, space_of, write

COUNT, AT_HAND = 240, 3


@pytest.fixture(autouse=True)
def _few_pairs(monkeypatch):
    """Learn from few texts: 3,000 take 8 seconds, and the time grows with the cube of their number."""
    monkeypatch.setattr("service.retrieval.upgrading.MOST_PAIRS", 600)


def picture(number):
    """Four colours by chance, which the tiny bundles tell apart."""
    colours = np.random.default_rng(number).integers(0, 256, (2, 2, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(colours.repeat(20, 0).repeat(20, 1)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_bundle.build(tmp_path_factory.mktemp("bundles") / "other", name="successor", seed=1).path


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """The files of every third picture."""
    folder = tmp_path_factory.mktemp("media")
    for number in range(0, COUNT, AT_HAND):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


@pytest.fixture
def store(settings):
    """Pictures, texts, a vector and a film whose picture it is, as a server keeps them without previews."""
    with serving(settings.model_copy(update={"previews": False})) as client:
        for start in range(0, COUNT, 60):
            pictures = [{"id": f"{n}.png", "image": b64(picture(n))} for n in range(start, start + 60)]
            assert client.post("/items", json={"items": pictures}).is_success
        rest = [{"id": "words", "text": "a red dog"}, {"id": "given", "vector": [1.0] * tiny_bundle.DIMENSIONS}]
        assert client.post("/items", json={"items": rest}).is_success
    vector = held(settings.store, settings.bundle)["1.png"].vector
    moment = Moment("image", 0.0, 1.0, vector)
    write(settings.store, settings.bundle, Entry("default", "film", "video", {}, vector, moments=[moment]))
    return settings.store


def unit(*shape, seed=0):
    return l2_normalise(np.random.default_rng(seed).standard_normal(shape))


def test_an_adapter_tells_how_far_it_is_off_and_is_tested_on_what_it_did_not_learn():
    hidden, random = unit(900, 6), np.random.default_rng(1)
    old, new = (l2_normalise(np.tanh(2 * hidden @ random.standard_normal((6, width)))) for width in (24, 32))
    new[::2] = l2_normalise(new[::2] + 0.05 * random.standard_normal((450, 32)))
    adapter = Adapter(old[:300], new[:300])
    mapped, told = adapter(old[300:])
    errors = 1 - (mapped * new[300:]).sum(axis=1)
    assert mapped.shape == (600, 32) and np.allclose(np.linalg.norm(mapped, axis=1), 1, atol=1e-6)
    assert errors.mean() < 0.1 and adapter.errors.mean() == pytest.approx(errors.mean(), rel=0.25)
    assert told.mean() == pytest.approx(errors.mean(), rel=0.25)
    apart = unit(200, 24, seed=3)
    assert adapter(apart)[1].mean() > 2 * told.mean(), "nothing like them was learned from"


def test_a_map_of_texts_helps_where_pairs_are_few_and_is_left_out_where_it_misleads():
    turn, old = np.random.default_rng(1).standard_normal((24, 32)), unit(1_000, 24)
    new = l2_normalise(old @ turn + unit(1, 32, seed=5))
    texts = l2_normalise(unit(500, 24, seed=2) + unit(1, 24, seed=3))
    few = old[:40], new[:40]
    adapters = [Adapter(*few, Adapter(texts, other)) for other in (l2_normalise(texts @ turn), unit(500, 32, seed=7))]
    alone, helped, misled = (1 - (a(old[40:])[0] * new[40:]).sum(axis=1).mean() for a in (Adapter(*few), *adapters))
    assert adapters[0].texts_share == 0.5 and adapters[1].texts_share == 0
    assert helped < 0.8 * alone and misled == alone
    assert adapters[0].errors.mean() == pytest.approx(helped, rel=0.25)


def test_the_share_of_answers_that_stay():
    real, queries = np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32)[:4]
    assert kept(queries, real, real, top=1) == kept(queries, real[:1], real[:1]) == 1.0
    assert kept(queries, real, real[[0, 1, 3, 2, 4, 5, 6, 7]], top=1) == 0.5
    assert kept(queries, real, real[:, ::-1], queries[:, ::-1], top=1) == 1.0, "as in the other space"


def test_a_store_is_mapped_and_what_is_at_hand_is_embedded(settings, store, other, media, capsys):
    before = held(store, settings.bundle)
    given = ["--to", str(other), "--from", str(settings.bundle), "--media", str(media), "--json"]
    assert main(["upgrade", str(store), *given]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["embedded"] == {"file": COUNT / AT_HAND, "text": 1, "mapped": COUNT - COUNT / AT_HAND + 1}
    assert told["left_out"] == {"vector: it was given as a vector, of no known modality": 1}
    assert told["learned"]["image"]["pairs"] == 80 and told["learned"]["image"]["error"] < 0.1
    assert 0 <= told["learned"]["image"]["share_of_texts"] <= 0.5
    after = held(store, other)
    assert list(after) == [id for id in before if id != "given"], "in the same order"
    assert all(after[id].created == before[id].created for id in after)
    assert all(good for good, _ in upkeep.check(store))
    with serving(settings.model_copy(update={"bundle": other})) as client:
        embedded = client.post("/embed", json={"inputs": [{"image": b64(picture(n))} for n in range(60)]}).json()
        real = np.array([one["embedding"] for one in embedded["embeddings"]], np.float32)
        cosines = (np.array([after[f"{n}.png"].vector for n in range(60)]) * real).sum(axis=1)
        assert cosines[::AT_HAND].min() > 0.9999 and cosines.mean() > 0.9
        preview = client.get("/items/1.png", params={"include": "preview"}).json()["preview"]
        assert list(preview) == ["mapped"] and 0 <= preview["mapped"] < 0.3
        assert client.get("/items/0.png", params={"include": "preview"}).json()["preview"] is None
        film = client.get("/items/film", params={"include": "preview"}).json()["preview"]
        assert film["mapped"] == pytest.approx(preview["mapped"])
        query = {"query": {"image": b64(picture(1))}, "top_k": 1, "modalities": ["video"]}
        hits = client.post("/search", json=query).json()["results"]
        assert hits[0]["id"] == "film" and hits[0]["moment"]["end"] == 1.0

    for number in range(1, COUNT, AT_HAND):
        (media / f"{number}.png").write_bytes(picture(number))
    aside = next(store.glob("old.*"))
    arguments = ["reembed", str(aside), str(store), "--bundle", str(other), "--media", str(media)]
    assert main(arguments) == 0
    assert "80 items embedded again (80 from files), 162 were there" in capsys.readouterr().out
    for number in range(1, COUNT, AT_HAND):
        (media / f"{number}.png").unlink()
    with serving(settings.model_copy(update={"bundle": other})) as client:
        assert client.get("/items/1.png", params={"include": "preview"}).json()["preview"] is None


@pytest.mark.parametrize("beside", [True, pytest.param(False, marks=pytest.mark.full)], ids=["beside", "in place"])
def test_a_killed_one_goes_on_and_nothing_is_lost(settings, store, other, media, tmp_path, beside):
    new = tmp_path / "new" if beside else store
    filling = new if beside else store / f"new.{space_of(other)}"
    command = [sys.executable, "-m", "service", "upgrade", str(store), *([str(new)] if beside else [])]
    command += ["--to", str(other), "--media", str(media), "--json"]
    before = held(store, settings.bundle)
    for least in (64, 80):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            size = 16 + least * (8 + 8 * tiny_bundle.DIMENSIONS)
            while process.poll() is None and not any(
                drawn.stat().st_size >= size for drawn in filling.glob("pairs.*.image")
            ):
                time.sleep(0.002)
            process.kill()
        assert list(held(store, settings.bundle)) == list(before) or list(held(store, other)) == list(before)[:-2]
        for drawn in filling.glob("pairs.*.image"):
            with drawn.open("ab") as torn:
                torn.write(b"a record that is not whole")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = held(new, other)
    assert list(after) == [id for id in before if id != "given"], done.stdout
    assert all((one.created, one.updated) == (before[id].created, before[id].updated) for id, one in after.items())
    assert all(good for good, _ in upkeep.check(new))
    if beside:
        write(store, settings.bundle, item("late.png", modality="image"))
        again = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert again["embedded"] == {"mapped": 1} and again["already"] == len(after), "by what was learned before"


def test_without_media_it_learns_from_texts_and_says_what_that_is_worth(settings, store, other, tmp_path, capsys):
    upgrade = ["upgrade", str(store), "--to", str(other)]
    rows = list(held(store, settings.bundle))
    assert main(upgrade) == 2
    assert "240 items of the modality image: media of fewer than 20 are at hand" in capsys.readouterr().err
    assert main([*upgrade, "--from", str(other)]) == 2
    assert "it is not the bundle that filled the store" in capsys.readouterr().err
    assert main([*upgrade, "--from", str(settings.bundle), "--least", "1"]) == 2
    assert "of the first ten answers to everyday words" in capsys.readouterr().err
    assert main([*upgrade, "--share", "2"]) == 2
    assert "--share 2: give a number from 0 to 1" in capsys.readouterr().err
    assert list(held(store, settings.bundle)) == rows
    assert main([*upgrade, "--from", str(settings.bundle), "--least", "0.01"]) == 0
    said = capsys.readouterr().out
    assert "241 items mapped, 1 items embedded again (1 from texts)" in said
    assert "tested on no item of this kind" in said


def test_where_nothing_can_be_learned_and_that_is_allowed_the_items_stay(settings, store, other, capsys):
    assert main(["upgrade", str(store), "--to", str(other), "--least", "0"]) == 0
    assert "image: there is nothing to learn an adapter from" in capsys.readouterr().out
    assert list(held(store, other)) == ["words"]
    old = in_store(next(store.glob("old.*")), settings.bundle, lambda s: s.holds("default", "1.png"))
    assert old
