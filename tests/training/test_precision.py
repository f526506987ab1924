import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from service.contract.bundle import OUTPUT, Bundle, BundleError, read_bundle, space_id
from service.contract.vectors import l2_normalise
from service.engine.towers import Tower, TowerError
from tests.training import tiny
from tests.training.conftest import MakeRecipe
from tests.training.test_export import random_heads
from training import pipeline
from training.bundle import precision
from training.bundle.precision import OVERLAP, Measured, calibrating_and_judging, measured_by_neighbours
from training.bundle.quantise import QuantiseError, batches, half, smoothed, static
from training.features import collate, preparer
from training.graphs import HEAD, session
from training.pairs import read_pairs
from training.recipe import ExportSpec, Recipe, RecipeError, load_recipe

Built = tuple[Recipe, Bundle]


@pytest.fixture(scope="module")
def built(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A bundle in three precisions. Random encoders of a few channels lose more than real ones: the gates are open."""
    folder = tmp_path_factory.mktemp("precisions")
    wanted = {"precisions": ["fp32", "int8", "fp16"], "calibration": 8}
    recipe = load_recipe(tiny.write_recipe(folder / "recipe.yaml", tiny.recipe_values(tiny_root, export=wanted)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(precision, "COSINE", 0.5)
        patched.setattr(precision, "R1_LOSS", 100.0)
        return recipe, pipeline.export(recipe, pipeline.encoders(recipe), random_heads(recipe), {}, folder / "bundle")


@pytest.mark.full
def test_a_bundle_comes_in_several_precisions_of_one_space(built: Built) -> None:
    _, bundle = built
    manifest = read_bundle(bundle.path).manifest
    plain = {m: tower.model_copy(update={"variants": {}, "defaults": {}}) for m, tower in manifest.towers.items()}
    assert manifest.space == space_id(manifest.dimensions, plain)
    assert set(manifest.towers) == {"image", "audio", "text"}
    for modality, tower in manifest.towers.items():
        assert set(tower.precisions) == {"fp32", "int8", "fp16"}
        assert (tower.default("cpu"), tower.default("cuda")) == ("int8", "fp16")
        for name, variant in tower.variants.items():
            assert set(variant.gates) == {"cosine", "cosine_lowest", "r1_loss", "top10_overlap"}
            assert variant.gates["cosine"] == manifest.evaluation[f"{name}.{modality}.cosine"]
            assert manifest.evaluation[f"{name}.{modality}.refused"] is False
        assert tower.variants["fp16"].gates["cosine"] > 0.999
        assert Tower(bundle, modality, "cpu", 1).precision == "int8"
        assert Tower(bundle, modality, "cpu", 1, "fp32").precision == "fp32"
    assert "int8.image.cosine" in (bundle.path / "MODEL_CARD.md").read_text()


@pytest.mark.full
def test_what_loses_too_much_is_refused_with_its_figures(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, bundle = built
    monkeypatch.setattr(precision, "COSINE", 1.1)
    plain = {"text": bundle.manifest.towers["text"].model_copy(update={"variants": {}, "defaults": {}})}
    plain["image"] = bundle.manifest.towers["image"].model_copy(update={"variants": {}, "defaults": {}})
    pictures = recipe.model_copy(update={"pairs": {"pictures": recipe.pairs["pictures"]}})
    shutil.copytree(bundle.path, tmp_path / "copy")
    towers, figures = precision.make_variants(pictures, pipeline.encoders(recipe), plain, tmp_path / "copy")  # type: ignore[arg-type]
    for modality, tower in towers.items():
        assert tower.precisions == ("fp32",)
        assert tower.default("cpu") == tower.default("cuda") == "fp32"
        assert figures[f"int8.{modality}.refused"] is True
        assert 0 < figures[f"int8.{modality}.cosine"] <= 1
    assert capsys.readouterr().err.count("refused") == 4
    refused = bundle.manifest.model_copy(update={"towers": towers})
    with pytest.raises(TowerError, match="ISTHMUS_PRECISION is 'int8', and the bundle's text tower comes in fp32 only"):
        Tower(Bundle(bundle.path, refused), "text", "cpu", 1, "int8")


@pytest.mark.full
def test_without_test_pairs_nothing_smaller_is_made(built: Built, tmp_path: Path) -> None:
    recipe, bundle = built
    towers = dict(bundle.manifest.towers)
    with pytest.raises(QuantiseError, match="no test pairs"):
        precision.make_variants(recipe.model_copy(update={"pairs": {}}), {}, towers, tmp_path)
    whole = recipe.model_copy(update={"export": ExportSpec()})
    assert precision.make_variants(whole, {}, towers, tmp_path) == (towers, {})


def test_the_gates() -> None:
    assert Measured(0.99, 0.9, 0.5, 0.8).passes
    assert not Measured(0.9899, 0.98, 0.0, 1.0).passes
    assert not Measured(1.0, 1.0, 0.51, 1.0).passes
    assert Measured(1.0, 1.0, -3.0, 1.0).passes
    assert not Measured(float("nan"), 1.0, 0.0, 1.0).passes
    assert not Measured(1.0, 1.0, float("nan"), 1.0).passes


@pytest.mark.parametrize(
    ("export", "message"),
    [
        ({"precisions": ["int8"]}, "hold fp32"),
        ({"precisions": ["fp32", "int8", "int8"]}, "must be different"),
        ({"precisions": ["fp32", "int4"]}, "export.precisions"),
        ({"calibration": 0}, "export.calibration"),
    ],
)
def test_a_recipe_that_asks_for_the_impossible(make_recipe: MakeRecipe, export: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(export=export)


def prepared(recipe: Recipe, modality: Any, count: int = 8) -> tuple[Any, list[Any]]:
    encoder = pipeline.encoders(recipe)[modality]
    pairs = read_pairs(recipe, "tones" if modality == "audio" else "pictures")["train"]
    items: Any = pairs.texts if modality == "text" else pairs.media
    return encoder, [preparer(encoder)(item) for item in items[:count]]


def run(graph: Path | bytes, encoder: Any, items: list[Any]) -> np.ndarray:
    inputs = dict(zip(encoder.preprocessing.inputs, collate(encoder.preprocessing, items), strict=True))
    return np.asarray(session(graph).run([OUTPUT], inputs)[0])


def in_seven_bits(model: onnx.ModelProto) -> bool:
    """Return whether two products of an activation (0 … 255) with weights fit into sixteen bits, as AVX2 adds them."""
    tables = [numpy_helper.to_array(each) for each in model.graph.initializer if each.data_type == TensorProto.INT8]
    largest = [int(np.abs(table.astype(np.int32)).max()) for table in tables if table.size > 1]
    assert largest
    return 2 * 255 * max(largest) <= 32_767


@pytest.mark.parametrize("modality", ["image", "audio", "text"])
@pytest.mark.full
def test_static_int8_leaves_the_projector_alone_and_rows_to_themselves(
    built: Built, tmp_path: Path, modality: Any
) -> None:
    recipe, bundle = built
    encoder, items = prepared(recipe, modality)
    target = tmp_path / "int8.onnx"
    source = bundle.path / f"{modality}.onnx"
    static(source, target, batches(source, encoder.preprocessing, items))
    model = onnx.load(target)
    made = {name: node for node in model.graph.node for name in node.output}
    kinds = {"MatMul"} if modality == "text" else {"Conv"}
    quantised = [
        n for n in model.graph.node if n.op_type in kinds and made.get(n.input[1], n).op_type == "DequantizeLinear"
    ]
    assert quantised
    if modality != "text":
        convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
        assert [node.name for node in quantised] == convolutions[3:]
    assert not any(node.name.startswith(HEAD) for node in quantised)
    heads = [node for node in model.graph.node if node.name.startswith(HEAD)]
    assert heads
    assert not any(made[name].op_type == "DequantizeLinear" for n in heads for name in n.input if name in made)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = weights[made[quantised[0].input[1]].input[1]]
    assert list(scale.dims) == [weights[made[quantised[0].input[1]].input[0]].dims[1 if modality == "text" else 0]]
    assert in_seven_bits(model)
    together = run(target, encoder, items)
    for item, vector in zip(items, together, strict=True):
        assert float(run(target, encoder, [item])[0] @ vector) > 0.99999


@pytest.mark.full
def test_smoothing_changes_no_vector(built: Built) -> None:
    recipe, bundle = built
    encoder, items = prepared(recipe, "text")
    model = onnx.load(bundle.path / "text.onnx")
    smooth = smoothed(model, batches(bundle.path / "text.onnx", encoder.preprocessing, items))
    assert sum(node.op_type == "Mul" for node in smooth.graph.node) > sum(n.op_type == "Mul" for n in model.graph.node)
    before, after = run(bundle.path / "text.onnx", encoder, items), run(smooth.SerializeToString(), encoder, items)
    assert np.allclose(before, after, atol=1e-5)


@pytest.mark.full
def test_int8_needs_real_inputs(built: Built, tmp_path: Path) -> None:
    with pytest.raises(QuantiseError, match="needs real inputs"):
        static(built[1].path / "text.onnx", tmp_path / "never.onnx", [])


@pytest.mark.full
def test_half_keeps_inputs_outputs_and_projector(built: Built, tmp_path: Path) -> None:
    recipe, bundle = built
    encoder, items = prepared(recipe, "image")
    half(bundle.path / "image.onnx", tmp_path / "half.onnx")
    model = onnx.load(tmp_path / "half.onnx")
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert model.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        for name in node.input:
            if node.op_type in ("Conv", "Gemm") and name in weights:
                expected = "FLOAT" if node.name.startswith(HEAD) else "FLOAT16"
                assert weights[name] == onnx.TensorProto.DataType.Value(expected), node.name
    assert (run(bundle.path / "image.onnx", encoder, items) * run(tmp_path / "half.onnx", encoder, items)).sum(
        1
    ).min() > 0.999


@pytest.mark.full
def test_a_damaged_or_missing_variant_is_named(built: Built, tmp_path: Path) -> None:
    _, bundle = built
    shutil.copytree(bundle.path, tmp_path / "copy")
    path = tmp_path / "copy" / "text.int8.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    with pytest.raises(BundleError, match=r"text\.int8\.onnx is damaged"):
        read_bundle(tmp_path / "copy")
    manifest = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    del manifest["towers"]["text"]["variants"]["fp16"]
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="the default on cuda is fp16, and there is no such variant"):
        read_bundle(tmp_path / "copy")


def test_texts_that_calibrate_do_not_judge() -> None:
    texts = [str(number) for number in range(900)]
    calibrating, judging = calibrating_and_judging(texts)
    assert len(calibrating) == 256 and sorted([*calibrating, *judging]) == sorted(texts)
    assert [len(part) for part in calibrating_and_judging(texts[:300])] == [100, 200]


def test_a_text_that_finds_itself_among_other_neighbours_does_not_pass() -> None:
    """Cosines are about 0.8, as many text models give: itself is far nearer than all others."""
    rng = np.random.default_rng(0)
    own = l2_normalise(rng.normal(size=(200, 384)) + 2 * rng.normal(size=(1, 384)))
    variants = [l2_normalise(own + noise * rng.normal(size=own.shape)) for noise in (0.001, 0.0071)]
    near, far = [measured_by_neighbours(own, variant) for variant in variants]
    assert near.passes and near.top10_overlap >= OVERLAP
    assert far.passes and far.top10_overlap < OVERLAP
    assert measured_by_neighbours(own, own).top10_overlap == 1
