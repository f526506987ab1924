"""Merge two projectors that were trained from one initialisation: (1 - α) A + α B, tensor by tensor.

Weights of one init stay connected by a path of low loss (model soups, arXiv 2203.05482; UnIVAL, arXiv 2307.16184):
between two runs lies a head that can be better at both their tasks. α 0 and 1 give the files back byte for byte.
With --recipe several α are tried on validation, and the best is written.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from service.contract.licences import Licence, combined
from training import pipeline
from training.errors import TrainingError
from training.flags import add_flags
from training.heads.trained import licences_json, load_projectors, read_file
from training.measure.validation import Data, calibrate, means, overall, validate
from training.recipe import Recipe, load_recipe

File = tuple[dict[str, Tensor], dict[str, str]]


class MergeError(TrainingError):
    """Two projectors cannot be merged: the message says in what they differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A", help="projectors.safetensors")
    parser.add_argument("second", type=Path, metavar="B", help="projectors.safetensors of a run from the same init")
    parser.add_argument("--alpha", type=_share, nargs="+", default=[0.5], help="share of B; several need --recipe")
    parser.add_argument("--out", type=Path, required=True, help="projectors.safetensors to write")
    parser.add_argument("--recipe", type=Path, help="validate each α on this recipe's pairs and write the best")
    add_flags(parser, "--set", "--cache")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Write the merged file. Raises MergeError."""
    first, second = _read(options.first), _read(options.second)
    _check(options.first, first, options.second, second)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.recipe is None:
        if len(options.alpha) > 1:
            raise MergeError("several --alpha need --recipe, to choose by validation")
        alpha = options.alpha[0]
        _write(options, merged(first, second, alpha), alpha)
        return {"projectors": str(options.out), "alpha": alpha}
    recipe = load_recipe(options.recipe, options.overrides)
    _, _, data = pipeline.prepare(recipe, options.cache)
    scores: dict[float, float] = {}
    print(f"{'alpha':>6}{'score':>9}" + "".join(f"{name:>14}" for name in data), file=sys.stderr)
    for alpha in options.alpha:
        _write(options, merged(first, second, alpha), alpha)
        figures = validate(recipe, load_projectors(options.out, recipe).heads, data)
        if not figures:
            raise MergeError(f"{options.recipe} has no validation split to choose --alpha by")
        scores[alpha] = overall(figures)
        columns = "".join(f"{figures.get(name, float('nan')):>14.2f}" for name in data)
        print(f"{alpha:>6.2f}{scores[alpha]:>9.2f}{columns}", file=sys.stderr)
    best = max(scores, key=lambda alpha: scores[alpha])
    result = merged(first, second, best)
    _write(options, result, best)
    if 0 < best < 1:
        save_file(result[0], options.out, result[1] | _measured(recipe, data, options.out))
    return {
        "projectors": str(options.out),
        "alpha": best,
        **{f"score.{alpha:g}": round(score, 3) for alpha, score in scores.items()},
    }


def merged(first: File, second: File, alpha: float) -> File:
    """Tensors and metadata of the mixture. The means of mixed heads are not the mixture of means: they are left out."""
    (left, ours), (right, theirs) = first, second
    tensors = {key: torch.lerp(value, right[key], alpha) for key, value in left.items()}
    temperatures = np.log([float(ours["temperature"]), float(theirs["temperature"])])
    temperature = float(np.exp(temperatures @ np.array([1 - alpha, alpha])))
    learned = [map(Licence.model_validate, json.loads(metadata.get("licences", "[]"))) for metadata in (ours, theirs)]
    licences = licences_json(combined(*learned))
    return tensors, ours | {"temperature": repr(temperature), "means": "{}", "ladder": "{}", "licences": licences}


def _measured(recipe: Recipe, data: Data, path: Path) -> dict[str, str]:
    trained = load_projectors(path, recipe)
    temperature = calibrate(recipe, trained.heads, data, trained.temperature)
    return {"temperature": repr(temperature), "means": json.dumps(means(trained.heads, data))}


def _write(options: argparse.Namespace, file: File, alpha: float) -> None:
    if alpha in (0.0, 1.0):
        shutil.copyfile(options.second if alpha else options.first, options.out)
    else:
        save_file(file[0], options.out, file[1])


def _read(path: Path) -> File:
    file = read_file(path)
    if "temperature" not in file[1]:
        raise MergeError(f"{path} holds no projectors of this trainer")
    return file


def _check(first: Path, ours: File, second: Path, theirs: File) -> None:
    shapes, others = ({key: tuple(value.shape) for key, value in file[0].items()} for file in (ours, theirs))
    different = next((key for key in sorted(shapes | others) if shapes.get(key) != others.get(key)), None)
    if different is not None:
        raise MergeError(
            f"{first} and {second} are not of one kind: {different} is {shapes.get(different, 'absent')} "
            f"and {others.get(different, 'absent')}"
        )
    learned = [json.loads(file[1].get("encoders", "{}")) for file in (ours, theirs)]
    if other := next((m for m, encoder in learned[0].items() if learned[1].get(m, encoder) != encoder), None):
        raise MergeError(f"{first} and {second} learned from the features of different encoders of {other}")
    rises = [float(file[1].get("rise", "0")) for file in (ours, theirs)]
    if rises[0] != rises[1]:
        raise MergeError(f"{first} and {second} were trained with projector.rise {rises[0]:g} and {rises[1]:g}")
    if "text.reserve.reach" in ours[0]:
        raise MergeError("heads with a query bank cannot be merged, for banks cannot: set projector.querybank to 0")
    inits = [file[1].get("init", "") for file in (ours, theirs)]
    if inits[0] != inits[1]:
        raise MergeError(
            f"{first} and {second} were trained from different initialisations ({inits[0] or 'none'} and "
            f"{inits[1] or 'none'}): the mean of unrelated weights is no head"
        )


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
