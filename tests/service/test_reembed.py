"""A store that another bundle filled: what the start says of it, and the one command that carries it over."""

import asyncio
import json
import os
import shlex
import shutil
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from service.__main__ import main
from service.contract.audio import AudioLimits
from service.contract.bundle import read_bundle
from service.contract.images import ImageLimits
from service.engine.previews import preview_audio, preview_image
from service.retrieval import reembedding as reembed
from service.store import Entry, IndexRequest, SqliteStore, carry_over, schema, upkeep
from tests import tiny_bundle
from tests.conftest import serving
from tests.service.media import b64
from tests.service.stores import in_sqlite
from tests.service.test_items_routes import upsert
from tests.service.test_main import python
from tests.service.test_serving import until

ANY = np.eye(tiny_bundle.DIMENSIONS, dtype=np.float32)[0]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_bundle.build(tmp_path_factory.mktemp("bundles") / "other", name="successor", seed=1).path


def space_of(bundle):
    return read_bundle(bundle).manifest.space


def in_store(path, bundle, use):
    return in_sqlite(path, use, read_bundle(bundle).manifest)


def write(path, bundle, *entries):
    in_store(path, bundle, lambda store: store.upsert(entries))


def held(path, bundle):
    """Return every item by its id."""

    async def read(store):
        items, _ = await store.page(None, None, None, 1_000)
        return {item.id: await store.get(item.collection, item.id, with_vector=True) for item in items}

    return in_store(path, bundle, read)


def item(id, text=None, modality="text", preview=None, **metadata):
    return Entry("default", id, modality, metadata, ANY, text=text, preview=preview)


@pytest.fixture
def store(bundle_dir, tmp_path):
    """Fill a store of the tiny bundle's space: three texts, and what has no original."""
    path = tmp_path / "store"
    write(path, bundle_dir, *(item(id, text=id) for id in ("red", "green", "blue")), item("given", modality="vector"))
    return path


@pytest.fixture
def carry(store, other):
    def run(*more):
        return main(["reembed", str(store), *map(str, more), "--bundle", str(other)])

    return run


def test_the_start_names_the_one_command_that_carries_a_store_over(settings, other, png, wav, capsys):
    settings = settings.model_copy(update={"previews": True})
    with serving(settings) as client:
        client.put("/collections/words", json={"keywords": ["title"], "index": "hnsw"})
        client.put("/collections/empty", json={})
        upsert(
            client,
            {"id": "words", "text": "a red dog", "metadata": {"title": "Dogs"}, "collection": "words"},
            {"id": "red.png", "image": b64(png("red")), "metadata": {"n": 1}},
            {"id": "tone.wav", "audio": b64(wav())},
            {"id": "given", "vector": [1.0] * tiny_bundle.DIMENSIONS},
            {"id": "blue.png", "image": b64(png("blue"))},
        )
        assert client.put("/label-sets/colours", json={"labels": ["red", "blue"]}).is_success
        lines = '{"id": "from a job", "text": "a green cat", "collection": "words"}\n'
        job = client.post("/jobs", content=lines, headers={"content-type": "application/jsonl"}).json()["id"]
        until(lambda: client.get(f"/jobs/{job}").json()["state"] == "done")
        before = client.get("/items").json()["items"]
    rows = (settings.store / schema.FILE).read_bytes()

    refused = python("-m", "service", "serve", "--bundle", str(other), "--store", str(settings.store), "--port", "0")
    assert refused.returncode == 2
    assert f"was filled by another bundle (tiny, space {space_of(settings.bundle)})" in refused.stderr
    assert f"This bundle (successor, space {space_of(other)})" in refused.stderr
    assert "Nothing in it was changed or deleted" in refused.stderr
    assert (settings.store / schema.FILE).read_bytes() == rows
    [line] = [line for line in refused.stderr.splitlines() if line.startswith("    ")]
    program, *arguments = shlex.split(line)
    assert Path(program).samefile(sys.executable) and arguments[:2] == ["-m", "service"]

    assert main(arguments[2:]) == 0
    said = capsys.readouterr().out
    aside = settings.store / f"old.{space_of(settings.bundle)}"
    assert "5 items embedded again (2 from texts, 3 from previews" in said
    assert "1  vector: it was given as a vector, such as 'given'" in said and f"kept in {aside}" in said
    assert json.loads((aside / reembed.LEFT_OUT).read_text())["id"] == "given"

    with serving(settings.model_copy(update={"bundle": other})) as client:
        items = client.get("/items").json()["items"]
        assert items == [item for item in before if item["id"] != "given"], "ids, metadata, dates, and their order"
        hits = client.post("/search", json={"query": "red", "modalities": ["image"]}).json()["results"]
        assert [hit["id"] for hit in hits] == ["red.png", "blue.png"] and hits[0]["score"] > 0.9
        assert client.get("/items/red.png?include=preview").json()["preview"]["embedded"] is True
        assert client.get("/previews/tone.wav").headers["content-type"] == "audio/mpeg"
        words = client.get("/collections/words").json()
        assert (words["index"], words["keywords"], words["count"]) == ("hnsw", ["title"], 2)
        assert client.get("/collections/empty").json()["count"] == 0
        best = client.post("/classify", json={"inputs": ["blue"], "label_set": "colours"}).json()["results"]
        assert best[0]["labels"][0]["label"] == "blue"
        assert client.get(f"/jobs/{job}").json()["state"] == "done"
    assert not list(settings.store.glob("new.*")) and all(good for good, _ in upkeep.check(settings.store))
    assert list(held(aside, settings.bundle)) == [item["id"] for item in before], "a store that can be served"

    assert main(arguments[2:]) == 0
    assert "there is nothing to do" in capsys.readouterr().out


