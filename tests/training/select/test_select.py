import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from tests.training.select.conftest import MakeSelection
from training.__main__ import main
from training.measure.select.streaming import MEASURES
from training.recipe import load_recipe

CANDIDATES: dict[str, Any] = {
    "image": {"early": {"folder": "mobilenet", "layer": 2}, "control": {"folder": "mobilenet", "random": True}},
    "text": {"lsa": {"lsa": 4}, "first": {"folder": "bert", "layer": 1}},
}


def run(*arguments: object) -> int:
    return main(["select", *map(str, arguments)])


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


def test_captions_are_ranked_written_and_drawn(
    make_selection: MakeSelection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [make_selection(CANDIDATES), "--pairs", "pictures", "--cache", tmp_path / "cache", "--neighbours", 3]
    out = tmp_path / "out"
    assert run(*common, "--out", out, "--by", "rbf_cka") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    names = [(media, text) for media in ("recipe", "early", "control") for text in ("recipe", "lsa", "first")]
    best = max(names, key=lambda pair: result[f"pictures.{pair[0]}.{pair[1]}.rbf_cka"])
    assert result["pictures.best"] == list(best)
    assert result["pictures.rows"] == 16
    assert all(-1.0 <= result[f"pictures.{m}.{t}.{key}"] <= 1.0001 for m, t in names for key in MEASURES)
    rows = [line.split() for line in printed.err.splitlines() if line[:3].strip().isdigit()]
    assert next(tuple(row[1:3]) for row in rows) == best
    assert [float(row[4]) for row in rows] == sorted((float(row[4]) for row in rows), reverse=True)
    stored = json.loads((out / "select.json").read_text())
    assert stored["by"] == "rbf_cka" and len(stored["pairs"]["pictures"]["alignments"]) == 9
    assert stored["sizes"]["neighbours"] == 3
    drawing = "".join(ElementTree.parse(out / "pictures.svg").getroot().itertext())
    assert not drawing.isspace()


def test_a_second_run_encodes_nothing_and_gives_the_same(
    make_selection: MakeSelection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [make_selection(CANDIDATES), "--pairs", "pictures", "--cache", tmp_path / "cache", "--neighbours", 3]
    assert run(*common, "--out", tmp_path / "out") == 0
    first, drawn = last_line(capsys), (tmp_path / "out/pictures.svg").read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.keys")}
    assert times
    assert run(*common, "--out", tmp_path / "out") == 0
    assert last_line(capsys) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.keys")} == times
    assert len((tmp_path / "out/pictures.svg").read_bytes()) == len(drawn)


def test_an_interrupted_run_goes_on_with_its_features(
    make_selection: MakeSelection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C after the third of the encoded chunks: what was encoded before it is not encoded again."""
    from training import features

    monkeypatch.setattr(features, "_CHUNK", {"image": 4, "audio": 4, "text": 4})
    common = [make_selection(CANDIDATES), "--pairs", "pictures", "--neighbours", 3]
    assert run(*common, "--cache", tmp_path / "whole", "--out", tmp_path / "whole-out") == 0
    expected = last_line(capsys)
    done: list[int] = []
    whole = features.runner

    def interrupted(*arguments: Any, **named: Any) -> Any:
        inner = whole(*arguments, **named)

        def encode(prepared: Any) -> Any:
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(len(prepared))
            return inner(prepared)

        return encode

    with monkeypatch.context() as patched:
        patched.setattr(features, "runner", interrupted)
        assert run(*common, "--cache", tmp_path / "cache", "--out", tmp_path / "out") == 130
    assert "the same command goes on" in capsys.readouterr().err
    stopped = [path.stat().st_size // 16 for path in (tmp_path / "cache").rglob("*.keys")]
    assert sum(stopped) == sum(done) == 12
    encoded: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        inner = whole(*arguments, **named)

        def encode(prepared: Any) -> Any:
            encoded.append(len(prepared))
            return inner(prepared)

        return encode

    monkeypatch.setattr(features, "runner", counted)
    assert run(*common, "--cache", tmp_path / "cache", "--out", tmp_path / "out") == 0
    total = sum(path.stat().st_size // 16 for path in (tmp_path / "cache").rglob("*.keys"))
    assert sum(encoded) == total - 12
    resumed = last_line(capsys)
    assert resumed | {"out": ""} == expected | {"out": ""}


def test_labelled_pairs_are_compared_by_class_and_voted_by_medium(
    make_selection: MakeSelection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = {"by_class": {"modality": "image", "folder": "by_class"}}
    path = make_selection({"image": CANDIDATES["image"]}, recipe={"pairs": pairs})
    assert run(path, "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--neighbours", 2) == 0
    result = last_line(capsys)
    assert result["by_class.rows"] == 4
    # Colours are told apart even by a random network.
    assert result["by_class.recipe.own_knn"] > 0.8 and result["by_class.control.own_knn"] > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--items", "3"], "--items must be at least 4"),
        (["--batch", "2"], "--batch must be at least 4"),
        (["--neighbours", "0"], "--neighbours must be at least 1"),
        (["--pairs", "tones"], "3 rows are too few: k 10 needs 12"),
        (["--pairs", "birds"], "no pairs named birds"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    make_selection: MakeSelection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    path = make_selection({})
    assert run(path, "--cache", tmp_path / "cache", "--out", tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.full
def test_real_encoders_beat_their_controls(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parents[3] / "training/recipes/flickr8k-mobilenet-yamnet.yaml"
    image, text = (load_recipe(recipe).encoders[modality] for modality in ("image", "text"))
    controls = {
        "image": {"control": {**image.model_dump(mode="json", exclude_defaults=True), "random": True}},
        "text": {"control": {**text.model_dump(mode="json", exclude_defaults=True), "random": True}},
    }
    path = tmp_path / "selection.yaml"
    path.write_text(yaml.safe_dump({"recipe": str(recipe), "candidates": controls}))
    options = ["--set", f"data.root={data_root}", "--cache", tmp_path, "--out", tmp_path / "out", "--items", 64]
    assert run(path, "--pairs", "flickr8k", *options) == 0
    result = last_line(capsys)
    for measure in MEASURES:
        real = result[f"flickr8k.recipe.recipe.{measure}"]
        assert real > max(result[f"flickr8k.control.recipe.{measure}"], result[f"flickr8k.recipe.control.{measure}"])
