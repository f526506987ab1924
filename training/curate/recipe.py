"""State what `curate` chooses from, by which concepts, and what its output must not share with a test set.

recipe: flickr8k-mobilenet-yamnet.yaml    # data root, text encoder, templates, evaluation sets
concepts: {classes_of: [caltech101], least: 0.5, each: 200}
pool:
  flickr30k: {files: [data/text/*.tsv.gz], columns: [photo, caption], text: caption, cap: 15000}
against: {flickr8k: [validation, test], caltech101: [test]}
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from training.errors import TrainingError
from training.pairs import Split
from training.recipe import Recipe, checked, load_with_recipe

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]


class CurateError(TrainingError):
    """A pool cannot be curated: the message names the source, the row or the key, and what is wrong."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Condition(_Model):
    """Holds what a column must hold; a row without the column does not fulfil it."""

    one_of: list[str | int | float | bool] | None = None
    none_of: list[str | int | float | bool] | None = None
    least: float | None = None
    most: float | None = None
    matches: str | None = None
    """Regular expression that is searched for in the value."""

    @field_validator("matches")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return value


class SimilarityFilter(_Model):
    """Says which pairs fit together well enough, by the cosine of medium and text in the bundle."""

    least: float | None = Field(default=None, ge=-1.0, le=1.0)
    best: float | None = Field(default=None, gt=0.0, le=1.0)
    """Share of the source's pairs that is kept."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.least is None) == (self.best is None):
            raise ValueError("exactly one of least and best must be given")
        return self


class PoolSource(_Model):
    """Captions or pairs in JSONL, CSV, TSV (each also .gz) or webdataset shards (.tar, .tar.gz)."""

    files: list[str] = Field(min_length=1)
    """Glob patterns."""
    columns: list[str] = []
    """The names of the columns of tables without a header."""
    text: str
    """Column of the text; in a shard the extension of its member, or a key of its .json."""
    media: str | None = None
    """Column of the medium's file name; in a shard its extensions, such as `jpg;png`."""
    folder: Path | None = None
    """Where the media of tables are."""
    modality: Literal["image", "audio"] = "image"
    where: dict[str, Condition] = {}
    least_words: int = Field(default=1, ge=1)
    most_words: int | None = Field(default=None, ge=1)
    without: list[str] = []
    """Words that no text may hold."""
    similarity: SimilarityFilter | None = None
    by: Literal["concepts", "similarity"] = "concepts"
    """What chooses: the concepts, or the fit of the pairs alone (noisy pairs; the best `cap` of them)."""
    cap: int | None = Field(default=None, gt=0)
    """Rows that may be kept of this source (per-source caps, Cambrian-1, arXiv 2406.16860)."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.by == "similarity" and (self.media is None or self.cap is None):
            raise ValueError("by: similarity needs media, and a cap")
        if self.similarity is not None and self.media is None:
            raise ValueError("similarity compares a text with its medium, and media is not given")
        return self


class ConceptSpec(_Model):
    classes_of: list[str] = []
    """Pairs of the recipe whose class names are concepts."""
    names: list[str] = []
    file: Path | None = None
    """One name per line."""
    templates: list[str] = []
    """How a concept is put into words; None: by the recipe's templates for images."""
    examples: Path | None = None
    """A folder of images per concept: its prototype is their mean, in place of its name's."""
    encoder: Literal["recipe", "bundle"] = "recipe"
    """Which text encoder reads names and captions."""
    least: float = Field(ge=-1.0, le=1.0)
    """Cosine from which a text is about a concept."""
    top: int = Field(default=5000, gt=0)
    """Candidates kept for each concept: memory grows with concepts × top, not with the pool."""
    each: int = Field(default=200, gt=0)
    """Rows that each concept takes; one that gets fewer is starved."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not (self.classes_of or self.names or self.file or self.examples):
            raise ValueError("no concepts: give classes_of, names, file or examples")
        if self.top < self.each:
            raise ValueError(f"top must be at least each, {self.each}")
        if self.examples is not None and self.encoder != "bundle":
            raise ValueError("examples are images: captions can be compared with them by encoder: bundle alone")
        if wrong := next((template for template in self.templates if template.count("{}") != 1), None):
            raise ValueError(f"the template {wrong!r} must hold one {{}}")
        return self


class DuplicateSpec(_Model):
    text: float | None = Field(default=0.7, gt=0.0, lt=1.0)
    """Jaccard similarity of character 5-grams from which texts are near duplicates; None: exact ones alone."""
    image: int | None = Field(default=8, ge=0, le=16)
    """Bits of 64 that both perceptual hashes of near-duplicate images may differ in; None: exact ones alone."""


class CurateSpec(_Model):
    concepts: ConceptSpec | None = None
    pool: dict[Name, PoolSource] = Field(min_length=1)
    against: dict[str, list[Split]] = {}
    """Evaluation sets, as pairs of the recipe and their splits."""
    bundle: Path | None = None
    """Trained towers: they say how well a medium and its text fit."""
    duplicates: DuplicateSpec = DuplicateSpec()
    near: float = Field(default=0.8, gt=0.0, le=1.0)
    """Cosine from which a concept's name is near that of an evaluated class."""
    block: int = Field(default=512, gt=0)
    """Rows that are in memory at once, and that an interruption may cost."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, source in self.pool.items():
            if source.by == "concepts" and self.concepts is None:
                raise ValueError(f"pool.{name} is chosen by concepts, and there are none")
            if (source.similarity or source.by == "similarity") and self.bundle is None:
                raise ValueError(f"pool.{name} is filtered by similarity, and bundle is not given")
        if self.concepts and self.concepts.encoder == "bundle" and self.bundle is None:
            raise ValueError("concepts.encoder is the bundle's, and bundle is not given")
        return self


@dataclass(frozen=True)
class Curation:
    """A checked file together with the recipe that it names."""

    name: str
    recipe: Recipe
    spec: CurateSpec

    def files(self, source: str) -> list[Path]:
        """The files of a source, sorted. Raises CurateError for a pattern without any."""
        files: set[Path] = set()
        for pattern in self.spec.pool[source].files:
            whole = self.recipe.path(Path(pattern))
            matches = [path for path in Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))) if path.is_file()]
            if not matches:
                raise CurateError(f"pool.{source}.files: {whole} matches no file")
            files.update(matches)
        return sorted(files)

    def folder(self, source: str) -> Path:
        return self.recipe.path(self.spec.pool[source].folder or Path())


def load_curation(path: Path, overrides: list[str] | None = None) -> Curation:
    """Reads a curation. Raises CurateError or RecipeError."""
    values, recipe = load_with_recipe(path, overrides, "data, text encoder and evaluation sets", CurateError)
    spec = checked(CurateSpec, values, f"{path}: ", CurateError)
    named = [*spec.against, *(spec.concepts.classes_of if spec.concepts else [])]
    if unknown := next((name for name in named if name not in recipe.pairs), None):
        raise CurateError(f"{path}: its recipe has no pairs named {unknown}; it has {', '.join(recipe.pairs)}")
    return Curation(path.stem, recipe, spec)
