"""A modality that is none of the three, by a recipe alone: arrays, an ONNX encoder, captions; added to a bundle."""

import base64
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from examples import shapes
from service.contract.bundle import Bundle, read_bundle
from service.settings import Settings
from tests.conftest import serving
from tests.training import spaces, tiny
from training.encoders import EncoderError, load_encoder
from training.recipe import load_recipe

COLOURS = ["red", "green", "blue"]


def write_clouds(folder: Path, output: str = "features", **preprocessing: Any) -> Path:
    """Write clouds whose largest number is on the axis of a colour, their table, and an encoder of these numbers."""
    rng = np.random.default_rng(0)
    (folder / "clouds").mkdir(parents=True)
    with (folder / "clouds.csv").open("w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "caption", "colour", "split"])
        for number in range(60):
            place = number % len(COLOURS)
            points = rng.uniform(0, 0.2, (rng.integers(3, 30), 3)) + np.eye(3)[place]
            np.save(folder / f"clouds/{number}.npy", points.astype(np.float32))
            split = ("train", "validation", "test")[max(0, number // 12 - 2)]
            table.writerow([f"clouds/{number}.npy", f"a picture of {COLOURS[place]}", COLOURS[place], split])
    inputs = [helper.make_tensor_value_info("array", TensorProto.FLOAT, ["batch", 8, 3])]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", 3])]
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    nodes = [helper.make_node("ReduceMax", ["array", "axes"], [output], keepdims=0)]
    graph = helper.make_graph(nodes, "encoder", inputs, outputs, [axes])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "encoder.onnx"
    )
    described = {"name": "maxima", "modality": "points", "features": 3}
    described |= {"preprocessing": {"shape": [3], "rows": 8} | preprocessing}
    (folder / "encoder.json").write_text(json.dumps(described))
    return folder


def recipe(root: Path, folder: Path, **changes: Any) -> Path:
    values = tiny.recipe_values(root, projector=spaces.PROJECTOR | {"kind": "ridge"}, train=spaces.TRAIN)
    pairs = {"modality": "points", "table": str(folder / "clouds.csv"), "folder": str(folder), "split_column": "split"}
    pairs["splits"] = {"train": ["train"], "validation": ["validation"], "test": ["test"]}
    values |= {
        "name": "pointed",
        "encoders": {
            "text": values["encoders"]["text"],
            "points": {"front_end": "array", "onnx": str(folder)} | changes.pop("encoder", {}),
        },
        "pairs": {"clouds": pairs | {"text": "caption"}},
        "templates": {"points": ["a picture of {}"]},
    } | changes
    return tiny.write_recipe(folder / "recipe.yaml", values)


def add(bundle: Bundle, path: Path, out: Path) -> int:
    return spaces.run("add-modality", bundle.path, path, "--work", out / "w", "--cache", out / "c", "--out", out / "b")


def test_a_modality_is_added_by_configuration_and_served_beside_the_older_ones(
    picture_space: Bundle, tiny_root: Path, tmp_path: Path
) -> None:
    folder = write_clouds(tmp_path / "clouds")
    assert add(picture_space, recipe(tiny_root, folder), tmp_path) == 0
    bundle, old = read_bundle(tmp_path / "b"), picture_space.manifest
    assert set(bundle.manifest.towers) == {*old.towers, "points"} and bundle.manifest.admits == (old.space,)
    for modality, tower in old.towers.items():
        assert bundle.manifest.towers[modality] == tower
        assert bundle.tower_path(modality).read_bytes() == picture_space.tower_path(modality).read_bytes()
    assert bundle.manifest.evaluation["clouds.p2t.r1"] > 90 and "MODEL_CARD.md" in bundle.manifest.files
    settings = {"store": tmp_path / "store", "device": "cpu", "threads": 1}
    files, _ = spaces.pictures(tiny_root)
    with serving(Settings(bundle=picture_space.path, **settings)) as client:  # type: ignore[arg-type]
        client.post("/items", files=[("file", (path.name, path.read_bytes())) for path in files]).raise_for_status()
        before = client.get(f"/items/{files[0].name}?include=vector").json()
    with serving(Settings(bundle=bundle.path, **settings)) as client:  # type: ignore[arg-type]
        assert client.get(f"/items/{files[0].name}?include=vector").json() == before
        clouds = [
            {
                "id": f"{number}.npy",
                "modality": "points",
                "array": base64.b64encode((folder / f"clouds/{number}.npy").read_bytes()).decode(),
            }
            for number in range(48, 60)
        ]
        assert client.post("/items", json={"items": clouds}).json()["upserted"] == 12
        query = {"query": "a picture of green", "modalities": ["points"], "top_k": 4}
        hits = client.post("/search", json=query).json()["results"]
        assert [COLOURS[int(hit["id"].split(".")[0]) % 3] for hit in hits] == ["green"] * 4
        query = {"query": {"id": "48.npy"}, "modalities": ["image", "points"], "top_k": 30}
        assert {hit["modality"] for hit in client.post("/search", json=query).json()["results"]} == {"image", "points"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": {"front_end": None}}, "front_end: array, with onnx, is for a modality that is none of"),
        ({"encoder": {"onnx": None, "folder": "x"}}, "front_end: array, with onnx"),
        ({"pairs": {"clouds": {"modality": "smell", "table": "x", "text": "y"}}}, "there is no smell encoder"),
        ({"pairs": {"clouds": {"modality": "text", "table": "x", "text": "y"}}}, "pairs texts with texts"),
        ({"encoders": {"text": {"folder": "bert"}, "video": {"front_end": "array", "onnx": "."}}}, "have this name"),
        ({"encoders": {"text": {"folder": "bert"}, "Points": {"onnx": "."}}}, "pattern"),
        ({"pairs": {"clouds": {"modality": "points", "table": "absent.csv", "text": "y"}}}, "absent.csv is not there"),
        ({"made": {"output": "vectors"}}, "must be called array and features"),
        ({"made": {"rows": 0}}, "preprocessing: rows"),
        ({"made": {"kind": "text"}}, "encoder.json: preprocessing: "),
        ({"made": {"shape": [4]}}, "has the shape"),
    ],
)
def test_a_recipe_or_an_encoder_that_does_not_fit_is_refused(
    picture_space: Bundle, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, words: str
) -> None:
    """An encoder is `made` otherwise than by default."""
    folder = write_clouds(tmp_path / "clouds", **changes.get("made", {}))
    path = recipe(tiny_root, folder, **{name: change for name, change in changes.items() if name != "made"})
    assert add(picture_space, path, tmp_path) == 2
    assert words in capsys.readouterr().err


def test_arrays_are_embedded_offline_too(picture_space: Bundle, tiny_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    folder = write_clouds(tmp_path / "clouds")
    assert add(picture_space, recipe(tiny_root, folder), tmp_path) == 0
    out = tmp_path / "vectors"
    assert spaces.run("embed", tmp_path / "b", "--data", folder / "clouds", "--out", out) == 0
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(out / "000000.parquet")
    assert set(table.column("modality").to_pylist()) == {"points"} and len(table) == 60


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ("[1]", "encoder.json: Input should be an object"),
        ("{not json", "encoder.json: Invalid JSON"),
        ('{"modality": "points", "features": 3, "preprocessing": {}}', "encoder.json: name: Field required"),
        ('{"name": "a", "features": 3, "preprocessing": {}}', "encoder.json: modality: Field required"),
        ('{"name": "a", "modality": "points", "features": 3}', "encoder.json: preprocessing: Field required"),
        ('{"name": "a", "modality": "points", "features": "3", "preprocessing": {}}', "encoder.json: features: "),
        ('{"name": "a", "modality": "points", "features": 3, "preprocessing": []}', "encoder.json: preprocessing: "),
    ],
)
def test_a_poor_description_of_an_encoder_is_said_in_a_line(
    tiny_root: Path, tmp_path: Path, told: str, words: str
) -> None:
    folder = write_clouds(tmp_path / "clouds")
    (folder / "encoder.json").write_text(told)
    with pytest.raises(EncoderError, match=words):
        load_encoder(load_recipe(recipe(tiny_root, folder)), "points")


@torch.inference_mode()
def test_the_example_encoder_gives_features_of_any_cloud() -> None:
    encode, cloud = shapes.Histograms().eval(), torch.rand(1, shapes.ROWS, 3) - 0.5
    for poor in (0 * cloud, 0 * cloud + 3e38, cloud[:, :1].expand_as(cloud), 3e38 * (2 * cloud), 1e-30 * cloud):
        assert encode(poor).isfinite().all()
    torch.testing.assert_close(encode(1e30 * cloud), encode(cloud), atol=1e-4, rtol=1e-3)
