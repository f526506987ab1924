"""Concepts and their prototypes, and which concepts are what an evaluation set asks for.

A prototype is the mean vector of a name in every template, or of example images in a bundle's space (arXiv
2409.19425 takes the mean of 128 images).
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplemma

from service.contract.errors import InputError
from service.contract.images import read_image
from service.contract.vectors import l2_normalise
from training.curate.blocks import Preparation
from training.curate.encoding import Floats, media_vectors
from training.curate.leaks import HeldOut
from training.curate.recipe import ConceptSpec, CurateError, Curation
from training.data.duplicates import normalised
from training.pairs import SUFFIXES, read_pairs, readable


def concept_names(curation: Curation) -> list[str]:
    """Return every concept once, in the order of the file. Raises CurateError or PairError."""
    spec = curation.spec.concepts
    if spec is None:
        return []
    names = [label for pairs in spec.classes_of for label in read_pairs(curation.recipe, pairs)["train"].classes]
    names += spec.names
    if spec.file is not None:
        path = curation.recipe.path(spec.file)
        try:
            names += path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise CurateError(f"concepts.file: {path} cannot be read: {error.strerror}") from None
    if spec.examples is not None:
        names += list(_examples(curation, spec))
    distinct = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not distinct:
        raise CurateError("concepts: none are named")
    return distinct


def prototypes(curation: Curation, names: Sequence[str], preparation: Preparation) -> Floats:
    """Unit vectors (C, d) of the concepts. Raises CurateError naming a concept that cannot be read."""
    spec = curation.spec.concepts
    if spec is None:
        return np.zeros((0, 0), np.float32)
    templates = spec.templates or list(curation.recipe.templates.get("image", [])) or ["{}"]
    result = named(names, templates, preparation.read_texts)
    if spec.examples is None:
        return result
    tower = preparation.tower("image")
    encode = media_vectors(tower)
    for name, files in _examples(curation, spec).items():
        result[names.index(name)] = l2_normalise(encode(_pixels(files, tower.preprocessing)).mean(0))
    return result


def named(names: Sequence[str], templates: Sequence[str], read: Callable[[Sequence[str]], Floats]) -> Floats:
    """Unit vectors (C, d): of each name, the mean over its templates. Raises CurateError."""
    vectors = read([template.format(name) for name in names for template in templates])
    vectors = vectors.reshape(len(names), len(templates), -1).mean(1)
    for name, vector in zip(names, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise CurateError(f"concepts: the text encoder cannot read {name!r}")
    return l2_normalise(vectors)


def overlap(
    names: Sequence[str], sets: Sequence[HeldOut], near: float, read: Callable[[Sequence[str]], Floats]
) -> dict[str, dict[str, Any]]:
    """Finds of each evaluation set the classes that concepts name: exactly, in another form, or nearly.

    Another form has the same lemmas in any order. Near is a cosine of `near` or more between the bare names. A class
    is counted once, under the closest of the three. A result on it is concept-informed.
    """
    result: dict[str, dict[str, Any]] = {}
    folded = {name.casefold(): name for name in names}
    lemmas = {_lemmas(name): name for name in names}
    for one in sets:
        exact = {label: folded[label.casefold()] for label in one.classes if label.casefold() in folded}
        forms = {
            label: lemmas[_lemmas(label)] for label in one.classes if label not in exact and _lemmas(label) in lemmas
        }
        rest = [label for label in one.classes if label not in exact and label not in forms]
        close: dict[str, list[Any]] = {}
        if rest and names:
            cosines = named(rest, ["{}"], read) @ named(names, ["{}"], read).T
            for label, row in zip(rest, cosines, strict=True):
                if row.max() >= near:
                    close[label] = [names[int(row.argmax())], round(float(row.max()), 4)]
        result[one.name] = {
            "classes": len(one.classes),
            "exact": exact,
            "lemma": forms,
            "near": close,
            "free": [label for label in rest if label not in close],
            "concept_informed": bool(exact or forms or close),
        }
    return result


def _lemmas(name: str) -> tuple[str, ...]:
    return tuple(sorted(simplemma.lemmatize(word, lang="en") for word in normalised(name).split()))


def _examples(curation: Curation, spec: ConceptSpec) -> dict[str, list[Path]]:
    if spec.examples is None:
        return {}
    folder = curation.recipe.path(spec.examples)
    examples = {}
    for inner in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = sorted(path for path in inner.iterdir() if path.suffix.lower() in SUFFIXES["image"])
        if not files:
            raise CurateError(f"concepts.examples: {inner} holds no image")
        examples[readable(inner.name)] = files
    if not examples:
        raise CurateError(f"concepts.examples: {folder} holds no folder of images per concept")
    return examples


def _pixels(files: Sequence[Path], spec: Any) -> Iterator[Any]:
    for path in files:
        try:
            yield read_image(path.read_bytes(), spec)
        except InputError as error:
            raise CurateError(f"concepts.examples: {path}: {error}") from None
