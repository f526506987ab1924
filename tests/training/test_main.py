"""The command line, on tiny real encoders and generated media."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from service.contract.bundle import read_bundle
from tests.training import tiny
from training.__main__ import main
from training.encoders import load_encoder
from training.recipe import load_recipe


@pytest.fixture
def recipe(tiny_root: Path, tmp_path: Path) -> Path:
    return tiny.write_recipe(tmp_path / "tiny.yaml", tiny.recipe_values(tiny_root))


@pytest.mark.full
def test_one_command_and_its_steps_give_the_same_space(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {m: load_encoder(load_recipe(recipe), m).weights_sha256 for m in ("image", "audio", "text")}
    common = [str(recipe), "--cache", str(tmp_path / "cache"), "--work"]
    assert main(["run", *common, str(tmp_path / "one"), "--out", str(tmp_path / "bundle")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["bundle"] == str(tmp_path / "bundle")
    assert {"pictures.i2t.r1", "pictures.t2i.r10", "tones.top1", "tones.seen", "parity.audio"} <= set(last)
    for step in ("pairs", "features", "train", "evaluate"):
        assert main([step, *common, str(tmp_path / "steps")]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["export", *common, str(tmp_path / "steps"), "--out", str(tmp_path / "second")]) == 0
    first, second = read_bundle(tmp_path / "bundle").manifest, read_bundle(tmp_path / "second").manifest
    assert first.space == second.space
    assert first.evaluation == second.evaluation
    after = {m: tower.encoder.weights_sha256 for m, tower in first.towers.items()}
    assert after == before == {m: load_encoder(load_recipe(recipe), m).weights_sha256 for m in before}  # type: ignore[arg-type]


def test_what_goes_wrong_is_one_line(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe), "--set", "train.steps=none"]) == 2
    assert "train.steps" in capsys.readouterr().err
    assert main(["evaluate", str(recipe), "--work", str(tmp_path / "new"), "--cache", str(tmp_path / "c")]) == 2
    assert "run the train step first" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    common = [str(recipe), "--cache", str(tmp_path / "c"), "--work", str(tmp_path / "w")]
    assert main(["run", *common, "--out", str(tmp_path / "full")]) == 2
    assert "not overwriting it" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("attribution=absent.md", "attribution: .*absent.md is not there"),
        ("train.start=absent.safetensors", "train.start: .*absent.safetensors is not there"),
        ("texts={words: {table: absent.csv}}", "texts.words: .*absent.csv cannot be read: No such file"),
        ("texts={words: {table: damaged.csv.gz}}", "texts.words: .*damaged.csv.gz cannot be read"),
        (
            "emergent={a: {queries: tones, gallery: [pictures], shows: {cat: [red]}}}",
            "a.shows: cat is no class of tones",
        ),
        ("emergent={a: {queries: tones, gallery: [pictures], shows: {cat: []}}}", "shows.cat: .* at least 1 item"),
    ],
)
def test_what_only_later_steps_need_is_looked_at_first(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
) -> None:
    (tmp_path / "damaged.csv.gz").write_bytes(b"no gzip")
    changes = ["--set", override.replace("damaged", f"{tmp_path}/damaged")]
    assert main(["pairs", str(recipe), *changes, "--cache", str(tmp_path / "cache")]) == 2
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0.png,red"], "1 media with 1 texts or classes to train on: nothing to tell apart"),
        (["0.png,red", "1.png,red"], "2 media with 1 texts or classes to train on"),
        (["0.png,red", "0.png,blue"], "1 media with 2 texts or classes to train on"),
        (["0.png,собака", "1.png,кошка"], "encoders.text gives all 2 texts of the train split the same features"),
    ],
)
def test_pairs_that_cannot_be_told_apart_are_not_trained_on(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[str], said: str
) -> None:
    (tmp_path / "few.csv").write_text("\n".join(["file,caption", *rows]) + "\n", encoding="utf-8")
    pairs = {"few": {"modality": "image", "folder": "pictures", "table": str(tmp_path / "few.csv"), "text": "caption"}}
    recipe = tiny.write_recipe(tmp_path / "few.yaml", tiny.recipe_values(tiny_root, pairs=pairs))
    assert main(["train", str(recipe), "--work", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")]) == 2
    told = capsys.readouterr().err
    assert said in told.splitlines()[-1]
    assert "encoders.audio: no pairs have such media" in told or "encoders.text" not in said


def test_one_class_cannot_be_learned(tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.csv").write_text("file,class\n0.wav,tone\n1.wav,tone\n2.wav,tone\n")
    pairs = {"one": {"modality": "audio", "folder": "sounds", "table": str(tmp_path / "one.csv"), "label": "class"}}
    recipe = tiny.write_recipe(tmp_path / "one.yaml", tiny.recipe_values(tiny_root, pairs=pairs))
    assert main(["train", str(recipe), "--work", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")]) == 2
    assert "3 media with 1 texts or classes" in capsys.readouterr().err.splitlines()[-1]


def test_heads_are_for_the_encoders_that_they_learned_from(
    recipe: Path, tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(tiny_root / "resnet", tmp_path / "resnet")
    common = [str(recipe), "--cache", str(tmp_path / "cache"), "--set", "train.steps=4", "--set"]
    common += [f"encoders.image.folder={folder}", "--work"]
    assert main(["train", *common, str(tmp_path / "one")]) == 0
    assert main(["evaluate", *common, str(tmp_path / "one")]) == 0
    capsys.readouterr()
    for other, said in (("dinov2", "another encoder than encoders.image"), ("roberta", "")):
        changed = f"encoders.{'image' if said else 'text'}.folder={tiny_root / other}"
        assert main(["evaluate", *common, str(tmp_path / "one"), "--set", changed]) == 2
        assert "run the train step again" in capsys.readouterr().err.splitlines()[-1]
    assert main(["evaluate", *common, str(tmp_path / "one"), "--set", "projector.dimensions=8"]) == 2
    assert "does not fit the recipe's projector" in capsys.readouterr().err
    weights = load_file(folder / "model.safetensors")
    save_file(
        {key: value * 2 if value.ndim == 4 else value for key, value in weights.items()}, folder / "model.safetensors"
    )
    for command in (["evaluate"], ["export", "--out", str(tmp_path / "bundle")]):  # of the same widths
        assert main([*command, *common, str(tmp_path / "one")]) == 2
        assert "another encoder than encoders.image is now" in capsys.readouterr().err.splitlines()[-1]
    assert main(["train", *common, str(tmp_path / "two")]) == 0
    files = [str(tmp_path / run / "projectors.safetensors") for run in ("one", "two")]
    assert main(["merge", *files, "--out", str(tmp_path / "merged.safetensors")]) == 2
    assert "different encoders of image" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "one"), files[1], "--out", str(tmp_path / "merged.safetensors")]) == 2
    assert "is a folder: name the projectors.safetensors in it" in capsys.readouterr().err


@pytest.mark.full
def test_training_imports_nothing_of_service_but_the_contract() -> None:
    code = (
        "import sys, training.__main__\n"
        "print([n for n in sys.modules if n.startswith('service.') and not n.startswith('service.contract')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_reader_that_has_seen_enough_ends_a_command(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as nobody:
        monkeypatch.setattr(sys, "stdout", nobody)
        assert main(["doctor", str(recipe)]) == 1
