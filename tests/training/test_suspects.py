import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training import tiny
from tests.training.conftest import MakeRecipe
from training.__main__ import main
from training.commands.suspects import verdict
from training.pairs import PairError, read_pairs


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 50), neighbours=st.integers(1, 9))
def test_votes_are_those_of_brute_force(seed: int, neighbours: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(30, 5)).astype(np.float32)
    labels = rng.integers(0, 4, 30)
    found = verdict(features, labels, neighbours)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for row in range(30):
        cosine = unit @ unit[row]
        cosine[row] = -np.inf
        near = np.argsort(-cosine)[:neighbours]
        weight = np.maximum(cosine[near], 1e-6)
        votes = [weight[labels[near] == label].sum() / weight.sum() for label in range(4)]
        assert found.own[row] == pytest.approx(votes[labels[row]], abs=1e-5)
        votes[labels[row]] = 0.0
        assert found.share[row] == pytest.approx(max(votes), abs=1e-5)
        assert found.other[row] == (int(np.argmax(votes)) if max(votes) > 0 else -1)


def test_planted_wrong_labels_are_found_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 25)
    features = (np.eye(4)[labels] + rng.normal(0, 0.1, (100, 4))).astype(np.float32)
    planted = rng.choice(100, 6, replace=False)
    wrong = labels.copy()
    wrong[planted] = (labels[planted] + 1) % 4
    found = verdict(features, wrong, 10)
    assert set(found.doubtful().tolist()) == set(planted.tolist())
    assert (found.other[planted] == labels[planted]).all()


def test_what_is_found_can_be_left_out_of_training(
    tiny_root: Path, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    make_recipe()
    table = tmp_path / "suspects.csv"
    arguments = ["suspects", tmp_path / "recipe.yaml", "--pairs", "tones", "--neighbours", "3", "--out", table]
    assert main([str(each) for each in [*arguments, "--cache", tmp_path / "cache"]]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert line["suspects"] == len(rows) <= line["items"]
    every = read_pairs(make_recipe(), "tones")["train"].media
    (tmp_path / "out.csv").write_text(f"file\n{every[0].name}\n")
    values = tiny.recipe_values(tiny_root)["pairs"]["tones"] | {"exclude": str(tmp_path / "out.csv")}
    left = read_pairs(make_recipe(pairs={"tones": values}), "tones")["train"].media
    assert left == every[1:]


def test_media_with_whole_paths_are_called_as_a_list_may_call_them(
    tiny_root: Path, tmp_path: Path, make_recipe: MakeRecipe
) -> None:
    rows = [line.split(",") for line in (tiny_root / "sounds.csv").read_text().splitlines()]
    elsewhere = tmp_path / "0.wav"
    elsewhere.write_bytes((tiny_root / "sounds/0.wav").read_bytes())
    paths = [str(elsewhere), *(str(tiny_root / "sounds" / file) for file, *_ in rows[2:])]
    labels = [["low_tone", "high_tone"][index % 2] for index in range(len(paths))]  # many of them are wrong
    lines = [f"{path},{label},0" for path, label in zip(paths, labels, strict=True)]
    (tmp_path / "whole.csv").write_text("\n".join(["file,class,fold", *lines]) + "\n")
    values = tiny.recipe_values(tiny_root)["pairs"]["tones"] | {"table": str(tmp_path / "whole.csv")}
    make_recipe(pairs={"tones": values})
    arguments = ["suspects", tmp_path / "recipe.yaml", "--pairs", "tones", "--neighbours", "3", "--out"]
    common = ["--cache", tmp_path / "cache"]
    assert main([str(one) for one in [*arguments, tmp_path / "suspects.csv", *common]]) == 0
    with (tmp_path / "suspects.csv").open(newline="") as stream:
        found = [row["file"] for row in csv.DictReader(stream)]
    assert found and {*found} <= {str(elsewhere), *(f"{index}.wav" for index in range(1, 18))}
    left = read_pairs(make_recipe(pairs={"tones": values | {"exclude": str(tmp_path / "suspects.csv")}}), "tones")
    assert len(left["train"].media) == len(paths) - len(found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pairs", "nothing"], "has no pairs named nothing"),
        (["--pairs", "pictures"], "pairs.pictures have no labels"),
        (["--pairs", "tones", "--neighbours", "99"], "--neighbours must be from 1 to"),
    ],
)
def test_errors_name_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    make_recipe()
    assert main(["suspects", str(tmp_path / "recipe.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_exclusion_without_its_column_is_refused(tiny_root: Path, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    (tmp_path / "out.csv").write_text("name\na.wav\n")
    values = tiny.recipe_values(tiny_root)["pairs"]["tones"] | {"exclude": str(tmp_path / "out.csv")}
    with pytest.raises(PairError, match="has no column file"):
        read_pairs(make_recipe(pairs={"tones": values}), "tones")
