"""Graphs of sounds that are given the features of earlier rows: whatever the head and precision, nothing changes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from service.contract.bundle import EARLIER_ROWS, OUTPUT, ROWS
from service.contract.patches import LogMelPatches
from tests.training import tiny
from tests.training.test_export import PAPER
from training.bundle.export import export_tower
from training.bundle.quantise import batches, half, static
from training.encoders import load_encoder
from training.graphs import join_earlier_rows, session, without_earlier_rows
from training.heads.projector import Head
from training.recipe import load_recipe

_COUNTS = (5, 1, 8)  # rows of three sounds


def tower(root: Path, folder: Path, kind: str) -> tuple[Any, Path]:
    values = tiny.recipe_values(root, projector={"kind": kind, "dimensions": 16, "hidden": 32}, encoders=PAPER)
    recipe = load_recipe(tiny.write_recipe(folder / "recipe.yaml", values))
    encoder = load_encoder(recipe, "audio")
    torch.manual_seed(1)
    export_tower(encoder, Head("audio", encoder.width, recipe.projector).eval(), folder / "audio.onnx")
    return encoder, folder / "audio.onnx"


@pytest.fixture(scope="module")
def mlp(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return tower(tiny_root, tmp_path_factory.mktemp("mlp"), "mlp")


def rows_of(encoder: Any, seed: int = 0) -> list[Any]:
    spec = encoder.preprocessing
    assert isinstance(spec, LogMelPatches)
    rng = np.random.default_rng(seed)
    return [spec.prepare(rng.normal(0, 0.1, 15_600 + 7_680 * (count - 1)).astype(np.float32)) for count in _COUNTS]


def in_two(graph: Path, arrays: list[Any], first: int, outputs: list[str]) -> list[np.ndarray]:
    """The graph's outputs where it is given what it made of the first rows."""
    patches, weights = arrays
    running = session(graph)
    (earlier,) = running.run([ROWS], {"patches": patches[:first], "weights": weights[:, :first]})
    given = {"patches": patches[first:], "weights": weights, EARLIER_ROWS: earlier}
    return [np.asarray(each) for each in running.run(outputs, given)]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["linear", "mlp", "token"])
def test_rows_that_were_encoded_before_count_as_ones_own(tiny_root: Path, tmp_path: Path, kind: str) -> None:
    encoder, graph = tower(tiny_root, tmp_path, kind)
    arrays = encoder.preprocessing.collate(rows_of(encoder))
    (whole,) = session(graph).run([OUTPUT], dict(zip(("patches", "weights"), arrays, strict=True)))
    for first in (1, 5, 9, 13):
        (found,) = in_two(graph, arrays, first, [OUTPUT])
        np.testing.assert_allclose(found, whole, atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_other_precisions_can_be_given_earlier_rows_too(mlp: tuple[Any, Path], tmp_path: Path, precision: str) -> None:
    encoder, graph = mlp
    sounds, small = rows_of(encoder), tmp_path / f"audio.{precision}.onnx"
    if precision == "fp16":
        half(graph, small)
    else:
        static(graph, small, batches(graph, encoder.preprocessing, rows_of(encoder, seed=1)))
    arrays = encoder.preprocessing.collate(sounds)
    (whole,) = session(small).run([OUTPUT], dict(zip(("patches", "weights"), arrays, strict=True)))
    (exact,) = session(graph).run([OUTPUT], dict(zip(("patches", "weights"), arrays, strict=True)))
    (pieces,) = in_two(small, arrays, 7, [OUTPUT])
    np.testing.assert_allclose(pieces, whole, atol=1e-3)
    assert (whole * exact).sum(1).min() > 0.9


def test_the_input_is_taken_away_and_given_back(mlp: tuple[Any, Path]) -> None:
    _, graph = mlp
    model, before = onnx.load(graph), onnx.load(graph)
    width = without_earlier_rows(model)
    assert width is not None
    assert [value.name for value in model.graph.input] == ["patches", "weights"]
    onnx.checker.check_model(model)
    assert without_earlier_rows(model) is None, "there is none"
    join_earlier_rows(model, width)
    assert model.graph == before.graph