def test_what_was_interrupted_goes_on_and_until_then_the_store_is_as_it_was(
    store, bundle_dir, other, carry, monkeypatch, capsys
):
    upserted = []

    async def fails_at_the_third(self, entries, upsert=SqliteStore.upsert):
        upserted.extend(entry.id for entry in entries)
        if len(upserted) == 3:
            raise OSError("no space left")
        await upsert(self, entries)

    before = list(held(store, bundle_dir))
    with monkeypatch.context() as patched:
        patched.setattr(reembed, "_BATCH", 1)
        patched.setattr(SqliteStore, "upsert", fails_at_the_third)
        assert carry() == 2
    assert "no space left. What is embedded is kept: the same command goes on" in capsys.readouterr().err
    assert list(held(store, bundle_dir)) == before
    assert carry() == 0
    assert "1 items embedded again (1 from texts), 2 were there" in capsys.readouterr().out
    vectors = {id: item.vector for id, item in held(store, other).items()}
    assert list(vectors) == ["red", "green", "blue"] and abs(vectors["red"] @ vectors["blue"]) < 0.99


def test_what_is_changed_or_deleted_after_an_interruption_counts(store, bundle_dir, other, carry, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(carry_over, "put_in_place", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            carry()
    assert (store / f"new.{space_of(other)}" / schema.FILE).is_file()
    in_store(store, bundle_dir, lambda store: store.delete("default", ["red"]))
    write(store, bundle_dir, item("green", text="blue"))
    assert carry() == 0
    vectors = {id: item.vector for id, item in held(store, other).items()}
    assert list(vectors) == ["green", "blue"] and vectors["green"] @ vectors["blue"] == pytest.approx(1)


def test_a_store_that_is_open_or_read_is_not_replaced(store, bundle_dir, other, carry, monkeypatch, capsys):
    async def busy(_):
        return await asyncio.to_thread(carry)

    assert in_store(store, bundle_dir, busy) == 2
    assert "is open in another process: stop that server first" in capsys.readouterr().err
    monkeypatch.setattr(carry_over, "_BUSY_S", 0.05)
    reader = schema.connect(store / schema.FILE, read_only=True)  # as a backup at work
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM items").fetchone()
    assert carry() == 2
    assert "which is as it was" in capsys.readouterr().err
    reader.close()
    assert len(held(store, bundle_dir)) == 4
    assert carry() == 0 and len(held(store, other)) == 3


def test_an_older_store_that_was_put_aside_is_not_overwritten(store, bundle_dir, other, carry, monkeypatch):
    def no_links(*_):
        raise OSError("not supported")

    first = store / f"old.{space_of(bundle_dir)}"
    write(first, bundle_dir, item("older", text="red"))
    monkeypatch.setattr("os.link", no_links)
    assert carry() == 0
    assert list(held(first, bundle_dir)) == ["older"]
    assert list(held(first.with_name(f"{first.name}.2"), bundle_dir)) == ["red", "green", "blue", "given"]


def test_a_store_of_which_nothing_can_be_carried_over_stays(bundle_dir, tmp_path, other, carry, store, capsys):
    in_store(store, bundle_dir, lambda store: store.delete("default", ["red", "green", "blue"]))
    assert carry() == 2
    assert "nothing in" in (said := capsys.readouterr().err) and "1 × vector: it was given as a vector" in said
    assert list(held(store, bundle_dir)) == ["given"]


def test_it_may_be_killed_at_any_moment_of_the_exchange(store, bundle_dir, other, tmp_path, monkeypatch):
    """Whatever the last step was: the store is the old one or the new one, and the same call ends the exchange."""

    class Killed(BaseException):
        pass

    def killing(function, place):
        def step(*arguments, **options):
            steps[0] += 1
            if steps[0] == place:
                raise Killed
            return function(*arguments, **options)

        return step

    space = space_of(bundle_dir)
    write(store / "new.x", other, item("new", text="red"))
    before = list(held(store, bundle_dir))
    for place in range(1, 100):
        copy, steps = shutil.copytree(store, tmp_path / f"{place}"), [0]
        with monkeypatch.context() as patched:
            for name in ("link", "replace", "rename", "fsync", "mkdir"):
                patched.setattr(f"os.{name}", killing(getattr(os, name), place))
            try:
                carry_over.put_in_place(copy, copy / "new.x", space, [])
                break
            except Killed:
                pass
        with closing(schema.connect(copy / schema.FILE, read_only=True)) as connection:
            replaced = schema.meta(connection, "space") != space
        if replaced:
            assert list(held(copy, other)) == ["new"]
        else:
            assert list(held(copy, bundle_dir)) == before and list(held(copy / "new.x", other)) == ["new"]
            carry_over.put_in_place(copy, copy / "new.x", space, [])
        assert list(held(copy / f"old.{space}", bundle_dir)) == before
        assert not (copy / f"old.{space}.2").exists()
    assert place > 5 and not (copy / "new.x").exists()


class TestMedia:
    @pytest.fixture
    def store(self, bundle_dir, tmp_path, png, wav):
        """Items with a file, a preview, both, neither, and a file that is another one by now."""
        red, blue = (preview_image(png(colour), ImageLimits()) for colour in ("red", "blue"))
        long = preview_audio(wav(seconds=21.0), AudioLimits())
        (tmp_path / "media" / "sub").mkdir(parents=True)
        for name in ("both", "file", "sub/changed", "kind"):
            (tmp_path / "media" / name).write_bytes(wav() if name == "kind" else png("red"))
        (tmp_path / "outside").write_bytes(png("red"))
        write(
            tmp_path / "store",
            bundle_dir,
            item("both", modality="image", preview=blue),
            item("file", modality="image"),
            item("preview", modality="image", preview=blue),
            item("sub/changed", modality="image", preview=blue, file={"bytes": 1, "modified": 1, "sha256": "0"}),
            item("kind", modality="image"),
            item("../outside", modality="image"),
            item("long", modality="audio", preview=long),
            item("mixed up", modality="audio", preview=red),
        )
        return tmp_path / "store"

    def test_files_come_before_previews_and_previews_before_nothing(self, store, other, carry, tmp_path, png, capsys):
        assert carry("--media", tmp_path / "nowhere") == 2
        assert "is no folder" in capsys.readouterr().err
        assert carry("--media", tmp_path / "media", "--dry-run") == 0
        foreseen = capsys.readouterr().out
        assert "5 items can be embedded again" in foreseen and not list(store.glob("new.*"))
        assert carry("--media", tmp_path / "media") == 0
        said = capsys.readouterr().out
        for line in (
            "2 from files, 3 from previews, smaller than their files were, of 1 sounds only the beginning",
            "its file is not in",
            "image: its file is of another kind, and no preview of it is kept, such as 'kind'",
            "'../outside'",
            "'mixed up'",
        ):
            assert line in said and line in foreseen
        items = held(store, other)
        assert list(items) == ["both", "file", "preview", "sub/changed", "long"]
        assert items["both"].vector @ items["file"].vector == pytest.approx(1), "red, as the file"
        assert items["preview"].vector @ items["sub/changed"].vector == pytest.approx(1), "blue, as the preview"

        aside = next(store.glob("old.*"))
        write(store, other, item("file", text="a newer one"))
        (tmp_path / "media" / "preview").write_bytes(png("green"))
        (tmp_path / "media" / "kind").write_bytes(png("green"))
        later = [str(aside), str(store), "--bundle", str(other), "--media", str(tmp_path / "media")]
        assert main(["reembed", *later]) == 0
        assert "2 items embedded again (2 from files), 4 were there" in capsys.readouterr().out
        again = held(store, other)
        assert again["kind"].vector @ again["preview"].vector == pytest.approx(1), "green"
        assert again["file"].modality == "text", "what is newer stays"

    def test_paths_in_the_metadata_stay_inside_the_folder(self, bundle_dir, other, tmp_path, png, capsys):
        paths = {"a": "both", "outside": "../outside", "none": 1, "null": "a\0b"}
        (tmp_path / "media").mkdir()
        for name in ("media/both", "outside"):
            (tmp_path / name).write_bytes(png("red"))
        write(tmp_path / "store", bundle_dir, *(item(id, modality="image", path=path) for id, path in paths.items()))
        arguments = [str(tmp_path / "store"), str(tmp_path / "new"), "--bundle", str(other)]
        assert main(["reembed", *arguments, "--media", str(tmp_path / "media"), "--media-key", "path"]) == 0
        said = capsys.readouterr().out
        assert "1 items embedded" in said and "'outside'" in said and "no path under 'path'" in said
        assert list(held(tmp_path / "new", other)) == ["a"] and list(held(tmp_path / "store", bundle_dir)) == [*paths]


def test_a_store_is_filled_beside_one_that_is_served(store, bundle_dir, other, carry, tmp_path, capsys):
    async def use(served):
        await served.create_collection("kept", IndexRequest("hnsw"))
        assert await asyncio.to_thread(carry, tmp_path / "new") == 0
        await served.upsert([item("red", text="blue"), item("more", text="red")])
        assert await asyncio.to_thread(carry, tmp_path / "new") == 0
        assert "2 items embedded again (2 from texts), 2 were there" in capsys.readouterr().out

    in_store(store, bundle_dir, use)
    items = held(tmp_path / "new", other)
    assert list(items) == ["red", "green", "blue", "more"]
    assert items["red"].vector @ items["blue"].vector == pytest.approx(1), "as it is by now"


def test_what_is_no_store(bundle_dir, tmp_path, capsys):
    for more in ([], [str(tmp_path / "new")]):
        assert main(["reembed", str(tmp_path / "none"), *more, "--bundle", str(bundle_dir)]) == 2
        assert "holds no store" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("modality", "why", "help"),
    [
        ("points", "its file is not in media, and no preview of it is kept", True),
        ("image", "there is nothing to learn an adapter from", True),
        ("image", "the bundle has no tower of this modality", False),
        ("image", "its vector is that of several parts, which are not kept", False),
        ("text", "its text was not stored", False),
        ("text", "there is nothing to learn an adapter from", False),
    ],
)
def test_files_are_asked_for_where_they_would_help(modality: str, why: str, help: bool) -> None:
    outcome = reembed.Outcome()
    outcome.leave_out(f"{modality}: {why}", "an id")
    assert outcome.files_would_help == help
