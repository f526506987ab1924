import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import spaces, tiny
from training.doctor.machine import time_class
from training.recipe import load_recipe


@pytest.fixture
def root(tiny_root: Path, tmp_path: Path) -> Path:
    """Data and encoders of one's own, to break."""
    shutil.copytree(tiny_root, tmp_path / "data")
    return tmp_path / "data"


class Doctor:
    """Holds what `doctor` says of the tiny recipe with some changes."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str], *changes: str, **values: Any) -> None:
        recipe = tiny.write_recipe(root / "recipe.yaml", tiny.recipe_values(root, **values))
        sets = [part for change in changes for part in ("--set", change)]
        self.code = spaces.run("doctor", recipe, "--cache", root / "new/cache", *sets)
        captured = capsys.readouterr()
        self.last: dict[str, Any] = json.loads(captured.out.splitlines()[-1]) if captured.out else {}
        self.rows = [line.split(maxsplit=2) for line in captured.err.splitlines()]
        self.error = captured.err

    def lacking(self) -> dict[str, str]:
        return {what: detail for state, what, detail in self.rows if state == "missing"}


def test_a_recipe_that_has_all_it_needs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor = Doctor(root, capsys)
    assert (doctor.code, doctor.last["ok"], doctor.lacking()) == (0, True, {})
    assert doctor.last["time"] == "seconds"
    assert {key: doctor.last[f"items.{key}"] for key in ("image", "audio")} == {"image": 32, "audio": 18}
    recipe = load_recipe(root / "recipe.yaml")
    texts = doctor.last["items.text"]
    said = " ".join(" ".join(row) for row in doctor.rows)
    assert all(f"encoders.{modality}" in said for modality in recipe.encoders)
    assert "train 16, validation 8, test 8" in said and "captions.csv: 64 rows" in said
    widths = {row[1]: int(row[2].split(": ")[1].split()[0]) for row in doctor.rows if row[1].startswith("encoders.")}
    counts = {"image": 32, "audio": 18, "text": texts}
    assert doctor.last["cache_bytes"] == sum(2 * widths[f"encoders.{m}"] * n for m, n in counts.items())
    assert not (root / "new").exists()


def test_tokens_take_their_room(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The store takes, to a factor of two, what doctor says; merged tokens take less."""
    dino = ["encoders.image={folder: dinov2}", "projector.kind=token", "pairs.tones=null", "encoders.audio=null"]
    said = []
    for tokens in ("null", "8"):
        changes = [*dino[:2], f"encoders.image.tokens={tokens}"]
        said.append(Doctor(root, capsys, *changes).last["cache_bytes"])
        sets = [part for change in changes for part in ("--set", change)]
        cache = root / f"cache-{tokens}"
        assert spaces.run("features", root / "recipe.yaml", "--cache", cache, "--work", root / "work", *sets) == 0
        taken = sum(file.stat().st_size for file in cache.glob("*-*/*") if file.suffix != ".keys")
        assert 0.5 < taken / said[-1] < 2
    assert said[1] < said[0]


def test_cached_views_take_their_room_and_new_ones_take_time(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = [[], ["encoders.image.views=2"], ["encoders.image.views=online"]]
    plain, cached, online = (Doctor(root, capsys, *change) for change in changes)
    width = next(int(row[2].split(": ")[1].split()[0]) for row in plain.rows if row[1] == "encoders.image")
    assert cached.last["cache_bytes"] - plain.last["cache_bytes"] == 2 * 16 * 2 * width
    assert online.last["cache_bytes"] == plain.last["cache_bytes"]
    assert online.last["training_seconds"] > plain.last["training_seconds"]


def test_every_gap_in_the_data_is_found_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in (3, 4, 5):
        (root / f"pictures/{index}.png").unlink()
    (root / "sounds/2.wav").write_bytes(b"no sound")
    doctor = Doctor(root, capsys)
    assert (doctor.code, doctor.last["ok"], doctor.last["lacking"]) == (1, False, 2)
    lacking = doctor.lacking()
    assert lacking["pairs.pictures"] == f"3 of 32 media are not there, as {root}/pictures/3.png"
    assert "1 of 18 sampled media cannot be read" in lacking["pairs.tones"] and "2.wav" in lacking["pairs.tones"]


@pytest.mark.parametrize(
    ("change", "what", "detail"),
    [
        ("pairs.pictures.table=none.csv", "pairs.pictures", "none.csv is not there"),
        ("pairs.pictures.text=captoin", "pairs.pictures", "no column captoin; it has image, caption, part"),
        ("pairs.tones.folder=nowhere", "pairs.tones", "nowhere is not there"),
        ("pairs.tones.split_files={test: list.txt}", "pairs.tones", "list.txt is not there"),
        ("pairs.tones.splits={test: ['2']}", "pairs.tones", "the train split is empty"),
        ("encoders.image.folder=dino", "encoders.image", "holds no config.json"),
        ("encoders.text={package: not_installed_here}", "encoders.text", "not_installed_here is not installed"),
        ("encoders.audio={onnx: yamnet}", "encoders.audio", "needs encoder.onnx and encoder.json"),
        ("encoders.text={hub: no such//id}", "encoders.text", "Repo id must be"),
        ("train.start=earlier.safetensors", "train.start", "earlier.safetensors is not there"),
    ],
)
def test_what_is_lacking_is_named(
    root: Path, capsys: pytest.CaptureFixture[str], change: str, what: str, detail: str
) -> None:
    doctor = Doctor(root, capsys, change)
    assert doctor.code == 1
    assert list(doctor.lacking()) == [what]
    assert detail in doctor.lacking()[what]


def test_an_encoder_without_its_weights_or_with_broken_ones(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "resnet/model.safetensors").unlink()
    (root / "bert/model.safetensors").write_bytes(b"cut off")
    lacking = Doctor(root, capsys).lacking()
    assert set(lacking) == {"encoders.image", "encoders.text"}
    assert "model.safetensors" in lacking["encoders.image"]


def test_a_hub_id_that_cannot_be_reached(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port}")
    lacking = Doctor(root, capsys, "encoders.text={hub: someone/absent}").lacking()
    assert list(lacking) == ["encoders.text"]
    assert "someone/absent is not cached, and cannot be had" in lacking["encoders.text"]
    assert "give its `folder`" in lacking["encoders.text"]


def test_what_the_machine_lacks(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "no CUDA device" in Doctor(root, capsys, "train.device=cuda").lacking()["device"]


def test_a_recipe_that_is_none_is_another_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    doctor = Doctor(root, capsys, "train.steps=none")
    assert doctor.code == 2 and "train.steps" in doctor.error


def test_time_is_said_in_classes() -> None:
    assert [time_class(s) for s in (5, 300, 9000, 1e6)] == ["seconds", "minutes", "hours", "days"]
