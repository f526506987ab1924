"""docs/how-to/train-from-a-hub.md: its recipe reads the publishers' files, and its commands train and serve."""

import json
from pathlib import Path

import httpx
import pytest

from examples.pages import Command, Reader, commands
from tests.training import hub
from training.pairs import read_pairs
from training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/how-to/train-from-a-hub.md").read_text()
RECIPE = ROOT / "training/recipes/coco-clotho.yaml"


def test_the_page_names_every_file_folder_and_encoder_of_the_recipe() -> None:
    recipe = load_recipe(RECIPE)
    layout = PAGE.partition("```text\n")[2].partition("```")[0]
    for source in recipe.pairs.values():
        assert f"{source.table}\n" in layout and f"{source.folder}/" in layout
    assert all(str(encoder.hub) in PAGE for encoder in recipe.encoders.values())
    assert [name for name in hub.ALL if f"{hub.ALL[name]:,}" not in layout] == []


def test_the_recipe_reads_the_publishers_files(tmp_path: Path) -> None:
    hub.write_data(tmp_path)
    recipe = load_recipe(RECIPE, [f"data.root={tmp_path}"])
    splits = {name: read_pairs(recipe, name) for name in recipe.pairs}
    media = {name: {split: len(part.media) for split, part in own.items()} for name, own in splits.items()}
    assert media == {
        "coco": {"train": 198, "validation": 2, "test": 0},
        "coco_test": {"train": 0, "validation": 0, "test": 16},
        "clotho": {"train": 30, "validation": 0, "test": 0},
        "clotho_val": {"train": 0, "validation": 9, "test": 0},
        "clotho_test": {"train": 0, "validation": 0, "test": 9},
    }
    assert all(len(part.links) == 5 * len(part.media) for own in splits.values() for part in own.values())


@pytest.mark.full
def test_the_pages_commands_train_and_serve(tmp_path: Path) -> None:
    """They are run as they stand, but for the folder of the data and the number of steps."""
    hub.write_data(tmp_path / "data")
    hub.write_encoders(tmp_path / "hub")
    variables = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "ISTHMUS_CACHE": str(tmp_path / "cache")}
    doctor, train, serve = commands(PAGE)
    with Reader(tmp_path / "isthmus", variables=variables, deadline_s=900) as reader:

        def run(command: Command, more: str = "") -> str:
            return reader.run(Command(command.text.replace("DATA", str(tmp_path / "data")) + more, "console"))

        assert "items.image" in run(doctor)
        figures = json.loads(run(train, " --set train.steps=40 --set train.warmup_steps=4").splitlines()[-1])
        assert figures["coco_test.t2i.r1"] == figures["clotho_test.t2a.r1"] == 100  # colours and pitches are told apart
        assert min(figures[f"parity.{modality}"] for modality in ("image", "audio", "text")) > 0.9999
        run(serve)
        media = [next((tmp_path / "data" / folder).iterdir()) for folder in ("coco/val2017", "clotho/evaluation")]
        answer = httpx.post(
            f"{reader.address}/embed", files=[("file", path.read_bytes()) for path in media], timeout=60
        )
        assert answer.status_code == 200, answer.text
        assert [one["modality"] for one in answer.json()["embeddings"]] == ["image", "audio"]
