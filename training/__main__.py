"""`python -m training`: a command per step, and `run` for all of them. The last line printed is one JSON object."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from service.contract.bundle import BundleError, check_target
from training import curate, distill, doctor, embed, pipeline
from training.commands import attaching, binding, evaluation, extend, merge, selection, sign, suspects
from training.distributed import joined, leave, processes
from training.errors import TrainingError
from training.flags import add_flags
from training.importing import command as importing
from training.recipe import Recipe, RecipeError, load_recipe


def make_parser(called: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands. `called`: what one calls them where that is not `python -m training NAME`."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (function, what) in _COMMANDS.items():
        command = commands.add_parser(name, prog=called, help=what, description=what)
        add_flags(command, "recipe", "--set", "--work", "--cache")
        if name in ("run", "export"):
            command.add_argument("--out", type=Path, required=True, help="bundle folder to write")
        if name in ("hubs", "export"):
            command.add_argument("--projectors", type=Path, help="projectors.safetensors (default: in --work)")
        if name == "export":
            command.add_argument("--evaluation", type=Path, help="evaluation.json (default: beside the projectors)")
            command.add_argument("--samples", type=Path, help="folder of photographs and sounds to check the graphs on")
        command.set_defaults(function=function)
    for name, (module, what) in _MODULES.items():
        command = commands.add_parser(name, prog=called, help=what, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(main=module.main)
    return parser


def main(arguments: list[str] | None = None, called: str | None = None) -> int:
    """Run one command; its exit status, 2 where it cannot do what it is asked for."""
    options = make_parser(called).parse_args(arguments)
    try:
        if processes() > 1 and options.command not in _TOGETHER:
            raise TrainingError(f"{options.command} is for one process: torchrun is for {', '.join(_TOGETHER)}")
        if "main" in options:
            result = options.main(options)
        else:
            recipe = load_recipe(options.recipe, options.overrides)
            options.work = options.work or Path("build/work") / recipe.name
            if "out" in options:
                check_target(options.out)  # before hours of training, and again when it is written
            result = options.function(recipe, options)
        if joined().index == 0:
            print(json.dumps(result), flush=True)
    except (TrainingError, BundleError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has; what is left is not to fail at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0 if result.get("ok", True) else 1  # what `doctor` finds lacking


def _run(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    frozen, _, data = pipeline.prepare(recipe, options.cache)
    trained = pipeline.fit(recipe, frozen, data, options.cache, options.work)
    if joined().index:
        return {}
    figures = pipeline.evaluate(recipe, frozen, data, trained, options.cache, options.work)
    bundle = pipeline.export(recipe, frozen, trained, figures, options.out)
    return {"bundle": str(bundle.path), "space": bundle.manifest.space, **bundle.manifest.evaluation}


def _pairs(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    read = pipeline.pairs(recipe, options.cache)
    return {f"{name}.{split}": len(part.links) for name, splits in read.items() for split, part in splits.items()}


def _features(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    _, _, data = pipeline.prepare(recipe, options.cache)
    return {
        f"{name}.{split}": [len(part.media), len(part.texts)]
        for name, splits in data.items()
        for split, part in splits.items()
    }


def _train(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    frozen, _, data = pipeline.prepare(recipe, options.cache)
    trained = pipeline.fit(recipe, frozen, data, options.cache, options.work)
    if joined().index:
        return {}
    best = max(trained.history, key=lambda entry: entry["score"])
    return {"projectors": str(options.work / "projectors.safetensors"), **best, **trained.ladder}


def _hubs(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    if not recipe.projector.querybank:
        raise RecipeError(f"{options.recipe}: projector.querybank is 0: there is no correction of hubs to fit")
    frozen, _, data = pipeline.prepare(recipe, options.cache)
    trained = pipeline.saved(recipe, options.projectors or options.work / "projectors.safetensors", frozen)
    corrected = pipeline.refit(recipe, frozen, data, trained, options.cache, options.work)
    return {"projectors": str(options.work / "projectors.safetensors"), **corrected.ladder}


def _export(recipe: Recipe, options: argparse.Namespace) -> dict[str, Any]:
    projectors = options.projectors or options.work / "projectors.safetensors"
    frozen = pipeline.encoders(recipe, options.cache)
    trained = pipeline.saved(recipe, projectors, frozen)
    measured = options.evaluation or projectors.with_name("evaluation.json")
    figures = json.loads(measured.read_text()) if measured.is_file() else {}
    bundle = pipeline.export(recipe, frozen, trained, figures, options.out, options.samples)
    return {"bundle": str(bundle.path), "space": bundle.manifest.space, **bundle.manifest.evaluation}


_COMMANDS = {
    "run": (_run, "pairs, features, train, evaluate and export in one go"),
    "pairs": (_pairs, "read and check the pairs"),
    "features": (_features, "encode everything once with the frozen encoders, into the cache"),
    "train": (_train, "train the projectors on cached features"),
    "hubs": (_hubs, "fit the correction of hubs anew to trained projectors"),
    "export": (_export, "write the bundle: one checked ONNX graph per modality"),
}
_TOGETHER = ("run", "features", "train", "add-modality")
"""Commands that the processes of torchrun do together."""
# Commands of modules of their own: each has add_arguments(parser) and main(options) -> the last line.
_MODULES = {
    "add-modality": (extend, "train a new tower against a bundle that stays as it is"),
    "attach": (attaching, "train image and sound towers into the text space of an embedding API"),
    "bind": (binding, "join two spaces through the texts that both can read"),
    "curate": (curate, "choose from a pool of captions or pairs what is worth training on"),
    "doctor": (doctor, "say what a recipe needs and lacks before it starts"),
    "embed": (embed, "embed huge sets offline, into Parquet that the service loads"),
    "evaluate": (evaluation, "measure a recipe's projectors on its test splits, or a bundle on any data"),
    "distill": (distill, "train a small student of a frozen encoder of sounds, and export it as ONNX"),
    "import": (importing, "make a bundle of a CLIP, SigLIP, CLAP or text model, without training"),
    "merge": (merge, "average two projectors that were trained from one initialisation"),
    "select": (selection, "rank pairs of encoders by how alike they are"),
    "sign": (sign, "sign a bundle's manifest, and so all its files"),
    "suspects": (suspects, "find labels that the neighbours of their media contradict"),
}


if __name__ == "__main__":
    leave(main())
