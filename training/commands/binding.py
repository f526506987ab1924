"""Join two spaces through the texts that both can read, without a pair: A's images or sounds move into B's space.

The map is a closed form between the two text towers' vectors of a list of texts (C-MCR, arXiv 2305.14381, and OmniBind,
arXiv 2407.11895, connect spaces through the modality that they share), appended to A's graphs. With --weight 0 B's
towers are the same bytes and its stores stay valid; else a text's vector is the unit vector of
(1 - weight) B(text) + weight map(A(text)).
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from service.contract.bundle import Bundle, Modality, read_bundle
from service.contract.tokens import TextPreprocessing
from training.bundle.bind.joint import write_joint
from training.bundle.bind.maps import Fit, fit
from training.bundle.bind.routing import best, learn
from training.errors import TrainingError
from training.features import cached_features
from training.flags import add_flags
from training.heads.bundled import as_encoder
from training.recipe import load_recipe

_FEWEST = 20
_CHECKED = 16  # texts that a joint text graph is checked on


class BindError(TrainingError):
    """Two bundles cannot be bound: the message says why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, metavar="A", help="bundle whose images or sounds are to be moved")
    parser.add_argument("second", type=Path, metavar="B", help="bundle into whose space they move")
    parser.add_argument("--texts", type=Path, required=True, help="a text per line, about what the media show")
    parser.add_argument("--out", type=Path, required=True, help="bundle folder to write")
    share = parser.add_mutually_exclusive_group()
    share.add_argument("--weight", type=_share, default=0.0, help="share of A's text tower in a text (default: 0)")
    share.add_argument("--recipe", type=Path, help="learn the weight on this recipe's validation splits")
    add_flags(parser, "--set", "--cache")
    parser.add_argument("--name", help="of the new bundle (default: A-B)")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Write the joint bundle. Raises TrainingError."""
    first, second = read_bundle(options.first), read_bundle(options.second)
    cache, weight = options.cache, options.weight
    moved = _moved(first, second)
    if (weight or options.recipe) and not _same_tokens(first, second):
        raise BindError("the text towers read different tokens, and share no input: the weight must be 0")
    texts = _read(options.texts)
    source, target = (
        np.asarray(
            cached_features(as_encoder(bundle, "text"), texts, cache, what=f"{bundle.manifest.name} texts").pooled
        )
        for bundle in (first, second)
    )
    fitted = fit(source, target)
    _print_fit(fitted)
    figures: dict[str, Any] = {
        "bind.texts": len(texts),
        "bind.text_cosine": round(fitted.cosine, 4),
        "bind.text_r1": round(fitted.recall, 2),
    }
    if options.recipe is not None:
        table = learn(load_recipe(options.recipe, options.overrides), second, first, fitted.map, cache)
        weight = best(table)
        _print_weights(table, weight)
        figures |= {f"bind.validation.{name}": round(value, 2) for name, value in table[weight].items()}
    figures["bind.weight"] = weight
    name = options.name or f"{first.manifest.name}-{second.manifest.name}"[:64]
    joint = write_joint(first, second, fitted.map, weight, figures, texts[:_CHECKED], name, options.out)
    manifest = joint.manifest
    return {
        "bundle": str(joint.path),
        "space": manifest.space,
        "admits": list(manifest.admits),
        "moved": moved,
        **figures,
        **{f"parity.{modality}": manifest.evaluation[f"parity.{modality}"] for modality in moved},
    }


def _moved(first: Bundle, second: Bundle) -> list[Modality]:
    for bundle in (first, second):
        if "text" not in bundle.manifest.towers:
            raise BindError(f"{bundle.path} has no text tower: there is nothing to join the spaces through")
    moved = [modality for modality in first.manifest.towers if modality not in second.manifest.towers]
    if not moved:
        raise BindError(f"{first.path} has no modality that {second.path} lacks")
    return moved


def _same_tokens(first: Bundle, second: Bundle) -> bool:
    specs, tokenizers = [], []
    for bundle in (first, second):
        spec = bundle.manifest.towers["text"].preprocessing
        assert isinstance(spec, TextPreprocessing)
        specs.append(spec.model_dump(exclude={"tokenizer"}))
        tokenizers.append(bundle.manifest.files[spec.tokenizer])
    return specs[0] == specs[1] and tokenizers[0] == tokenizers[1]


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BindError(f"--texts {path} cannot be read: {error}") from None
    texts = [text for text in dict.fromkeys(line.strip() for line in lines) if text]
    if len(texts) < _FEWEST:
        raise BindError(f"--texts {path} has {len(texts)} different texts: a map needs {_FEWEST} at least")
    return texts


def _print_fit(fitted: Fit) -> None:
    print(
        f"map: cosine {fitted.cosine:.4f}, R@1 {fitted.recall:.2f} of texts that it was not fitted on", file=sys.stderr
    )


def _print_weights(table: Mapping[float, Mapping[str, float]], chosen: float) -> None:
    names = list(table[chosen])
    print(f"{'weight':12}" + "".join(f"{name:>14}" for name in names), file=sys.stderr)
    for weight, figures in table.items():
        mark = "  ← taken" if weight == chosen else ""
        print(f"{weight:<12.1f}" + "".join(f"{figures[name]:>14.2f}" for name in names) + mark, file=sys.stderr)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value
