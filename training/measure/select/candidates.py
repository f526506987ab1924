"""Read what `select` compares: a YAML file names a recipe, for its data, pairs and templates, and further encoders.

recipe: flickr8k-mobilenet-yamnet.yaml    # its own encoders compete too, each under the name `recipe`
candidates:
  image:
    early: {folder: encoders/mobilenet_v2, layer: 6}
    control: {folder: encoders/mobilenet_v2, random: true}
  text:
    glove: {words: encoders/glove_50d/words_60k.txt, vectors: encoders/glove_50d/vectors_60k_f16.npy}
    lsa: {lsa: 128}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.contract.bundle import Modality
from training.errors import TrainingError
from training.recipe import EncoderSource, Recipe, checked, load_with_recipe

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class SelectError(TrainingError):
    """Encoders cannot be compared: the message names the candidate or the pairs, and what is wrong."""


class Network(EncoderSource):
    """A pretrained encoder, read at one of its layers, or its architecture with random weights."""

    layer: int | None = Field(default=None, ge=0)
    """The hidden state that is read in place of the last one, in transformers' numbering; a map's cells averaged."""
    random: bool = False
    """A control: the same architecture with weights drawn anew."""
    seed: int = 0

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.layer is not None and (self.layers or self.concepts or self.beside or self.onnx):
            raise ValueError("layer cannot go with layers, concepts, beside or onnx")
        if self.random and (self.layers or self.concepts or self.beside or self.onnx):
            raise ValueError("random cannot go with layers, concepts, beside or onnx")
        return self


class WordVectors(BaseModel):
    """Static word vectors; a text is the mean of its words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    words: Path
    """A word per line; without `vectors`, each followed by its numbers (the text format of GloVe and word2vec)."""
    vectors: Path | None = None
    """.npy of (words, d)."""


class LatentSemantics(BaseModel):
    """TF-IDF reduced by a truncated SVD, fitted on the very texts that are measured (Deerwester et al., 1990)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    lsa: int = Field(gt=0)
    """Dimensions."""


Candidate = Network | WordVectors | LatentSemantics


class _Candidates(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    image: dict[Name, dict[str, Any]] = {}
    audio: dict[Name, dict[str, Any]] = {}
    text: dict[Name, dict[str, Any]] = {}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: _Candidates


@dataclass(frozen=True)
class Selection:
    """A recipe that gives data, pairs and templates, and the candidates of each of its modalities by name."""

    recipe: Recipe
    candidates: Mapping[Modality, Mapping[str, Candidate]]


def load_selection(path: Path, overrides: list[str] | None = None, pairs: Sequence[str] = ()) -> Selection:
    """Reads a selection, with the named pairs or all of its recipe's. Raises SelectError or RecipeError."""
    values, recipe = load_with_recipe(path, overrides, "data, pairs and templates", SelectError)
    for source in (source for sources in _mappings(values.get("candidates")) for source in _mappings(sources)):
        for key in ("folder", "onnx", "words", "vectors"):
            if str(source.get(key) or "").startswith("."):
                source[key] = str((path.parent / source[key]).resolve())
    given = checked(_File, values, f"{path}: ", SelectError).candidates
    for modality in sorted(given.model_fields_set - set(recipe.encoders)):
        raise SelectError(f"{path}: candidates.{modality}: its recipe has no {modality} encoder, and no such pairs")
    if unknown := sorted(set(pairs) - set(recipe.pairs)):
        raise SelectError(f"{path} has no pairs named {unknown[0]}; it has {', '.join(recipe.pairs)}")
    kept = {name: source for name, source in recipe.pairs.items() if name in pairs or not pairs}
    if not kept:
        raise SelectError(f"{path}: its recipe names no pairs to measure on")
    candidates: dict[Modality, dict[str, Candidate]] = {}
    for modality, encoder in recipe.encoders.items():
        recipe_own = Network.model_validate(encoder.model_dump())
        candidates[modality] = {"recipe": recipe_own, **_checked(path, modality, getattr(given, modality))}
    return Selection(recipe.model_copy(update={"pairs": kept}), candidates)


def _checked(path: Path, modality: str, sources: dict[str, dict[str, Any]]) -> dict[str, Candidate]:
    result: dict[str, Candidate] = {}
    for name, values in sources.items():
        kind: type[Candidate] = WordVectors if "words" in values else LatentSemantics if "lsa" in values else Network
        where = f"candidates.{modality}.{name}"
        if kind is not Network and modality != "text":
            raise SelectError(f"{path}: {where}: words and lsa are text encoders")
        result[name] = checked(kind, values, f"{path}: {where}.", SelectError)
    return result


def _mappings(values: Any) -> list[dict[str, Any]]:
    return [value for value in values.values() if isinstance(value, dict)] if isinstance(values, dict) else []
