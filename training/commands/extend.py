"""Add a modality to a space that is there: train its tower against the frozen text tower, and touch nothing else.

Progressive alignment (OneEncoder, arXiv 2409.11059; Zipper, arXiv 2405.18669): the older towers' files are copied byte
by byte, so that every vector that was ever stored stays valid, and the new bundle admits the older space. Modalities
that share no pairs meet in the texts.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from service.contract.bundle import Bundle, Modality, Tower, read_bundle, space_id
from service.contract.licences import combined
from training import pipeline
from training.bundle.card import model_card
from training.bundle.export import ExportError, check_parity, write_tower
from training.bundle.write import CARD, write
from training.distributed import joined
from training.encoders import FrozenEncoder
from training.errors import TrainingError
from training.features import Item
from training.fit.ladder import train
from training.flags import add_flags
from training.heads.bundled import PROJECTORS, text_head
from training.heads.concepts import named
from training.heads.projector import Head
from training.heads.trained import Trained, licences_json, licences_of, read_file, save_projectors
from training.recipe import Recipe, load_recipe

_SAMPLES = 16  # real items that a graph is checked on


class ExtendError(TrainingError):
    """A bundle cannot be extended by a recipe: the message says in what they do not fit."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="bundle to extend; it is not changed")
    parser.add_argument("recipe", type=Path, help="names the bundle's own text encoder, and encoder and pairs to add")
    parser.add_argument("--out", type=Path, required=True, help="bundle folder to write")
    add_flags(parser, "--set", "--work", "--cache")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train the recipe's new towers against the bundle, and write the extended one. Raises TrainingError."""
    bundle = read_bundle(options.bundle)
    recipe, head = fitted(load_recipe(options.recipe, options.overrides), bundle)
    # Checkpoints of another frozen space are none of this one.
    work = (options.work or Path("build/work") / recipe.name) / bundle.manifest.space
    cache = options.cache
    frozen, read, data = pipeline.prepare(recipe, cache)
    texts = [text for splits in read.values() for part in splits.values() for text in part.texts[:_SAMPLES]]
    check_text(bundle, frozen["text"], head, texts[:_SAMPLES])
    trained = train(recipe, data, work, frozen={"text": head}, names=named(recipe, frozen, cache))
    if joined().index:
        return {}
    work.mkdir(parents=True, exist_ok=True)
    trained = replace(trained, licences=licences_of(recipe))
    save_projectors(work / PROJECTORS, trained)
    figures = pipeline.evaluate(recipe, frozen, data, trained, cache, work)
    samples: dict[Modality, list[Item]] = {}
    for splits in read.values():
        for part in (splits["test"], splits["train"]):
            taken = samples.setdefault(part.modality, [])
            taken += part.media[: _SAMPLES - len(taken)]
    extended = write_extended(bundle, recipe, frozen, trained, figures, samples, options.out)
    _print(bundle, extended)
    manifest = extended.manifest
    return {
        "bundle": str(extended.path),
        "space": manifest.space,
        "admits": list(manifest.admits),
        "added": [m for m in manifest.towers if m not in bundle.manifest.towers],
        **{key: value for key, value in manifest.evaluation.items() if key not in bundle.manifest.evaluation},
    }


def fitted(recipe: Recipe, bundle: Bundle) -> tuple[Recipe, Head]:
    """Return what of the recipe is new to the bundle, with the bundle's lengths, and the bundle's frozen text head."""
    manifest = bundle.manifest
    if "text" not in manifest.towers:
        raise ExtendError(f"{bundle.path} has no text tower to align to")
    new = [modality for modality in recipe.encoders if modality not in manifest.towers]
    if not new:
        raise ExtendError(f"{recipe.name} adds nothing: {bundle.path} has {', '.join(manifest.towers)} towers already")
    if recipe.projector.dimensions != manifest.dimensions:
        raise ExtendError(
            f"projector.dimensions is {recipe.projector.dimensions}, and the space of {bundle.path} has "
            f"{manifest.dimensions}: --set projector.dimensions={manifest.dimensions}"
        )
    head = text_head(bundle)
    if head.needs_tokens and not recipe.projector.needs_tokens:
        raise ExtendError(f"the text head of {bundle.path} reads tokens: projector.kind must be token")
    recipe = recipe.only({*new, "text"})
    if without := [modality for modality in new if modality not in {s.modality for s in recipe.pairs.values()}]:
        raise ExtendError(f"{recipe.name} has no pairs of {without[0]} to train on")
    projector = recipe.projector.model_copy(
        update={"matryoshka": manifest.matryoshka, "querybank": int(head.reserve is not None)}
    )
    # The linear baseline reads pooled texts, which a text head that reads tokens cannot give.
    spec = recipe.train.model_copy(update={"baseline": recipe.train.baseline and not head.needs_tokens})
    return recipe.model_copy(update={"projector": projector, "train": spec}), head


