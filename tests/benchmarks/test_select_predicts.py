import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.select_predicts import Measured, main, tell
from tests.training import tiny
from training.measure.select.streaming import MEASURES, Alignment

OPTIONS = argparse.Namespace(source="x", items=1, steps=1, batch_size=2, dimensions=4, seed=0)


def measured(media: str, text: str, r1: float, *values: float, control: bool = False) -> Measured:
    return Measured(Alignment(media, text, *values), r1, control)


def test_correlations_are_over_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        measured("a", "x", 6.0, 0.6, 0.1, 0.5, 0.5),
        measured("a", "y", 5.0, 0.5, 0.2, 0.5, 0.6),
        measured("a", "z", 4.0, 0.4, 0.3, 0.5, 0.4),
        measured("b", "x", 3.0, 0.3, 0.4, 0.5, 0.3),
        measured("b", "y", 2.0, 0.2, 0.5, 0.5, 0.1),
        measured("b", "z", 1.0, 0.1, 0.6, 0.5, 0.2),
        measured("control", "x", 0.5, 0.9, 0.0, 0.5, 0.0, control=True),
    ]
    result = tell(rows, OPTIONS)
    assert result["rho.cka.pretrained"] == result["rho.cka.text"] == 1.0
    assert result["rho.cka.all"] < 0.6
    assert result["picked.cka"] == 0.5
    assert result["rho.rbf_cka.pretrained"] == -1.0
    assert result["rho.mutual_knn.all"] is None
    assert result["rho.loo_knn.text"] == 0.5
    assert result["rho.cka.media"] is None  # two of each are no ranking
    assert "control" in capsys.readouterr().out


@pytest.mark.full
def test_it_runs_and_goes_on_where_it_stopped(
    tmp_path: Path, tiny_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe_values(tiny_root))
    candidates: dict[str, Any] = {
        "image": {"control": {"folder": "mobilenet", "random": True}},
        "text": {"lsa": {"lsa": 4}, "first": {"folder": "bert", "layer": 1}},
    }
    path = tmp_path / "selection.yaml"
    path.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "candidates": candidates}))
    command = [str(path), "--source", "pictures", "--cache", str(tmp_path / "cache"), "--work", str(tmp_path / "work")]
    command += ["--steps", "20", "--batch-size", "8", "--dimensions", "8"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["pairs"] == 6
    assert {f"rho.{measure}.{over}" for measure in MEASURES for over in ("all", "pretrained", "text", "media")} <= set(
        result
    )
    assert 0 < result["r1.recipe.recipe"] <= 100
    (stored,) = (tmp_path / "work").glob("r1-*.json")
    kept = json.loads(stored.read_text())
    interrupted = dict(list(kept.items())[:2])
    stored.write_text(json.dumps({key: value + 1000 for key, value in interrupted.items()}))
    assert main(command) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept_values = [again[key] for key in again if key.startswith("r1.") and again[key] > 1000]
    assert len(kept_values) == 2
    assert [again[key] for key in again if key.startswith("r1.") and again[key] <= 1000] == pytest.approx(
        [result[key] for key in again if key.startswith("r1.") and again[key] <= 1000]
    )


def test_labelled_pairs_are_refused(tmp_path: Path, tiny_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe_values(tiny_root))
    path = tmp_path / "selection.yaml"
    path.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "candidates": {}}))
    assert main([str(path), "--source", "tones"]) == 2
    assert "captions with a train and a test split are needed" in capsys.readouterr().err
