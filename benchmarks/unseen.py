"""Sounds of classes that training never heard, told apart among all: `python -m benchmarks.unseen RECIPE --work DIR`.

Takes the trained space of a recipe whose sounds have concepts, keeps its text projector as it is, and trains the audio
head anew on labels of part of the classes (and on the soft captions of the same clips), once per split of the classes.
Hubs are corrected by a bank of the same clips: what labels made too likely is the first of them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from training import pipeline
from training.files import default_cache
from training.fit.hubs import with_querybank
from training.fit.ladder import train
from training.heads.concepts import named
from training.pairs import read_labels
from training.recipe import PairSource, Recipe, load_recipe


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--work", type=Path, required=True, help="folder with the recipe's projectors.safetensors")
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--pairs", default="esc50", help="labelled sounds of the recipe")
    parser.add_argument("--splits", type=int, default=5, help="splits of the classes; each class is unseen once")
    parser.add_argument("--label-weight", type=float, default=1.0, help="share of steps on labels; concepts have 1")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    recipe, cache = load_recipe(options.recipe, options.overrides), options.cache or default_cache()
    frozen = pipeline.encoders(recipe)
    labels = sorted(read_labels(recipe, options.pairs))
    shuffled = np.random.default_rng(0).permutation(len(labels))
    rows: list[dict[str, Any]] = []
    for number, part in enumerate(np.array_split(shuffled, options.splits)):
        split = _without(recipe, options, [labels[index] for index in sorted(part)])
        data = pipeline.features(split, frozen, pipeline.pairs(split), cache)
        work = options.work / f"unseen-{number}"
        names = named(split, frozen, cache)
        # Anew: its banks are changed below.
        kept = pipeline.saved(recipe, options.work / "projectors.safetensors", frozen)
        trained = train(split, data, work, frozen={"text": kept.heads["text"]}, names={"audio": names["audio"]})
        if (
            recipe.projector.querybank
        ):  # hubs of this space of texts and sounds, as strongly as the recipe chose for its own
            trained = with_querybank(split, trained, data, {}, (kept.ladder["querybank.strength"], 0.0))
        figures = pipeline.evaluate(split, frozen, data, trained, cache, work)
        keys = (f"{options.pairs}.unseen.top1", f"{options.pairs}.top1")
        rows.append({"split": number, "unseen": figures[keys[0]], "all": figures[keys[1]]})
        print(f"split {number}: unseen {figures[keys[0]]:6.2f}  all {figures[keys[1]]:6.2f}", file=sys.stderr)
    mean = {key: round(float(np.mean([row[key] for row in rows])), 2) for key in ("unseen", "all")}
    print(f"{'mean':8} unseen {mean['unseen']:6.2f}  all {mean['all']:6.2f}", file=sys.stderr)
    result = {f"{options.pairs}.unseen.top1": mean["unseen"], f"{options.pairs}.top1": mean["all"], "splits": rows}
    print(json.dumps(result))
    return result


def _without(recipe: Recipe, options: argparse.Namespace, unseen: list[str]) -> Recipe:
    """The recipe with the labelled sounds alone, without some of their classes: once by label, once by concepts."""
    source = recipe.pairs[options.pairs]
    by_label: dict[str, Any] = {"supervision": "pairs", "unseen": unseen, "weight": options.label_weight}
    by_concept: dict[str, Any] = {"supervision": "concepts", "unseen": unseen, "weight": 1.0}
    pairs: dict[str, PairSource] = {
        options.pairs: source.model_copy(update=by_label),
        f"{options.pairs}_concepts": source.model_copy(update=by_concept),
    }
    spec = recipe.train.model_copy(
        update={"steps": options.steps, "warmup_steps": min(options.steps // 5, 50), "baseline": False}
    )
    return recipe.model_copy(update={"pairs": pairs, "train": spec, "emergent": {}})


if __name__ == "__main__":
    main()
