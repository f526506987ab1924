"""Sounds find pictures that they were never trained with: `python -m benchmarks.emergent RECIPE --out DIR`.

From a recipe of images, sounds and texts: trains a space of pictures and texts, adds sounds to it with `add-modality`
(the older towers must stay the same bytes), trains a space of sounds and texts, and joins the two with `bind`. Each
joint space is then measured through its ONNX graphs: mean average precision of the recipe's `emergent` retrieval,
beside chance. What is in DIR already is not made again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.commands import finish, parser_of
from service.contract.bundle import Bundle, read_bundle
from training.__main__ import main as training
from training.errors import TrainingError
from training.features import cached_features
from training.files import default_cache
from training.heads.bundled import as_encoder
from training.measure.emergent import emergent_figures
from training.pairs import Pairs, read_pairs
from training.recipe import Recipe, load_recipe, read_yaml


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("emergent", __doc__, bundle=False)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundles")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--emergent", type=Path, help="recipe with the `emergent` section to measure (default: RECIPE)")
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args(arguments)
    cache = options.cache or default_cache()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.emergent is not None:
            section = read_yaml(options.emergent).get("emergent", {})
            recipe = Recipe.model_validate(recipe.model_dump() | {"emergent": section})
        bundles = {name: read_bundle(path) for name, path in _made(recipe, options.out, cache).items()}
        results = _measure(recipe, bundles, cache)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results))
    return 0


def _made(recipe: Recipe, out: Path, cache: Path) -> dict[str, Path]:
    """Make the bundles that are not there yet, with the commands that a user has; the joint ones by name."""
    out.mkdir(parents=True, exist_ok=True)
    whole, texts = out / "recipe.yaml", out / "texts.txt"
    parts = {"pictures": recipe.only(("image", "text")), "sounds": recipe.only(("audio", "text"))}
    whole.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    named = [name for name, source in recipe.pairs.items() if source.text is None]
    lines = dict.fromkeys(text for name in named for text in read_pairs(recipe, name)["train"].texts)
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    common = ["--cache", str(cache)]
    for name, part in parts.items():
        path = out / f"{name}.yaml"
        path.write_text(yaml.safe_dump(part.model_dump(mode="json", exclude_none=True)))
        _once(out / name, ["run", str(path), "--work", str(out / f"work-{name}"), *common])
    pictures, sounds = str(out / "pictures"), str(out / "sounds")
    work = ["--work", str(out / "work-extended")]
    joint = {name: out / name for name in ("extended", "bound")}
    _once(joint["extended"], ["add-modality", pictures, str(whole), *work, *common])
    _once(joint["bound"], ["bind", sounds, pictures, "--texts", str(texts), "--name", "bound", *common])
    return joint


def _once(target: Path, command: list[str]) -> None:
    if not target.exists() and training([*command, "--out", str(target)]):
        raise TrainingError(f"python -m training {' '.join(command)} failed")


def _measure(recipe: Recipe, bundles: dict[str, Bundle], cache: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    print(f"{'space':14}{'retrieval':18}{'mAP':>8}{'95 %':>18}{'chance':>9}{'times':>8}")
    for name, bundle in bundles.items():
        for key, spec in recipe.emergent.items():
            sets = [read_pairs(recipe, source)["test"] for source in (spec.queries, *spec.gallery)]
            vectors = [_vectors(bundle, pairs, cache) for pairs in sets]
            figures = emergent_figures(key, spec, sets[0], vectors[0], sets[1:], np.concatenate(vectors[1:]))
            results |= {f"{name}.{figure}": value for figure, value in figures.items()}
            score, chance = figures[f"{key}.map"], figures[f"{key}.chance"]
            between = "{:.2f} to {:.2f}".format(*figures[f"{key}.map.ci95"])
            print(f"{name:14}{key:18}{score:>8.2f}{between:>18}{chance:>9.2f}{score / chance:>8.1f}")
    return results


def _vectors(bundle: Bundle, pairs: Pairs, cache: Path) -> np.ndarray:
    encoder = as_encoder(bundle, pairs.modality)
    return np.asarray(cached_features(encoder, pairs.media, cache, what=f"{pairs.name} {pairs.modality}").pooled)


if __name__ == "__main__":
    finish(main)
