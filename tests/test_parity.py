"""The service answers what training computes: a bundle is trained, served and compared, item by item."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.parity import compare, main, real_items
from service.settings import Settings
from tests import tiny_bundle
from tests.conftest import made_once, serving
from tests.training import tiny
from training.__main__ import main as training
from training.recipe import Recipe, load_recipe

ALL = 1_000
MODALITIES = {"image", "audio", "text"}


def values(root: Path) -> dict[str, Any]:
    """A recipe of deep encoders, which few other tests of `make test` export."""
    folders = {"image": "mobilenet", "audio": "yamnet", "text": "roberta"}
    return tiny.recipe_values(root, encoders={modality: {"folder": name} for modality, name in folders.items()})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    tiny.write_data(root)
    tiny.write_encoders(root)
    return root


@pytest.fixture(scope="module")
def recipe_path(root: Path) -> Path:
    return tiny.write_recipe(root / "tiny.yaml", values(root))


@pytest.fixture(scope="module")
def recipe(recipe_path: Path) -> Recipe:
    return load_recipe(recipe_path)


@pytest.fixture(scope="module")
def trained(recipe_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def train(folder: Path) -> None:
        work = ["--work", str(folder / "work"), "--cache", str(folder / "cache")]
        assert training(["run", str(recipe_path), *work, "--out", str(folder / "bundle")]) == 0

    return made_once(tmp_path_factory, "parity", train) / "bundle"


@pytest.fixture(scope="module")
def served(root: Path, trained: Path) -> Iterator[httpx.Client]:
    with serving(Settings(bundle=trained, store=root / "store", device="cpu", threads=1)) as client:
        yield client


@pytest.mark.full
def test_every_test_item_of_every_modality_agrees(served: httpx.Client, recipe: Recipe, trained: Path) -> None:
    result = compare(served, recipe, trained, ALL)
    assert {name: each.n for name, each in result.items()} == {
        name: len(items) for name, items in real_items(recipe, ALL).items()
    }
    assert set(result) == MODALITIES and all(each.n >= 6 for each in result.values())
    for each in result.values():
        assert 0.9999 <= each.lowest <= each.median <= 1.0001


def test_the_command_says_so(
    served: httpx.Client, recipe_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--url", str(served.base_url), "--bundle", str(trained), "--count", "3"]
    assert main([*common, "--recipe", str(recipe_path)]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["passed"] and {last[name]["n"] for name in MODALITIES} == {3}


def test_other_preprocessing_fails(
    served: httpx.Client, root: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = values(root)
    other["encoders"]["image"]["preprocessing"] = {"mean": [0.2, 0.5, 0.8]}
    path = tiny.write_recipe(root / "other.yaml", other)
    common = ["--url", str(served.base_url), "--bundle", str(trained), "--count", "4"]
    assert main([*common, "--recipe", str(path)]) == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not last["passed"] and last["image"]["lowest"] < 0.9999 <= last["text"]["lowest"]


def test_a_service_of_another_bundle_is_an_error(
    root: Path, recipe_path: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_bundle.build(tmp_path / "other").path
    with serving(Settings(bundle=other, store=tmp_path / "store", device="cpu", threads=1)) as client:
        common = ["--url", str(client.base_url), "--bundle", str(trained), "--count", "1"]
        assert main([*common, "--recipe", str(recipe_path)]) == 2
    assert "serves the space" in capsys.readouterr().err
