"""Pairs in webdataset tars, Parquet and Arrow files: what a table with a folder says, read as a stream."""

import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Mapping, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.training.conftest import MakeRecipe
from tests.training.test_features import encoded
from training import __main__ as command
from training import pipeline
from training.data import shards
from training.data.shards import Member
from training.distributed import Ranks
from training.encoders import load_encoder
from training.features import cached_features
from training.pairs import PairError, read_pairs
from training.recipe import Recipe, RecipeError

KINDS = ("tar", "parquet", "arrow", "saved")


def pictures(recipe: Recipe) -> list[tuple[bytes, list[str]]]:
    """Files and captions of the recipe's pictures for training."""
    part = read_pairs(recipe, "pictures")["train"]
    return [
        (medium.read_bytes(), [part.texts[text] for row, text in part.links if row == place])
        for place, medium in enumerate(part.media)
    ]


def write_tar(path: Path, samples: Sequence[Mapping[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, parts in enumerate(samples):
            for extension, content in parts.items():
                member = tarfile.TarInfo(f"./{number:06}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def sample(content: bytes, captions: Sequence[str]) -> dict[str, bytes]:
    return {"png": content, "json": json.dumps({"captions": captions}).encode()}


def write(folder: Path, kind: str, rows: Sequence[tuple[bytes, Sequence[str]]]) -> dict[str, Any]:
    """The rows in two shards; the recipe's pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate((rows[:10], rows[10:])):
        path = folder / f"{number}.{kind}"
        if kind == "tar":
            write_tar(path, [sample(*row) for row in part])
            continue
        columns = {
            "picture": [{"bytes": content, "path": None} for content, _ in part],
            "captions": [list(captions) for _, captions in part],
        }
        table = pa.table(columns)
        if kind == "parquet":
            parquet.write_table(table, path, row_group_size=4)
        elif kind == "arrow":
            with pa.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table, 3)
        elif not number:
            features = datasets.Features(
                {"picture": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
            )
            whole = {
                "picture": [{"bytes": content, "path": None} for content, _ in rows],
                "captions": [list(captions) for _, captions in rows],
            }
            datasets.Dataset.from_dict(whole, features).save_to_disk(folder, num_shards=2)
    values = {"modality": "image", "text": "captions", "media": "jpg;png" if kind == "tar" else "picture"}
    return values | {"table": str(folder if kind == "saved" else folder / f"*.{kind}")}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_say_what_a_table_says(make_recipe: MakeRecipe, tmp_path: Path, kind: str) -> None:
    rows = pictures(make_recipe())
    recipe = make_recipe(pairs={"sharded": write(tmp_path / "shards", kind, rows)})
    train = read_pairs(recipe, "sharded")["train"]
    table = read_pairs(make_recipe(), "pictures")["train"]
    assert [medium.read_bytes() for medium in train.media] == [content for content, _ in rows]
    assert train.texts == table.texts and np.array_equal(train.links, table.links)
    again = [train.media[place].read_bytes() for place in (15, 0, 9, 3, 12)]  # in no order at all
    assert again == [rows[place][0] for place in (15, 0, 9, 3, 12)]
    encoder = load_encoder(recipe, "image")
    inside = cached_features(encoder, train.media, tmp_path / "inside").pooled
    assert np.array_equal(inside, cached_features(encoder, table.media, tmp_path / "files").pooled)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_one_changed_item_of_a_shard_encodes_one(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows = pictures(make_recipe())[:12]
    recipe = make_recipe(pairs={"sharded": write(tmp_path / "shards", kind, rows)})
    encoder = load_encoder(recipe, "image")

    def again() -> list[str]:
        with monkeypatch.context() as patch:
            files = encoded(patch)
            cached_features(encoder, read_pairs(recipe, "sharded")["train"].media, tmp_path / "cache")
        return [str(file) for file in files]

    assert len(again()) == 12
    assert again() == []
    reads: list[Member] = []
    monkeypatch.setattr(Member, "read_bytes", lambda medium: reads.append(medium))
    assert again() == [] and not reads  # the shards' sizes and times say that they are what they were
    monkeypatch.undo()
    red = pictures(make_recipe())[0][0]
    rows[3] = (red[:-12] + b"\0\0\0\4tEXt7c6\0\x12\x34\x56\x78" + red[-12:], rows[3][1])
    write(tmp_path / "shards", kind, rows)
    assert len(again()) == 1


def test_a_set_with_broken_items_finishes_and_names_them(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pictures(make_recipe()) * 25  # 400
    samples = [sample(*row) for row in rows]
    samples[7] |= {"png": b"\x89PNG broken"}
    samples[50] = {"json": b'{"captions": ["nothing to see"]}'}
    samples[90] = {"png": samples[90]["png"], "json": b"{"}
    samples[100] = sample(rows[100][0], [" "])
    path = tmp_path / "0.tar"
    write_tar(path, samples)
    cut = tmp_path / "1.tar"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    values = {"modality": "image", "table": [str(path), str(cut)], "media": "png", "text": "captions"}
    recipe = make_recipe(pairs={"sharded": values | {"validation_fraction": 0.1}})
    file = tmp_path / "recipe.yaml"
    work = ["--work", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")]
    assert recipe.pairs and command.main(["features", str(file), *work]) == 0
    told = capsys.readouterr().err
    assert "7 of 535 samples cannot be used and are left out" in told
    for place, reason in ((50, "has no png; it has captions, json"), (90, "Expecting"), (100, "has an empty text")):
        assert f"0.tar/{place:06}{'.png' if place == 100 else ''}" in told and reason in told
    assert "1.tar is damaged after 00013" in told
    assert re.search("2 of 4[0-9]+ media cannot be read and are left out", told) and "0.tar/000007.png: " in told


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"table": "none-*.tar"}, "none-.* matches no file"),
        ({"table": "none.tar"}, "none.tar is not there"),
        ({"text": "caption"}, r"16 of 16 samples cannot be used, the first: .*0.tar/000000 has no caption; it has"),
        ({"media": "jpg"}, r"has no jpg; it has captions, json, png"),
        ({"table": "memory://none/*.tar"}, "memory://none/.* matches no file"),
        ({"table": "memory://none/0.tar"}, "memory://none/0.tar is not there"),
        ({"table": "nothing://none/0.tar"}, "nothing://none/0.tar cannot be listed: Protocol not known"),
    ],
)
def test_what_is_wrong_is_named(make_recipe: MakeRecipe, tmp_path: Path, change: dict[str, str], said: str) -> None:
    values = write(tmp_path / "shards", "tar", pictures(make_recipe()))
    with pytest.raises((PairError, shards.ShardError), match=said):
        read_pairs(make_recipe(pairs={"sharded": values | change}), "sharded")


def test_a_column_that_is_missing_is_named(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    values = write(tmp_path / "shards", "parquet", pictures(make_recipe()))
    with pytest.raises(shards.ShardError, match=r"0.parquet has no column image; it has picture, captions"):
        read_pairs(make_recipe(pairs={"sharded": values | {"media": "image"}}), "sharded")
    with pytest.raises(RecipeError, match="a table or a folder must be given"):
        make_recipe(pairs={"sharded": {"modality": "image"}})


def test_shards_at_an_address_are_read_without_a_copy(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = pictures(make_recipe())
    values = write(tmp_path / "shards", "parquet", rows)
    fsspec.filesystem("memory").put(str(tmp_path / "shards"), "memory://hub", recursive=True)
    recipe = make_recipe(pairs={"sharded": values | {"table": "memory://hub/*.parquet"}})
    media = read_pairs(recipe, "sharded")["train"].media
    assert str(media[0]) == "memory:///hub/0.parquet/0"
    encoder = load_encoder(recipe, "image")
    inside = cached_features(encoder, media, tmp_path / "inside").pooled
    table = read_pairs(make_recipe(), "pictures")["train"].media
    assert np.array_equal(inside, cached_features(encoder, table, tmp_path / "files").pooled)


def test_class_labels_of_datasets_and_names_of_files(make_recipe: MakeRecipe, tmp_path: Path, tiny_root: Path) -> None:
    features = datasets.Features({"file": datasets.Value("string"), "kind": datasets.ClassLabel(names=["dull", "red"])})
    rows = {"file": ["0.png", "1.png"], "kind": [1, 0]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "0.parquet")
    values = {"modality": "image", "table": str(tmp_path / "0.parquet"), "folder": "pictures", "label": "kind"}
    train = read_pairs(make_recipe(pairs={"labelled": values}), "labelled")["train"]
    assert train.classes == ["red", "dull"] and train.media == [tiny_root / "pictures" / file for file in rows["file"]]


def captioned(path: Path, **columns: Any) -> dict[str, Any]:
    parquet.write_table(pa.table(columns), path, row_group_size=4)
    return {"modality": "image", "table": str(path), "media": "picture", "text": "text"}


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    for groups in ([], [pa.table({"picture": pa.array([], pa.binary()), "text": pa.array([], pa.string())})]):
        schema = pa.schema({"picture": pa.binary(), "text": pa.string()})
        with parquet.ParquetWriter(tmp_path / "0.parquet", schema) as writer:
            for group in groups:
                writer.write_table(group)
        assert list(shards.rows(str(tmp_path / "0.parquet"), "picture", ["text"])) == []


@pytest.mark.parametrize("text", [{"raw": "a dog"}, b"a dog", [["a dog"]]])
def test_what_is_no_text_does_not_become_a_caption(make_recipe: MakeRecipe, tmp_path: Path, text: Any) -> None:
    values = captioned(tmp_path / "0.parquet", picture=[b"1", b"2"], text=[text, text])
    with pytest.raises(PairError, match=r"2 of 2 samples cannot be used, the first: .*is no text but a"):
        read_pairs(make_recipe(pairs={"sharded": values}), "sharded")


def test_a_row_without_a_name_or_a_label_fails_alone(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    features = datasets.Features({"file": datasets.Value("string"), "kind": datasets.ClassLabel(names=["dull", "red"])})
    rows = {"file": [None, *(f"{n}.png" for n in range(16))], "kind": [1] * 16 + [-1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "0.parquet")
    values = {"modality": "image", "table": str(tmp_path / "0.parquet"), "folder": "pictures", "label": "kind"}
    with pytest.raises(PairError, match=r"2 of 17 samples cannot be used, the first: .*0.parquet/0 has no file"):
        read_pairs(make_recipe(pairs={"labelled": values}), "labelled")
    train = read_pairs(make_recipe(pairs={"labelled": values | {"skip_empty": True}}), "labelled")["train"]
    assert train.classes == ["red"] and len(train.media) == 15


def test_a_damaged_page_costs_its_own_row_group(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "0.parquet"
    contents = [rng.bytes(5000) for _ in range(40)]
    captioned(path, picture=contents, text=["a"] * 40)
    middle = path.stat().st_size // 2
    with path.open("r+b") as stream:
        stream.seek(middle)
        stream.write(b"\xff" * 10_000)
    good, reasons = [], []
    for place, medium in enumerate(row["picture"] for row in shards.rows(str(path), "picture", []) if row):
        try:
            good += [place] if medium.read_bytes() == contents[place] else []
        except OSError as error:
            reasons.append(str(error))
    assert reasons and not any("fewer rows" in reason for reason in reasons)
    assert {*range(12), *range(28, 40)} <= {*good} and len(good) < 40


def test_too_many_damaged_shards_are_another_set(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", [sample(b"", ["a dog"])] * 40)
    values = {"modality": "image", "table": str(tmp_path / "*.tar"), "media": "png", "text": "captions"}
    for number in (1, 3):
        (tmp_path / f"{number}.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(PairError, match=r"2 of 4 shards are damaged, such as: .*3.tar is damaged"):
        read_pairs(make_recipe(pairs={"sharded": values}), "sharded")


def test_the_only_shard_being_damaged_is_what_is_said(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"no tar" * 200)
    values = {"modality": "image", "table": str(tmp_path / "0.tar"), "media": "png", "text": "captions"}
    with pytest.raises(PairError, match=r"1 of 1 samples cannot be used, the first: .*0.tar is damaged"):
        read_pairs(make_recipe(pairs={"sharded": values}), "sharded")


def test_a_mark_of_the_byte_order_is_no_part_of_a_caption(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [{"png": b"1", "txt": "\ufeffa dog".encode()}])
    values = {"modality": "image", "table": str(tmp_path / "0.tar"), "media": "png", "text": "txt"}
    assert read_pairs(make_recipe(pairs={"sharded": values}), "sharded")["train"].texts == ["a dog"]


def test_names_of_files_may_be_kept_as_a_dictionary(make_recipe: MakeRecipe, tmp_path: Path, tiny_root: Path) -> None:
    values = captioned(
        tmp_path / "0.parquet", picture=pa.array(["0.png", "1.png"]).dictionary_encode(), text=["a", "b"]
    )
    train = read_pairs(make_recipe(pairs={"named": values | {"folder": "pictures"}}), "named")["train"]
    assert train.media == [tiny_root / "pictures/0.png", tiny_root / "pictures/1.png"]


def test_a_folder_of_saved_splits_names_them(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"file": ["0.png"], "text": ["a"]})
    datasets.DatasetDict(test=part, train=part).save_to_disk(tmp_path / "saved")
    values = {"modality": "image", "table": str(tmp_path / "saved"), "text": "text"}
    with pytest.raises(PairError, match=r"saved has the splits test, train: name one, .*saved/SPLIT"):
        read_pairs(make_recipe(pairs={"saved": values}), "saved")


def test_lists_of_samples_need_shards_of_different_names(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, "parquet", pictures(make_recipe())[:12])
    (tmp_path / "doubtful.csv").write_text("file\n0.parquet/3\n")
    values = {"modality": "image", "table": str(tmp_path / "*" / "*.parquet"), "media": "picture", "text": "captions"}
    assert len(read_pairs(make_recipe(pairs={"sharded": values}), "sharded")["train"].media) == 24
    values |= {"exclude": str(tmp_path / "doubtful.csv")}
    with pytest.raises(PairError, match=r"two shards are called 0.parquet"):
        read_pairs(make_recipe(pairs={"sharded": values}), "sharded")


def test_a_root_is_a_folder_and_no_pattern(tmp_path: Path) -> None:
    root = tmp_path / "photos [2024]*"
    (root / "saved").mkdir(parents=True)
    for name in ("a[1].csv", "0.tar", "1.tar", "saved/0.arrow"):
        (root / name).touch()
    for pattern, names in (("a[1].csv", ["a[1].csv"]), ("[0-9].tar", ["0.tar", "1.tar"]), ("saved", ["saved/0.arrow"])):
        assert shards.files(pattern, root) == [str(root / name) for name in names]


def test_a_shard_that_changes_on_a_web_server_has_another_stamp(tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        stamps = []
        try:
            for content in (b"a", b"a", b"bc"):
                path.write_bytes(content)
                os.utime(path, (1e9 + len(content),) * 2)
                system, address = shards._opened(f"http://127.0.0.1:{server.server_port}/0.parquet")
                stamps.append(shards._stamp(system, address))
        finally:
            server.shutdown()
            thread.join()
    assert stamps[0] == stamps[1] != stamps[2]


def test_many_broken_media_of_a_share_are_few_of_the_whole(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = pictures(make_recipe()) * 4
    rows[:4] = [(b"broken %d" % number, captions) for number, (_, captions) in enumerate(rows[:4])]
    recipe = make_recipe(pairs={"sharded": write(tmp_path / "shards", "parquet", rows)})
    frozen = {"image": load_encoder(recipe, "image"), "text": load_encoder(recipe, "text")}
    read = {"sharded": read_pairs(recipe, "sharded")}
    share = pipeline.features(recipe, frozen, pipeline.share_of(read, Ranks(0, 8)), tmp_path / "cache", share=True)
    assert len(share["sharded"]["train"].media) == 4
    assert len(pipeline.features(recipe, frozen, read, tmp_path / "cache")["sharded"]["train"].media) == 60


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A row group of 160 MB is read in small parts."""
    rng = np.random.default_rng(0)
    contents = [rng.bytes(2**20) for _ in range(160)]
    path = tmp_path / "0.parquet"
    parquet.write_table(
        pa.table({"picture": contents, "text": ["a"] * 160}), path, data_page_size=2**16, write_batch_size=4
    )
    before = pa.total_allocated_bytes()
    peak, media = 0, [row["picture"] for row in shards.rows(str(path), "picture", ["text"]) if isinstance(row, dict)]
    pool = pa.default_memory_pool()
    for medium, content in zip(media, contents, strict=True):
        assert medium.read_bytes() == content
        peak = max(peak, pool.bytes_allocated() - before)
    assert len(media) == 160 and sys.getsizeof(media[0]) < 200
    assert peak < 64e6
