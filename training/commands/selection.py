"""`python -m training select FILE`: rank pairs of encoders by how alike they are before anything is trained.

Reads top to bottom: candidates → features of a set of pairs (cached) → measures → table, select.json, a heat map per
set. What the encoders are is in the file (training.measure.select.candidates); what the measures are, in
training.measure.select.measures. Ctrl-C keeps the features; the same command goes on with them.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from service.contract.bundle import Modality
from training.flags import add_flags
from training.measure.select.candidates import SelectError, Selection, load_selection
from training.measure.select.report import TRUSTED, Table, print_table, write_heat_map, write_json
from training.measure.select.sides import Floats, Groups, Side, each, grouped, sampled
from training.measure.select.streaming import MEASURES, Sizes, accuracy, compare
from training.measure.select.towers import read
from training.pairs import Pairs, read_pairs

__all__ = ["SelectError", "add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = Sizes()
    parser.add_argument("selection", type=Path, help="YAML, such as training/recipes/select/flickr8k.yaml")
    parser.add_argument("--out", type=Path, help="folder for select.json and heat maps (default: build/select/NAME)")
    add_flags(parser, "--set", "--cache")
    parser.add_argument("--pairs", nargs="+", default=[], metavar="NAME", help="pairs of the recipe (default: all)")
    parser.add_argument(
        "--split", choices=["train", "validation", "test"], default="train", help="which split's media (default: train)"
    )
    parser.add_argument("--items", type=int, metavar="N", help="media drawn from the split (default: all)")
    # The best predictor of R@1 after training of the four: benchmarks.select_predicts.
    parser.add_argument("--by", choices=MEASURES, default="mutual_knn", help="what ranks (default: mutual_knn)")
    parser.add_argument(
        "--neighbours",
        type=int,
        default=sizes.neighbours,
        metavar="K",
        help=f"neighbours that are compared (default: {sizes.neighbours})",
    )
    parser.add_argument("--queries", type=int, default=sizes.queries, help="rows whose neighbours are looked for")
    parser.add_argument("--batch", type=int, default=sizes.batch, help="rows of an RBF kernel")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, write. The last line has each set's best pair, and every figure under set.media.text.measure."""
    sizes = Sizes(options.neighbours, options.queries, options.batch, seed=options.seed)
    for name, value, least in (("items", options.items, 4), ("neighbours", sizes.neighbours, 1),
                               ("queries", sizes.queries, 1), ("batch", sizes.batch, 4)):  # fmt: skip
        if value is not None and value < least:
            raise SelectError(f"--{name} must be at least {least}")
    selection = load_selection(options.selection, options.overrides, options.pairs)
    cache, out = options.cache, options.out or Path("build/select") / options.selection.stem
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    tables = {}
    for name in selection.recipe.pairs:
        pairs = sampled(read_pairs(selection.recipe, name)[options.split], options.items, options.seed)
        if not len(pairs.links):
            raise SelectError(f"pairs.{name} have no {options.split} split with texts")
        table = measure(selection, pairs, sizes, cache)
        table.alignments.sort(key=lambda one: getattr(one, options.by), reverse=True)
        print_table(name, table, options.by, sys.stderr)
        write_heat_map(out / f"{name}.svg", name, table)
        tables[name] = table
        write_json(out / "select.json", tables, options.by, sizes)
        best = table.alignments[0]
        result |= {f"{name}.best": [best.media, best.text], f"{name}.rows": table.rows}
        for one in table.alignments:
            result |= {f"{name}.{one.media}.{one.text}.{key}": round(getattr(one, key), 4) for key in MEASURES}
        result |= {f"{name}.{encoder}.own_knn": round(value, 4) for encoder, value in table.own.items()}
    trust = {f"trust.{side}": measure for side, (measure, _) in TRUSTED.items()}
    return result | trust | {"by": options.by, "out": str(out)}


def measure(selection: Selection, pairs: Pairs, sizes: Sizes, cache: Path) -> Table:
    """Encode the pairs with every candidate, and compare. Raises SelectError, or FeatureError naming a bad item."""
    groups = grouped(pairs)
    media = sides(selection, pairs.modality, pairs, groups[0], cache)
    texts = sides(selection, "text", pairs, groups[1], cache)
    accuracies = {}
    if pairs.labels is not None:
        items = each(len(pairs.media))
        accuracies = {side.name: accuracy(Side(side.name, side.parts, items), pairs.labels, sizes) for side in media}
    widths = {
        f"{modality}/{side.name}": sum(part.shape[1] for part in side.parts)
        for modality, several in ((pairs.modality, media), ("text", texts))
        for side in several
    }
    return Table(pairs.modality, len(groups[0]), compare(media, texts, sizes), accuracies, widths)


def sides(selection: Selection, modality: Modality, pairs: Pairs, rows: Groups, cache: Path) -> list[Side]:
    """A side for each candidate of a modality, in the selection's order."""
    candidates = selection.candidates[modality]
    items = pairs.texts if modality == "text" else pairs.media
    parts: dict[str, tuple[Floats, ...]] = {}
    for tower in read(selection.recipe, modality, candidates, pairs.texts, cache):
        parts |= tower.encode(items, cache, pairs.name)
    return [Side(name, parts[name], rows) for name in candidates]
