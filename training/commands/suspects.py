"""`python -m training suspects RECIPE --pairs NAME`: labels that the nearest neighbours of their media contradict.

Leave-one-out kNN on frozen features (LOOK, arXiv 2110.06014): where most of an item's neighbours have another label,
its own is doubtful. Writes a table, the most doubtful first, with what the neighbours say; look at it, correct the
labels, or name the table in the pairs' `exclude`. Nothing is changed by itself: neighbours are wrong about rare kinds
too.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from training.encoders import load_encoder
from training.errors import TrainingError
from training.features import cached_features
from training.flags import add_flags
from training.measure.select.sides import Floats, Rows, Side, each
from training.measure.select.streaming import Sizes, nearest
from training.pairs import Pairs, media_name, read_pairs
from training.recipe import load_recipe


class SuspectsError(TrainingError):
    """Labels cannot be looked at: the message says why."""


@dataclass(frozen=True)
class Verdict:
    """Holds what the neighbours of each item say, row by row."""

    own: Floats
    """(N,): share of the neighbours, weighted by likeness, that have the item's own label."""
    other: Rows
    """(N,): the label that weighs most among the others; -1 where all neighbours agree with the item."""
    share: Floats
    """(N,): the weight of `other`."""

    def doubtful(self) -> Rows:
        """Items whose neighbours prefer another label, the clearest first."""
        rows = np.flatnonzero(self.share > self.own)
        return rows[np.argsort(-(self.share - self.own)[rows], kind="stable")]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "recipe", "--set", "--cache")
    parser.add_argument("--pairs", required=True, metavar="NAME", help="labelled pairs of the recipe")
    parser.add_argument("--out", type=Path, help="table to write (default: build/suspects/NAME.csv)")
    parser.add_argument(
        "--split",
        choices=["train", "validation", "test"],
        default="train",
        help="which split is looked at (default: train)",
    )
    parser.add_argument("--neighbours", type=int, default=10, metavar="K", help="neighbours that vote (default: 10)")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Encode, ask the neighbours, write the table. Raises SuspectsError."""
    recipe = load_recipe(options.recipe, options.overrides)
    if options.pairs not in recipe.pairs:
        raise SuspectsError(f"{options.recipe} has no pairs named {options.pairs}: {', '.join(recipe.pairs)}")
    pairs = read_pairs(recipe, options.pairs)[options.split]
    if pairs.labels is None:
        raise SuspectsError(f"pairs.{options.pairs} have no labels in their {options.split} split")
    if not 0 < options.neighbours < len(pairs.media):
        raise SuspectsError(f"--neighbours must be from 1 to {len(pairs.media) - 1}, one less than there are media")
    encoder = load_encoder(recipe, pairs.modality)
    features = cached_features(encoder, pairs.media, options.cache, what=pairs.name)
    votes = verdict(np.asarray(features.pooled), pairs.labels, options.neighbours)
    out = options.out or Path("build/suspects") / f"{options.pairs}.csv"
    doubtful = votes.doubtful()
    _write(out, pairs, votes, recipe.path(recipe.pairs[options.pairs].folder))
    for row in doubtful[:10]:
        label, other = pairs.classes[pairs.labels[row]], pairs.classes[votes.other[row]]
        print(f"{votes.share[row]:5.0%} {other:24} not {label:24} {pairs.media[row].name}", file=sys.stderr)
    return {"items": len(pairs.media), "suspects": len(doubtful), "table": str(out)}


def verdict(features: Floats, labels: Rows, neighbours: int) -> Verdict:
    """Return what the `neighbours` nearest others of each item say of its label; features (N, d), labels (N,).

    A neighbour weighs its cosine, so that of as many on both sides the nearer ones win.
    """
    side = Side("media", (features,), each(len(features)))
    everything = np.arange(len(features))
    sizes = Sizes(neighbours, queries=len(features))
    with tqdm(total=len(features), desc="neighbours", unit="row", unit_scale=True) as bar:
        near = nearest(side, everything, sizes, bar).rows
    directions = side.directions(everything)
    likeness = np.maximum(np.einsum("nd,nkd->nk", directions, directions[near]), 1e-6)
    votes = np.zeros((len(features), int(labels.max()) + 1), np.float32)
    np.add.at(votes, (everything[:, None], labels[near]), likeness / likeness.sum(1, keepdims=True))
    own_share = votes[everything, labels].copy()
    votes[everything, labels] = 0.0
    other, share = votes.argmax(1), votes.max(1)
    return Verdict(own_share, np.where(share > 0, other, -1), share)


def _write(out: Path, pairs: Pairs, votes: Verdict, folder: Path) -> None:
    assert pairs.labels is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(["file", "label", "neighbours_say", "share", "own_share"])
        for row in votes.doubtful():
            label, other = pairs.classes[pairs.labels[row]], pairs.classes[votes.other[row]]
            table.writerow(
                [media_name(pairs.media[row], folder), label, other, f"{votes.share[row]:.3f}", f"{votes.own[row]:.3f}"]
            )
