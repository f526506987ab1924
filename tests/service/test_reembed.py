import asyncio

import pytest

from service.__main__ import main
from service.contract.bundle import read_bundle
from service.store import SqliteStore
from tests import tiny_bundle
from tests.conftest import serving
from tests.service.media import b64
from tests.service.test_items_routes import upsert


@pytest.fixture
def filled(settings, png, wav):
    """A store of the tiny bundle's space, and the folder of its media."""
    media = settings.store.parent / "media"
    (media / "pictures").mkdir(parents=True)
    (media / "pictures" / "red.png").write_bytes(png("red"))
    (media / "tone.wav").write_bytes(wav())
    with serving(settings) as client:
        client.put("/collections/words", json={"keywords": ["title"], "index": "hnsw"})
        upsert(
            client,
            {"id": "words", "text": "a red dog", "metadata": {"title": "Dogs"}, "collection": "words"},
            {"id": "pictures/red.png", "image": b64(png("red")), "metadata": {"n": 1}},
            {"id": "tone.wav", "audio": b64(wav())},
            {"id": "given", "vector": [1.0] * tiny_bundle.DIMENSIONS},
            {"id": "gone.png", "image": b64(png("blue"))},
        )
        assert client.put("/label-sets/colours", json={"labels": ["red", "blue"]}).is_success
    return settings.store, media


def test_a_store_is_embedded_again_in_another_space(filled, tmp_path, capsys):
    old, media = filled
    other = tiny_bundle.build(tmp_path / "other", seed=1).path
    arguments = ["reembed", str(old), str(tmp_path / "new"), "--bundle", str(other), "--media", str(media)]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "3 items can be embedded again" in said and "it was given as a vector, such as 'given'" in said
    assert "its file is not in" in said and "'gone.png'" in said and "nothing was done" in said
    assert not (tmp_path / "new").exists()

    assert main([*arguments, "--leave-out"]) == 0
    assert "3 items embedded, 0 were there, 1 label sets" in capsys.readouterr().out
    assert main([*arguments, "--leave-out"]) == 0  # what was interrupted goes on
    assert "0 items embedded, 3 were there" in capsys.readouterr().out

    async def look():
        store = SqliteStore.open(tmp_path / "new", read_bundle(other).manifest)
        items = {item.id: item for item in (await store.page(None, None, None, 10))[0]}
        assert set(items) == {"words", "pictures/red.png", "tone.wav"}
        assert items["pictures/red.png"].metadata == {"n": 1} and items["tone.wav"].modality == "audio"
        assert (await store.collection("words")).wanted.kind == "hnsw"
        assert await store.keyword_fields("words") == ["title"]
        assert [hit.item.id for hit in await store.keyword_search("words", "dogs", 3)] == ["words"]
        assert (await store.label_set("colours")).definition["labels"] == ["red", "blue"]
        red = (await store.get("default", "pictures/red.png", with_vector=True)).vector
        assert (await store.get("words", "words", with_vector=True)).vector @ red > 0.9  # both of the new space
        await store.close()

    asyncio.run(look())


def test_paths_in_the_metadata_stay_inside_the_folder(settings, png, tmp_path, capsys):
    (tmp_path / "media").mkdir()
    (tmp_path / "secret.png").write_bytes(png("red"))
    (tmp_path / "media" / "a.png").write_bytes(png("red"))
    image = b64(png("red"))
    with serving(settings) as client:
        upsert(
            client,
            {"id": "a", "image": image, "metadata": {"path": "a.png"}},
            {"id": "outside", "image": image, "metadata": {"path": "../secret.png"}},
            {"id": "none", "image": image},
        )
    other = tiny_bundle.build(tmp_path / "other", seed=1).path
    arguments = [str(settings.store), str(tmp_path / "new"), "--bundle", str(other)]
    arguments += ["--media", str(tmp_path / "media"), "--media-key", "path", "--leave-out"]
    assert main(["reembed", *arguments]) == 0
    said = capsys.readouterr().out
    assert "1 items embedded" in said and "'outside'" in said and "no path under 'path'" in said


def test_what_is_no_store(bundle_dir, tmp_path, capsys):
    assert main(["reembed", str(tmp_path), str(tmp_path / "new"), "--bundle", str(bundle_dir)]) == 2
    assert "holds no store" in capsys.readouterr().err
