"""Tiny spaces that share nothing but words: pictures by colour, and tones whose pitch is called by a colour."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from service.contract.bundle import Bundle, read_bundle
from tests.training import tiny
from training.__main__ import main
from training.features import cached_features
from training.heads.bundled import as_encoder
from training.measure.emergent import average_precision, chance_precision

CALLED = {"low_tone": "red", "middle_tone": "green", "high_tone": "blue"}
TEMPLATES = {"image": ["a picture of {}"], "audio": ["the sound of {}", "{}"]}
PROJECTOR = {"kind": "linear", "dimensions": 16, "dropout": 0.0}
LICENCES = {
    "image": {"of": "pictures", "licence": "CC-BY-NC-4.0"},
    "audio": {"of": "tones", "licence": "CC0-1.0"},
}
TRAIN = {"steps": 60, "batch_size": 8, "warmup_steps": 4, "validate_every": 20, "learning_rate": 0.01}


def recipe(root: Path, folder: Path, *media: str, **changes: Any) -> Path:
    """A recipe of some of image and audio with the texts, written to `folder`; sounds are called by colours."""
    values = tiny.recipe_values(root, **{"templates": TEMPLATES, "projector": PROJECTOR, "train": TRAIN, **changes})
    values["pairs"]["tones"]["names"] = CALLED
    values["name"] = "-".join(media)
    values["licences"] = [LICENCES[name] for name in media]
    values["terms"] = [{"of": name, "terms": "ask first"} for name in media]
    for key in ("encoders", "templates"):
        values[key] = {name: value for name, value in values[key].items() if name in (*media, "text")}
    values["pairs"] = {name: value for name, value in values["pairs"].items() if value["modality"] in media}
    return tiny.write_recipe(folder / f"{values['name']}.yaml", values)


def run(command: str, *arguments: object) -> int:
    return main([command, *map(str, arguments)])


def built(root: Path, folder: Path, medium: str, **changes: Any) -> Bundle:
    """A trained bundle of one kind of media and the texts."""
    path = recipe(root, folder, medium, **changes)
    out = folder / medium
    assert run("run", path, "--work", folder / f"work-{medium}", "--cache", folder / "cache", "--out", out) == 0
    return read_bundle(out)


def vectors(bundle: Bundle, modality: Any, items: list[Any], cache: Path) -> np.ndarray:
    """Return what the bundle's graph gives."""
    return np.array(cached_features(as_encoder(bundle, modality), items, cache).pooled)


def pictures(root: Path) -> tuple[list[Path], list[str]]:
    """All pictures, and their colours."""
    with (root / "captions.csv").open() as stream:
        names = list(dict.fromkeys(row["image"] for row in csv.DictReader(stream)))
    files = [root / "pictures" / name for name in names]
    return files, [list(tiny.COLOURS)[int(path.stem) % len(tiny.COLOURS)] for path in files]


def sounds(root: Path) -> tuple[list[Path], list[str]]:
    """All sounds, and the colours that they are called by."""
    with (root / "sounds.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return [root / "sounds" / row["file"] for row in rows], [CALLED[row["class"]] for row in rows]


def sound_to_image(bundle: Bundle, root: Path, cache: Path) -> tuple[float, float]:
    """Mean average precision of sounds over pictures of the colour that they are called by, and that of chance."""
    (queries, asked), (gallery, shown) = sounds(root), pictures(root)
    right = np.array([[colour == wanted for colour in shown] for wanted in asked])
    similarity = vectors(bundle, "audio", queries, cache) @ vectors(bundle, "image", gallery, cache).T
    return float(average_precision(similarity, right).mean()), float(chance_precision(right.sum(1), len(shown)).mean())
