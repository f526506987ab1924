"""A recipe over several seeds: python -m benchmarks.seeds RECIPE --data DATA [--seeds 0 1 2 3 4] [--set KEY=VALUE]

Each seed is trained and tried once on the test splits, in a folder of its own; a finished one is not done again. The
seed with the best validation score is the one to ship: its projectors and figures are copied into the work folder.
Prints the mean and the standard deviation of each test figure, and, as the last line, one JSON object.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.demo import print_table
from training import pipeline
from training.files import default_cache
from training.recipe import SET_HELP, Recipe, load_recipe

_COPIED = ("projectors.safetensors", "evaluation.json", "training.json")
_FIGURES = (".r1", ".top1", ".map")


def tried(recipe: Recipe, seeds: Sequence[int], cache: Path, work: Path) -> Iterator[tuple[float, dict[str, Any]]]:
    """The validation score and the test figures of each seed, from its folder where it is finished."""
    inputs: pipeline.Inputs | None = None
    for seed in seeds:
        folder = work / f"seed-{seed}"
        if not (folder / "evaluation.json").is_file():
            inputs = inputs or pipeline.prepare(recipe, cache)  # the same for all seeds
            frozen, _, data = inputs
            seeded = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
            trained = pipeline.fit(seeded, frozen, data, cache, folder)
            pipeline.evaluate(seeded, frozen, data, trained, cache, folder)
        record = json.loads((folder / "training.json").read_text())
        best = max(entry["score"] for entry in record["history"])
        score = round(best + record.get("querybank.gain", 0.0), 3)
        print(f"seed {seed}: {score} on validation", file=sys.stderr)
        yield score, json.loads((folder / "evaluation.json").read_text())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="data.root of the recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--work", type=Path, help="folder for the seeds' files (default: build/work/NAME)")
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help=SET_HELP)
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe, [f"data.root={options.data}", "train.baseline=false", *options.overrides])
    work = options.work or Path("build/work") / recipe.name
    scores: dict[int, float] = {}
    figures: dict[int, dict[str, Any]] = {}
    for seed, result in zip(options.seeds, tried(recipe, options.seeds, options.cache, work), strict=True):
        scores[seed], figures[seed] = result
    shipped = max(scores, key=lambda seed: scores[seed])
    for name in _COPIED:
        shutil.copyfile(work / f"seed-{shipped}" / name, work / name)
    names = [
        name
        for name, value in figures[shipped].items()
        if isinstance(value, float) and name.endswith(_FIGURES) and not name.startswith(("corrected.", "top10."))
    ]
    means = {name: round(statistics.fmean(seed[name] for seed in figures.values()), 2) for name in names}
    deviations = {name: round(statistics.pstdev([seed[name] for seed in figures.values()]), 2) for name in names}
    rows = [
        (name, f"{means[name]:.2f}", f"± {deviations[name]:.2f}   shipped {figures[shipped][name]}") for name in names
    ]
    print_table(f"{recipe.name}: {len(scores)} seeds", ("test figure", "mean", ""), rows)
    shipped_figures = {name: figures[shipped][name] for name in names}
    print(
        json.dumps(
            {"seeds": scores, "shipped": shipped, "mean": means, "deviation": deviations, "figures": shipped_figures}
        )
    )


if __name__ == "__main__":
    main()
