"""A recipe: one YAML file that says which encoders, which pairs, which projector. Read once, passed as values."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.errors import TrainingError


class RecipeError(TrainingError):
    """A recipe cannot be used: the message names the file, the key and what is wrong."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRoot(_Model):
    root: Path = Path(".")
    """Every relative path of the recipe starts here. `--set data.root=…` or ISTHMUS_DATA."""


class EncoderSource(_Model):
    """Where a frozen encoder comes from: exactly one of the four. A path that starts with a dot is the recipe's own."""

    hub: str | None = None
    revision: str | None = None
    folder: Path | None = None
    package: str | None = None
    """An installed Python package that carries a model folder."""
    onnx: Path | None = None
    """A folder with encoder.onnx and encoder.json (its preprocessing)."""
    subfolder: str = ""
    licence: str | None = None
    preprocessing: dict[str, Any] = {}
    """Changes to the preprocessing that comes with the encoder."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(value is not None for value in (self.hub, self.folder, self.package, self.onnx)) != 1:
            raise ValueError("exactly one of hub, folder, package and onnx must be given")
        return self


class PairSource(_Model):
    """A set of (media, text) pairs: captions, or labels turned into captions by templates."""

    modality: Literal["image", "audio"]
    table: Path | None = None
    """CSV, TSV or JSONL with one row per pair; without it `folder` holds one sub-folder per label."""
    folder: Path
    media: str = "file"
    text: str | None = None
    label: str | None = None
    split_column: str | None = None
    splits: dict[Literal["train", "validation", "test"], list[str]] = {}
    split_files: dict[Literal["train", "validation", "test"], Path] = {}
    """One media name per line for each split."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Of train, by hash of the group, when no validation split is named."""
    group: str | None = None
    """Regular expression whose first group names what must not span train and validation (a source recording)."""
    names: dict[str, str] = {}
    """Readable class names for labels that are not."""
    weight: float = Field(default=1.0, gt=0.0)
    """Share of the training steps."""

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.table is None and (self.text or self.label):
            raise ValueError("text and label name columns of a table, and there is no table")
        if self.table is not None and (self.text is None) == (self.label is None):
            raise ValueError("a table needs exactly one of text and label")
        return self


class ProjectorSpec(_Model):
    kind: Literal["linear", "mlp", "token"] = "mlp"
    dimensions: int = Field(default=512, gt=0)
    hidden: int = Field(default=1024, gt=0)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    text_dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Of the text projector; None means the same. Texts are many and their features few: they need less."""
    power: float = Field(default=1.0, gt=0.0, le=1.0)
    """Signed power of pooled media features (Perronnin et al., 2010); 0.5 evens out bursts of rectified ones."""


class TrainSpec(_Model):
    steps: int = Field(default=3000, gt=0)
    batch_size: int = Field(default=1024, gt=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    warmup_steps: int = Field(default=200, ge=0)
    temperature: float = Field(default=0.07, gt=0)
    validate_every: int = Field(default=100, gt=0)
    patience: int = Field(default=10, gt=0)
    """Validations without a gain before training stops."""
    seed: int = 0


class Recipe(_Model):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    description: str = ""
    data: DataRoot = DataRoot()
    encoders: dict[Literal["image", "audio", "text"], EncoderSource]
    pairs: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], PairSource]
    projector: ProjectorSpec = ProjectorSpec()
    train: TrainSpec = TrainSpec()
    templates: dict[Literal["image", "audio"], list[str]] = {}
    licences: list[str] = []
    notes: str = ""
    """Goes into the model card."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "text" not in self.encoders or len(self.encoders) < 2:
            raise ValueError("encoders must name text and at least one of image and audio")
        for name, source in self.pairs.items():
            if source.modality not in self.encoders:
                raise ValueError(f"pairs.{name} has {source.modality} media, and there is no {source.modality} encoder")
            if (source.label or source.table is None) and not self.templates.get(source.modality):
                raise ValueError(f"pairs.{name} has labels, and templates.{source.modality} is empty")
        return self

    def path(self, relative: Path) -> Path:
        return self.data.root / relative


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe; ISTHMUS_DATA replaces data.root, `key.key=value` overrides replace both. Raises RecipeError."""
    values = read_yaml(path, overrides)
    for source in (values.get("encoders") or {}).values():
        for key in ("folder", "onnx"):
            if isinstance(source, dict) and str(source.get(key) or "").startswith("."):
                source[key] = str((path.parent / source[key]).resolve())
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise RecipeError(f"{path}: {where}: {first['msg']}") from None


def read_yaml(path: Path, overrides: list[str] | None = None) -> dict[str, Any]:
    """The recipe's values with ISTHMUS_DATA and overrides applied, not yet checked. Raises RecipeError."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a mapping of keys to values")
    if root := os.environ.get("ISTHMUS_DATA"):
        values["data"] = {**(values.get("data") or {}), "root": root}
    for override in overrides or []:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"--set {override}: not key=value")
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"--set {override}: {parent} is not a mapping")
        inner[last] = yaml.safe_load(value)
    return values
