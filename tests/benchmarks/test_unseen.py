"""The benchmark of unseen classes on the tiny data: every class is unseen once, and its text head stays as it was."""

import json
from pathlib import Path

import pytest

from benchmarks import unseen
from tests.matrix import matrix
from tests.training import tiny
from training.__main__ import main as training


@pytest.mark.parametrize("bank", matrix([0, 6], 6))
def test_every_class_is_unseen_once(
    concept_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bank: int
) -> None:
    path = tiny.write_recipe(
        tmp_path / "tiny.yaml", tiny.recipe_values(concept_root, **tiny.concept_values(concept_root))
    )
    work, cache = ["--work", str(tmp_path / "work")], ["--cache", str(tmp_path / "cache")]
    work += ["--set", f"projector.querybank={bank}"]
    assert training(["train", str(path), *work, *cache]) == 0
    before = (tmp_path / "work/projectors.safetensors").read_bytes()
    options = ["--pairs", "tones", "--splits", "3", "--steps", "12"]
    unseen.main([str(path), *work, *cache, *options])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["split"] for row in last["splits"]] == [0, 1, 2]
    assert last["tones.unseen.top1"] == pytest.approx(sum(row["unseen"] for row in last["splits"]) / 3, abs=0.01)
    assert (tmp_path / "work/projectors.safetensors").read_bytes() == before
