from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from service.contract.bundle import Bundle, read_bundle
from tests.conftest import made_once
from tests.training import spaces, tiny
from training.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Seed each test: what it draws depends on no test that ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    tiny.write_data(root)
    tiny.write_encoders(root)
    return root


@pytest.fixture(scope="session")
def concept_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data with encoders that kept their classifiers."""
    root = tmp_path_factory.mktemp("concepts")
    tiny.write_data(root)
    tiny.write_encoders(root)
    tiny.write_classifiers(root)
    return root


@pytest.fixture
def make_recipe(tiny_root: Path, tmp_path: Path) -> MakeRecipe:
    def make(**changes: Any) -> Recipe:
        return load_recipe(tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe_values(tiny_root, **changes)))

    return make


@pytest.fixture(scope="session")
def picture_space(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = made_once(tmp_path_factory, "pictures", lambda folder: spaces.built(tiny_root, folder, "image"))
    return read_bundle(folder / "image")


@pytest.fixture(scope="session")
def sound_space(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = made_once(tmp_path_factory, "sounds", lambda folder: spaces.built(tiny_root, folder, "audio"))
    return read_bundle(folder / "audio")


@pytest.fixture(scope="session")
def both_spaces(picture_space: Bundle, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The space of pictures with the sounds added to it."""

    def extend(folder: Path) -> None:
        recipe = spaces.recipe(tiny_root, folder, "audio")
        common = ["--work", folder / "work", "--cache", folder / "cache", "--out", folder / "bundle"]
        assert spaces.run("add-modality", picture_space.path, recipe, *common) == 0

    return read_bundle(made_once(tmp_path_factory, "extended", extend) / "bundle")
