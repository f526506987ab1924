import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.training import tiny
from tests.training.conftest import MakeRecipe
from training.__main__ import main
from training.commands.merge import MergeError, merged
from training.heads.projector import Head
from training.heads.trained import Trained, save_projectors
from training.recipe import ProjectorSpec


def write(path: Path, seed: int, init: str = "same", **changes: Any) -> Path:
    torch.manual_seed(seed)
    spec = ProjectorSpec(**{"kind": "mlp", "dimensions": 8, "hidden": 6, **changes})
    heads: dict[Any, Head] = {"image": Head("image", 5, spec), "text": Head("text", 4, spec)}
    save_projectors(path, Trained(heads, 0.04 if seed else 0.01, {"text": [0.0] * 8}, [], {}, init))
    return path


def run(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    return write(tmp_path / "a", 0), write(tmp_path / "b", 1), tmp_path / "out/merged.safetensors"


def test_the_endpoints_are_the_files_themselves(files: tuple[Path, Path, Path]) -> None:
    first, second, out = files
    for alpha, same in ((0, first), (1, second)):
        assert run(first, second, "--alpha", alpha, "--out", out) == 0
        assert out.read_bytes() == same.read_bytes()


@settings(max_examples=20)
@given(st.floats(0.0, 1.0))
def test_between_them_every_weight_is_the_mean(alpha: float) -> None:
    first, second = torch.randn(3, 2), torch.randn(3, 2)
    metadata = {"temperature": "0.01", "means": "{}", "init": "x"}
    tensors, kept = merged(({"w": first}, metadata), ({"w": second}, metadata | {"temperature": "0.04"}), alpha)
    assert torch.allclose(tensors["w"], (1 - alpha) * first + alpha * second, atol=1e-6)
    assert float(kept["temperature"]) == pytest.approx(0.01 * 4**alpha)
    assert kept["init"] == "x"


def test_the_middle_is_written(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, second, out = files
    assert run(first, second, "--out", out) == 0
    left, right, middle = (load_file(path) for path in (first, second, out))
    assert all(torch.allclose(middle[key], (left[key] + right[key]) / 2, atol=1e-6) for key in left)
    assert '"alpha": 0.5' in capsys.readouterr().out


def test_what_both_learned_from_is_what_the_merged_one_learned_from() -> None:
    made = [{"of": "a", "licence": "MIT"}, {"of": "b", "licence": "CC-BY-NC-4.0"}]
    metadata = {"temperature": "0.01", "means": "{}", "init": "x"}
    first, second = (metadata | {"licences": json.dumps([each])} for each in made)
    for left, right, expected in ((first, second, ["a", "b"]), (metadata, second, ["b"]), (metadata, metadata, [])):
        _, kept = merged(({"w": torch.ones(1)}, left), ({"w": torch.ones(1)}, right), 0.5)
        assert [each["of"] for each in json.loads(kept["licences"])] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"init": "other"}, "different initialisations"), ({"hidden": 7}, "image.pooled.down.weight is")],
)
def test_what_cannot_be_averaged_is_refused(
    files: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    other = write(tmp_path / "c", 2, **changes)
    assert run(files[0], other, "--out", files[2]) == 2
    assert message in capsys.readouterr().err
    assert not files[2].exists()


def test_wrong_arguments_are_named(files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    first, second, out = files
    assert run(first, second, "--alpha", 0, 1, "--out", out) == 2
    assert "several --alpha need --recipe" in capsys.readouterr().err
    (out.parent / "text").write_text("hello")
    assert run(first, out.parent / "text", "--out", out) == 2
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(first, second, "--alpha", 1.5, "--out", out)
    assert issubclass(MergeError, ValueError)


def test_a_sweep_writes_the_best_on_validation(
    make_recipe: MakeRecipe, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny.recipe_values(tiny_root)
    values["train"] |= {"steps": 20, "baseline": False}
    for name, source in (("a", "pictures"), ("b", "tones")):  # each learns one source; both start alike
        weights = {key: {**pairs, "weight": 1.0 if key == source else 1e-9} for key, pairs in values["pairs"].items()}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, "pairs": weights}))
        common = ["--cache", str(tmp_path / "cache"), "--work", str(tmp_path / name)]
        assert main(["train", str(tmp_path / f"{name}.yaml"), *common]) == 0
    first, second = (tmp_path / name / "projectors.safetensors" for name in "ab")
    sweep = ("--alpha", 0, 0.5, 1, "--recipe", tmp_path / "a.yaml", "--cache", tmp_path / "cache")
    capsys.readouterr()
    assert run(first, second, *sweep, "--out", tmp_path / "m") == 0
    result = yaml.safe_load(capsys.readouterr().out)
    scores = {alpha: result[f"score.{alpha:g}"] for alpha in (0, 0.5, 1)}
    assert result["alpha"] == max(scores, key=lambda alpha: scores[alpha])
    assert np.isfinite(list(scores.values())).all()