def check_text(bundle: Bundle, encoder: FrozenEncoder, head: Head, texts: list[str]) -> None:
    """Checks that the recipe's text encoder with the bundle's head gives the vectors that the bundle serves."""
    tower = bundle.manifest.towers["text"]
    if encoder.weights_sha256 != tower.encoder.weights_sha256:
        raise ExtendError(
            f"encoders.text is {encoder.source}, and its weights are not those of {tower.encoder.source} in "
            f"{bundle.path}: a new tower must be aligned to the texts of that space"
        )
    if encoder.preprocessing != tower.preprocessing:
        raise ExtendError(f"encoders.text: its preprocessing is not that of the text tower of {bundle.path}")
    try:
        check_parity(encoder, head, bundle.tower_path("text"), texts)
    except ExportError as error:
        raise ExtendError(f"{bundle.path}: encoders.text does not reproduce its text tower: {error}") from None


def write_extended(
    bundle: Bundle,
    recipe: Recipe,
    encoders: Mapping[Modality, FrozenEncoder],
    trained: Trained,
    figures: Mapping[str, Any],
    samples: Mapping[Modality, list[Item]],
    target: Path,
) -> Bundle:
    """The bundle with the new towers: the older files and entries as they are, the older space admitted."""
    old = bundle.manifest
    new: list[Modality] = [modality for modality in trained.heads if modality not in old.towers]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        towers: dict[Modality, Tower] = dict(old.towers)
        files = {file: bundle.path / file for file in old.checksums()}
        # Of the new towers alone: what was measured of the older ones is as true as it was.
        measured = dict(figures)
        for modality in new:
            tower, parity = write_tower(encoders[modality], trained.heads[modality], folder, samples[modality])
            towers[modality] = tower.model_copy(update={"labels": recipe.labels_seen(modality)})
            files[towers[modality].file] = folder / towers[modality].file
            measured[f"parity.{modality}"] = round(parity, 7)
        for key in ("temperature", *trained.ladder):
            measured[f"{'+'.join(new)}.{key}"] = measured.pop(key)
        space = space_id(old.dimensions, towers)
        means = dict(old.means) | {modality: trained.means[modality] for modality in new}
        added = {modality: towers[modality] for modality in new}
        licences = combined(old.parts, recipe.licences, trained.licences)
        terms = tuple(dict.fromkeys((*old.terms, *recipe.terms)))
        _save_projectors(bundle, replace(trained, licences=licences), new, means, folder / PROJECTORS)
        whole = recipe.model_copy(update={"licences": licences, "terms": terms})
        card = model_card(whole, added, measured, space)
        before = (bundle.path / CARD).read_text(encoding="utf-8") if CARD in old.files else ""
        (folder / CARD).write_text(f"{card}\n---\n\nIt extends space `{old.space}`:\n\n{before}", encoding="utf-8")
        return write(
            target,
            files,
            {name: folder / name for name in (PROJECTORS, CARD)},
            like=old,
            name=recipe.name,
            space=space,
            admits=(*old.admits, old.space),
            towers=towers,
            means=means,
            templates={str(m): list(prompts) for m, prompts in recipe.templates.items()} | dict(old.templates),
            evaluation={**measured, **old.evaluation},
            licences=licences,
            terms=terms,
        )


def _save_projectors(
    bundle: Bundle, trained: Trained, new: list[Modality], means: Mapping[Modality, list[float]], path: Path
) -> None:
    """The older tensors as they are, and those of the new heads beside them."""
    tensors, metadata = read_file(bundle.path / PROJECTORS)
    for modality in new:
        state = trained.heads[modality].state_dict()
        tensors |= {f"{modality}.{key}": value.contiguous() for key, value in state.items()}
    kinds = {modality: tower.projector.kind for modality, tower in bundle.manifest.towers.items()}
    kinds |= {modality: trained.heads[modality].kind for modality in new}
    changed = {"kinds": json.dumps(kinds), "means": json.dumps(means), "licences": licences_json(trained.licences)}
    save_file(tensors, path, metadata | changed)


def _print(old: Bundle, new: Bundle) -> None:
    print(f"{'tower':8}{'file':16}{'sha256':20}", file=sys.stderr)
    for modality, tower in new.manifest.towers.items():
        same = modality in old.manifest.towers and old.manifest.towers[modality].sha256 == tower.sha256
        print(f"{modality:8}{tower.file:16}{tower.sha256[:16]}    {'unchanged' if same else 'new'}", file=sys.stderr)
    print(f"stores of space {old.manifest.space} stay valid", file=sys.stderr)
