from pathlib import Path
from typing import Any

import pytest

from tests.training.select.conftest import MakeSelection
from training.measure.select.candidates import LatentSemantics, Network, SelectError, WordVectors, load_selection
from training.recipe import RecipeError

SELECTIONS = sorted((Path(__file__).parents[3] / "training/recipes/select").glob("*.yaml"))


@pytest.mark.parametrize("path", SELECTIONS, ids=lambda path: path.stem)
def test_every_shipped_selection_is_valid(path: Path) -> None:
    assert len(load_selection(path).candidates["image"]) > 2


def test_the_recipes_own_encoders_compete(make_selection: MakeSelection) -> None:
    selection = load_selection(make_selection({"image": {"early": {"folder": "mobilenet", "layer": 2}}}))
    assert list(selection.candidates["image"]) == ["recipe", "early"]
    assert list(selection.candidates["text"]) == ["recipe"]
    assert set(selection.recipe.pairs) == {"pictures", "tones"}


def test_every_kind_of_candidate_is_told_by_its_keys(make_selection: MakeSelection) -> None:
    path = make_selection({"text": {"a": {"lsa": 4}, "b": {"words": "w.txt"}, "c": {"folder": "bert", "layer": 1}}})
    kinds = [type(source) for source in load_selection(path).candidates["text"].values()]
    assert kinds == [Network, LatentSemantics, WordVectors, Network]


def test_overrides_add_candidates_and_pairs_are_chosen(make_selection: MakeSelection, tmp_path: Path) -> None:
    overrides = ["candidates.text.more={folder: bert, pooling: cls}", f"data.root={tmp_path}"]
    selection = load_selection(make_selection({}), overrides, ["tones"])
    assert list(selection.candidates["text"]) == ["recipe", "more"]
    assert list(selection.recipe.pairs) == ["tones"]
    assert selection.recipe.data.root == tmp_path


def test_paths_that_start_with_a_dot_are_the_files_own(make_selection: MakeSelection, tmp_path: Path) -> None:
    path = make_selection({"image": {"student": {"onnx": "./student"}}, "text": {"w": {"words": "./w.txt"}}})
    selection = load_selection(path)
    student, words = selection.candidates["image"]["student"], selection.candidates["text"]["w"]
    assert isinstance(student, Network) and student.onnx == tmp_path / "student"
    assert isinstance(words, WordVectors) and words.words == tmp_path / "w.txt"


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ({"image": {"a": {"lsa": 4}}}, "candidates.image.a: words and lsa are text"),
        ({"text": {"a": {"lsa": 0}}}, "candidates.text.a.lsa: "),
        ({"text": {"a": {"folder": "bert", "layre": 1}}}, "candidates.text.a.layre: "),
        ({"text": {"a": {"folder": "bert", "layer": 1, "layers": [0]}}}, "layer cannot go with"),
        ({"image": {"a": {"onnx": "student", "random": True}}}, "random cannot go with"),
        ({"text": {"a.b": {"lsa": 4}}}, "candidates.text.a.b"),
        ({"video": {}}, "candidates.video"),
        ({"image": {"a": 3}}, "candidates.image.a"),
    ],
)
def test_a_wrong_candidate_is_named(make_selection: MakeSelection, candidates: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectError, match=message):
        load_selection(make_selection(candidates))


def test_what_else_is_wrong_is_named(make_selection: MakeSelection, tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(SelectError, match="no pairs named birds; it has pictures, tones"):
        load_selection(make_selection({}), pairs=["birds"])
    with pytest.raises(SelectError, match="projector: "):
        load_selection(make_selection({}, projector={"kind": "mlp"}))
    with pytest.raises(RecipeError, match=r"absent\.yaml: cannot be read"):
        load_selection(make_selection({}), ["recipe=absent.yaml"])
    (tmp_path / "bare.yaml").write_text("candidates: {}\n")
    with pytest.raises(SelectError, match="recipe must name"):
        load_selection(tmp_path / "bare.yaml")
    encoders = {"image": {"folder": "mobilenet"}, "text": {"folder": "bert"}}
    without_sounds = {"encoders": encoders, "pairs": {}}
    with pytest.raises(SelectError, match="no pairs to measure on"):
        load_selection(make_selection({}, recipe=without_sounds))
    path = make_selection({"audio": {"a": {"folder": "yamnet"}}}, recipe=without_sounds)
    with pytest.raises(SelectError, match=r"candidates\.audio: its recipe has no audio encoder"):
        load_selection(path)
