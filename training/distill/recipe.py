"""The recipe of a distillation: data, teacher, views, student, training; checked as a whole."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.contract.images import ImagePreprocessing
from service.contract.windows import LogMelWindows
from training.recipe import RecipeError, checked, read_yaml, refuse_gone

_PLAIN = "a plain student had R² 0.210 where one that learns stage by stage has 0.407"
GONE = {"views": (None, _PLAIN)} | {f"student.{name}": (None, _PLAIN) for name in ("stem", "widths", "depths")}
"""Fields of earlier recipes, and why they are gone."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(_Model):
    root: Path = Path(".")
    train: list[dict[str, Any]] = Field(min_length=1)
    """See training.distill.views.listed_files; what `hold_out` holds out is added to the validation files."""
    validation: list[dict[str, Any]] = Field(min_length=1)


class TeacherSpec(_Model):
    folder: Path
    """A transformers model folder, under data.root."""
    preprocessing: ImagePreprocessing | None = None


class StageSpec(_Model):
    layer: int | None = None
    """The teacher's hidden state that the stage makes; None, of the last stage: the map that it pools."""
    stem: int | None = None
    """Channels of a convolution before the blocks, which halves the resolution."""
    blocks: list[tuple[int, int, int]] = Field(min_length=1)
    """Each block: channels inside, channels out, stride."""


class StudentSpec(_Model):
    """A student of pictures has `stages`; one of sounds a `width`, and the `ends` of its stages."""

    preprocessing: dict[str, Any]
    exported: dict[str, Any] = {}
    """What changes in its preprocessing once it has learned. A student that pools its maps is better at a larger size
    of pictures than it was trained at, where crops made things look larger (FixRes: Touvron et al., 2019), and takes
    longer stretches of sound."""
    stages: list[StageSpec] = []
    width: float | None = Field(default=None, gt=0)
    """The width multiplier of a MobileNetV3 for sounds, whose maps are as wide as its teacher's."""
    ends: list[int] = []
    """How many of its blocks each stage but the last ends behind."""

    @property
    def cuts(self) -> list[int]:
        """The teacher's hidden states, or the blocks, at which every stage but the last ends."""
        return self.ends or [stage.layer for stage in self.stages if stage.layer is not None]


class Restart(_Model):
    """The learning rate begins anew from step `at` on, warm-up and all (SGDR: Loshchilov and Hutter, 2017)."""

    at: int = Field(gt=0)
    peak: float = Field(default=1, gt=0, le=1)
    """A share of `learning_rate`."""


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
    bfloat16: bool = False
    threads: int = Field(default=1, gt=0)
    chain_from: float = Field(default=0.5, ge=0, le=1)
    """When stages are chained: the share of the steps (to the first restart, if there is one) after which each reads
    what the one before it made."""
    restarts: list[Restart] = []
    start: Path | None = None
    """Another recipe, beside this one, whose best student this one starts as."""


class DistillRecipe(_Model):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    modality: Literal["image", "audio"]
    licence: str
    trained_on: list[str]
    seed: int = 0
    data: DataSpec
    teacher: TeacherSpec
    student: StudentSpec
    train: TrainSpec

    def preprocessing(self) -> ImagePreprocessing | LogMelWindows:
        return self._preprocessing(self.student.preprocessing)

    def exported(self) -> ImagePreprocessing | LogMelWindows:
        return self._preprocessing(self.student.preprocessing | self.student.exported)

    def _preprocessing(self, given: dict[str, Any]) -> ImagePreprocessing | LogMelWindows:
        kind: type[ImagePreprocessing | LogMelWindows] = (
            ImagePreprocessing if self.modality == "image" else LogMelWindows
        )
        return checked(kind, given, "student.preprocessing.")


def load_distill_recipe(path: Path, overrides: list[str]) -> DistillRecipe:
    """Read and check a recipe; `key.key=value` overrides replace its values. Raises RecipeError."""
    values = read_yaml(path, overrides)
    refuse_gone(path, values, GONE)
    if (start := (values.get("train") or {}).get("start")) is not None:
        values["train"]["start"] = str(path.parent / start)
    recipe = checked(DistillRecipe, values, f"{path}: ")
    recipe.preprocessing()
    recipe.exported()
    if recipe.modality == "image" and recipe.teacher.preprocessing is None:
        raise RecipeError(f"{path}: teacher.preprocessing: an image teacher needs its height and width")
    student = recipe.student
    if recipe.modality == "audio":
        if student.width is None or student.stages:
            raise RecipeError(f"{path}: student: a student of sounds has a width, and the ends of its stages")
    elif not student.stages or student.width is not None:
        raise RecipeError(f"{path}: student: a student of pictures has stages, and no width")
    if any((stage.layer is None) != (stage is student.stages[-1]) for stage in student.stages):
        raise RecipeError(f"{path}: student.stages: every stage but the last has a layer")
    starts = [restart.at for restart in recipe.train.restarts]
    if starts != sorted(set(starts)) or any(start >= recipe.train.steps for start in starts):
        raise RecipeError(
            f"{path}: train.restarts: each later than the one before, and before {recipe.train.steps} steps"
        )
    return recipe
