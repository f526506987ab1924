"""`publish` writes some things, leaves others out, and refuses the rest. tests/playground/test_publish.py opens it."""

import asyncio
import gzip
import json
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from service.__main__ import main
from service.commands.publish import PLAYGROUND, RUNTIME, SHARED
from service.contract.bundle import read_bundle
from service.contract.graphs import weights
from service.engine.packing import pack
from service.store import Entry, Moment, Preview
from tests import tiny_bundle
from tests.service.graphs import graph_of
from tests.service.stores import in_sqlite

VECTORS = np.eye(tiny_bundle.DIMENSIONS, dtype=np.float32)
JPEG = Preview("image/jpeg", b"\xff\xd8 a picture", {"width": 8, "height": 6})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle.build(tmp_path_factory.mktemp("bundles") / "bert", bert=True).path


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    for name in RUNTIME:
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def publishing(bundle, runtime, tmp_path, capsys):
    """Publishes a store of four items, which is open in a server meanwhile."""
    entries = [
        Entry("default", "a/cat.jpg", "image", {"what": "a cat", "n": 1}, VECTORS[0], preview=JPEG),
        Entry("default", "note", "text", {}, VECTORS[1], text="hello " * 300),
        Entry(
            "default", "film", "video", {}, VECTORS[2], None, None, [Moment("image", 1.0, 2.5, VECTORS[3])], mapped=0.07
        ),
        Entry("other", "secret", "text", {"password": "hunter2"}, VECTORS[4], text="of another collection"),
    ]

    def run(*arguments, folder=tmp_path / "site", bundle=bundle, runtime=runtime):
        given = [str(folder), "--bundle", str(bundle), "--runtime", str(runtime), *map(str, arguments)]
        given += [] if "--store" in given else ["--store", str(tmp_path / "store")]

        async def use(store):
            await store.upsert(entries)
            return await asyncio.to_thread(main, ["publish", *given])

        status = in_sqlite(tmp_path / "store", use, read_bundle(bundle).manifest)
        return status, capsys.readouterr(), folder

    return run


def test_all_of_a_collection_is_there_and_nothing_else(publishing, bundle, tmp_path):
    status, said, site = publishing()
    assert status == 0, said.err
    assert "3 items" in said.out and "metadata: n, what" in said.out and "weights: " in said.out
    published = json.loads((site / "published.json").read_text())
    described = json.loads((site / "items.json").read_text())
    cat, note, film = described["items"]
    assert (cat["id"], cat["modality"], cat["metadata"]) == ("a/cat.jpg", "image", {"what": "a cat", "n": 1})
    assert cat["preview"] == {"media_type": "image/jpeg", "width": 8, "height": 6}
    assert (site / cat["file"]).read_bytes() == JPEG.data
    assert len(note["preview"]["text"]) == 1_000 and film["preview"] == {"mapped": 0.07}
    assert described["moments"] == [{"modality": "image", "start": 1.0, "end": 2.5}] and published["owners"] == [2]
    vectors = np.fromfile(site / "vectors.f16", np.float16).reshape(-1, tiny_bundle.DIMENSIONS)
    np.testing.assert_array_equal(vectors, VECTORS[:4])
    assert published["towers"].keys() == {"text", "image"}
    tokenizer = json.loads(gzip.decompress((site / "bundle/tokenizer").read_bytes()))
    assert tokenizer == json.loads((bundle / "tokenizer.json").read_text())
    for name in SHARED:
        assert (site / "playground" / name).read_bytes() == (PLAYGROUND / name).read_bytes()
    assert {file.name for file in (site / "runtime").iterdir()} == set(RUNTIME.values())
    assert (site / "bundle/MODEL_CARD.md").is_file() and 'id="detail"' in (site / "index.html").read_text()
    for file in (file for file in site.rglob("*") if file.is_file()):
        data = file.read_bytes()
        assert b"hunter2" not in data and b"another collection" not in data and str(tmp_path).encode() not in data, file


def test_a_store_of_before_vectors_were_mapped_is_published(publishing, bundle, runtime, tmp_path):
    publishing()
    with closing(sqlite3.connect(tmp_path / "store/store.sqlite3")) as file:
        file.execute("DROP TABLE mapped")
    given = ["--bundle", str(bundle), "--runtime", str(runtime), "--store", str(tmp_path / "store")]
    assert main(["publish", str(tmp_path / "site"), *given]) == 0
    assert json.loads((tmp_path / "site/items.json").read_text())["items"][2]["preview"] is None


def test_metadata_can_be_left_out_and_a_folder_is_replaced_as_a_whole(publishing, tmp_path):
    _, _, site = publishing()
    (site / "previews/0/left-over.jpg").write_bytes(b"")
    status, said, _ = publishing("--without-metadata", "--json")
    told = json.loads(said.out)
    assert status == 0 and told["keys"] == [] and told["items"] == {"image": 1, "text": 1, "video": 1}
    assert b"a cat" not in (site / "items.json").read_bytes() and not (site / "previews/0/left-over.jpg").exists()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["site", "store"]


def test_what_cannot_be_published_is_refused_and_the_folder_stays(publishing, bundle, bundle_dir, tmp_path):
    _, _, site = publishing()
    before = (site / "items.json").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    other = tiny_bundle.build(tmp_path / "other", seed=1, bert=True).path
    for given, words in (
        ({"runtime": tmp_path / "none"}, "`npm install onnxruntime-web`"),
        ({"folder": tmp_path / "mine"}, "was not written by `publish`"),
        ({"bundle": bundle_dir}, "and not this one (model WordPiece, normalizer Sequence, "),
        (("--collection", "nothing"), "has no collection 'nothing', but: default, other"),
        (("--store", tmp_path / "mine"), "holds no store"),
        (("--store", "milvus"), "and not Milvus"),
    ):
        arguments, options = (given, {}) if isinstance(given, tuple) else ((), given)
        status, said, _ = publishing(*arguments, **options)
        assert status == 2 and words in said.err, said
    assert main(["publish", str(site), "--store", str(tmp_path / "store"), "--bundle", str(other),
                 "--runtime", str(tmp_path / "none")]) == 2  # fmt: skip
    assert (site / "items.json").read_bytes() == before and (tmp_path / "mine/thesis.txt").exists()
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".publish")]


def test_a_store_of_another_space_is_refused(publishing, runtime, tmp_path, capsys):
    publishing()
    other = tiny_bundle.build(tmp_path / "other", seed=1, bert=True).path
    given = ["--store", str(tmp_path / "store"), "--bundle", str(other), "--runtime", str(runtime)]
    assert main(["publish", str(tmp_path / "new"), *given]) == 2
    assert "is of space" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_packed_weights_are_near_and_smaller_and_the_rest_is_as_it_was(bundle):
    graph = (bundle / "text.onnx").read_bytes()
    assert pack(graph, {})[1] == graph
    table = np.random.default_rng(0).standard_normal((400, 96)).astype(np.float16)
    table[7] = 0
    table[8, 3] = 400.0  # one large weight among small ones
    model = graph_of(table)
    [found] = weights(model)
    assert (found.dims, found.type, model[found.start : found.end]) == ((400, 96), 10, table.tobytes())
    packed, rebuilt = pack(model, {found.start: 510})
    back = np.frombuffer(rebuilt, np.float16, table.size, found.start).reshape(table.shape).astype(np.float32)
    error = np.abs(back - table)
    assert len(rebuilt) == len(model) and rebuilt[: found.start] == model[: found.start]
    assert len(packed) < 0.85 * len(model)
    assert error[:7].max() < 0.002 and not back[7].any() and error[8].max() < 0.05
