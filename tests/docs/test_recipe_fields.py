"""docs/reference/recipe.md names every field of a recipe, with its default."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from service.contract.licences import Licence
from training import recipe

PAGE = Path(__file__).parents[2] / "docs/reference/recipe.md"
SECTIONS: dict[str, type[BaseModel]] = {
    "The recipe": recipe.Recipe,
    "`data`": recipe.DataRoot,
    "`encoders`": recipe.EncoderSource,
    "`beside`": recipe.BesideSource,
    "`pairs`": recipe.PairSource,
    "`texts`": recipe.TextSource,
    "`projector`": recipe.ProjectorSpec,
    "`train`": recipe.TrainSpec,
    "`objective`": recipe.ObjectiveSpec,
    "`regularise`": recipe.RegulariserSpec,
    "`export`": recipe.ExportSpec,
    "`leaks`": recipe.LeakSpec,
    "`emergent`": recipe.EmergentSpec,
    "`licences`": Licence,
}


def rows() -> dict[str, dict[str, str]]:
    """Return, by heading, each field with what stands in the column of defaults."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return {
        heading: dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", body, re.MULTILINE))
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.mark.parametrize(("heading", "model"), SECTIONS.items())
def test_every_field_is_there_with_its_default(heading: str, model: type[BaseModel]) -> None:
    shown = rows()[heading]
    assert list(shown) == list(model.model_fields)
    for name, field in model.model_fields.items():
        assert shown[name] == written(field), name


def written(field: FieldInfo) -> str:
    """A field's default as the page writes it; nothing for a field that has a section of its own."""
    if field.is_required():
        return "required"
    match field.default:
        case BaseModel():
            return ""
        case None:
            return "unset"
        case "":
            return '`""`'
        case Path() | str():
            return f"`{field.default}`"
        case tuple():
            return f"`[{', '.join(field.default)}]`"
    return f"`{json.dumps(field.default)}`"


def test_no_section_is_left_over() -> None:
    assert set(rows()) == set(SECTIONS)
