"""`python -m service load`: Parquet of ready vectors into a store, checked, resumable, the same when done twice."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from service.commands.load import LoadError, load
from service.store import VectorSearch, parse
from tests.service.fakes import DIMENSIONS, fake_manifest, vector_of
from tests.service.stores import both, in_store, on_a_store, sqlite

MANIFEST = fake_manifest()


def written(path, ids, *, space=MANIFEST.space, vectors=None, **columns):
    vectors = np.stack([vector_of(id) for id in ids]) if vectors is None else vectors
    held = {
        "id": ids,
        "modality": ["text"] * len(ids),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1]),
        "metadata": [json.dumps({"of": id}) for id in ids],
        "text": [f"text {id}" for id in ids],
        "space": None if space is None else [space] * len(ids),
    } | columns
    parquet.write_table(pa.table({name: column for name, column in held.items() if column is not None}), path)


async def taken(store, path, collection="default", said=lambda _: None):
    return await load(path, store, MANIFEST, collection, "a store", said)


@both
@on_a_store()
async def test_files_are_loaded_and_loading_again_changes_nothing(store, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    written(folder / "0.parquet", [f"a{n}" for n in range(1_500)])
    written(folder / "1.parquet", ["b", "c"], modality=["image", "audio"], text=[None, None])
    told = []
    assert await taken(store, folder, "c", told.append) == 1_502
    assert (told[-1].files, told[-1].of, told[-1].items) == (2, 2, 1_502)
    found = (await store.search(VectorSearch("c", vector_of("a7")[None], 1, filter=parse({"of": "a7"}))))[0]
    assert [hit.item.id for hit in found] == ["a7"] and abs(found[0].score - 1) < 1e-6
    assert (await store.get("c", "b")).modality == "image"
    assert await taken(store, folder, "c") == 0
    assert {each.name: each.count for each in await store.collections()}["c"] == 1_502
    # A file that changed is loaded again, and so is one whose items are gone.
    written(folder / "1.parquet", ["b", "d"])
    assert await taken(store, folder, "c") == 2
    await store.drop_collection("c")
    assert await taken(store, folder, "c") == 1_502


def test_a_load_that_was_interrupted_goes_on(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(3):
        written(folder / f"{number}.parquet", [f"{number}/{n}" for n in range(10)])

    def interrupt(progress):
        if progress.files == 1 and progress.items > 10:
            raise KeyboardInterrupt

    async def first(store):
        await taken(store, folder, said=interrupt)

    async def second(store):
        assert await taken(store, folder) == 20
        assert (await store.collection("default")).count == 30

    with pytest.raises(KeyboardInterrupt):
        in_store(sqlite, tmp_path, first)
    in_store(sqlite, tmp_path, second)


@on_a_store(sqlite)
async def test_an_id_that_is_there_twice(store, tmp_path):
    written(tmp_path / "a.parquet", ["a", "b", "a"], metadata=['{"n": 1}', "", '{"n": 2}'])
    await taken(store, tmp_path / "a.parquet")
    assert (await store.get("default", "a")).metadata == {"n": 2}
    assert (await store.get("default", "b")).metadata == {}


@on_a_store(sqlite)
async def test_the_fewest_columns(store, tmp_path):
    written(tmp_path / "a.parquet", ["a"], modality=None, metadata=None, text=None)
    assert await taken(store, tmp_path / "a.parquet") == 1
    assert (await store.get("default", "a")).modality == "vector"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"space": None}, "does not say of which space"),
        ({"id": None}, "has no column id"),
        ({"vector": None}, "has no column vector"),
        ({"vectors": np.zeros((2, DIMENSIONS), np.float32)}, "rows 1 to 2: a vector is not of unit length"),
        ({"vectors": np.full((2, DIMENSIONS), np.nan, np.float32)}, "not of unit length"),
        ({"vectors": np.eye(2, 5, dtype=np.float32)}, f"has not the {DIMENSIONS} dimensions"),
        ({"vector": pa.array([None, [1.0] * DIMENSIONS])}, "dimensions"),
        ({"metadata": ["{}", "{"]}, "not JSON"),
        ({"metadata": ["{}", "[1]"]}, "valid dictionary"),
        ({"metadata": ["{}", json.dumps({"x": "y" * 20_000})]}, "larger than"),
        ({"modality": ["text", "smell"]}, "smell is no modality of"),
        ({"id": ["a", "b\n"]}, "control characters"),
        ({"id": ["a", None]}, "valid string"),
    ],
)
@on_a_store(sqlite)
async def test_what_is_refused(store, tmp_path, columns, said):
    written(tmp_path / "a.parquet", ["a", "b"], **columns)
    with pytest.raises(LoadError, match=said) as refusal:
        await taken(store, tmp_path / "a.parquet")
    assert "a.parquet" in str(refusal.value)
    assert (await store.collection("default")).count == 0


@on_a_store(sqlite)
async def test_another_space_stops_it_before_anything_is_written(store, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    written(folder / "0.parquet", ["a"])
    table = parquet.read_table(folder / "0.parquet").replace_schema_metadata({"isthmus.space": "f" * 16})
    parquet.write_table(table, folder / "1.parquet")
    with pytest.raises(LoadError, match="holds vectors of space ffffffffffffffff"):
        await taken(store, folder)
    assert (await store.collection("default")).count == 0
    written(folder / "1.parquet", ["b"], space="e" * 16)  # said by the rows alone
    with pytest.raises(LoadError, match="e" * 16):
        await taken(store, folder / "1.parquet")
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(LoadError, match="holds no Parquet files"):
            await taken(store, path)
    (folder / "1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(LoadError, match="cannot be read as Parquet"):
        await taken(store, folder)
    with pytest.raises(LoadError, match="no name of a collection"):
        await taken(store, folder, ".moments.x")


def test_the_command(bundle_dir, tmp_path):
    command = [sys.executable, "-m", "service", "load", str(tmp_path / "a.parquet")]
    settings = ["--bundle", str(bundle_dir), "--store", str(tmp_path / "store")]
    written(tmp_path / "a.parquet", ["a"])
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "accepts only" in done.stderr
