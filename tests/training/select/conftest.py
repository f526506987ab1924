from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.training import tiny

MakeSelection = Callable[..., Path]


@pytest.fixture
def make_selection(tiny_root: Path, tmp_path: Path) -> MakeSelection:
    """A file of candidates beside the tiny recipe; another recipe's values by `recipe=`."""

    def make(candidates: dict[str, Any], recipe: dict[str, Any] | None = None, **others: Any) -> Path:
        tiny.write_recipe(tmp_path / "recipe.yaml", tiny.recipe_values(tiny_root, **(recipe or {})))
        path = tmp_path / "selection.yaml"
        path.write_text(yaml.safe_dump({"recipe": "recipe.yaml", "candidates": candidates, **others}))
        return path

    return make
