"""Does the ranking of `select` predict what training gives? `python -m benchmarks.select_predicts SELECTION`.

Measures every pair of candidates on part of the train split, trains linear projectors of each pair on that same part
with one short budget, and takes R@1 on the test split (mean of both directions). Printed are the pairs and, for each
measure, the R@1 of the pair that it puts first and Spearman's rank correlation with R@1:

- `all`: over all pairs;
- `pretrained`: over those without a random-initialised control, which any measure tells apart;
- `text`, `media`: of the pretrained ones with the other side given, the mean over it: the choice that a user has.

Ctrl-C keeps the features and the R@1 of the pairs that are trained; the same command goes on with the next one.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from tqdm import tqdm

from benchmarks.commands import finish, parser_of
from training.errors import TrainingError
from training.features import Features
from training.files import default_cache, write
from training.fit.ladder import train
from training.measure.prepared import Prepared
from training.measure.ranks import retrieval
from training.measure.select.candidates import Network, Selection, load_selection
from training.measure.select.sides import Floats, Side, grouped, sampled
from training.measure.select.streaming import MEASURES, Alignment, compare
from training.measure.select.towers import read
from training.measure.validation import project
from training.pairs import Pairs, read_pairs
from training.recipe import ProjectorSpec, Recipe, TrainSpec


@dataclass(frozen=True)
class Measured:
    alignment: Alignment
    r1: float
    """R@1 of the test split, in percent, the mean of both directions."""
    control: bool
    """Whether one of the two is random-initialised."""


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("select_predicts", __doc__, bundle=False)
    parser.add_argument("selection", type=Path)
    parser.add_argument("--source", default="flickr8k", help="captioned pairs of its recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--work", type=Path, default=Path("build/select_predicts"))
    parser.add_argument("--items", type=int, default=2000, help="media of the train split")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        selection = load_selection(options.selection, options.overrides, [options.source])
        measured = measure(selection, options)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(tell(measured, options)))
    return 0


def measure(selection: Selection, options: argparse.Namespace) -> list[Measured]:
    """Features, the four measures, then R@1 of each pair of candidates. Raises TrainingError."""
    splits = read_pairs(selection.recipe, options.source)
    if splits["train"].labels is not None or not len(splits["test"].links):
        raise TrainingError(f"pairs.{options.source}: captions with a train and a test split are needed")
    pairs = {"train": sampled(splits["train"], options.items, options.seed), "test": splits["test"]}
    media, texts = encode(selection, pairs, options.cache or default_cache())
    rows = grouped(pairs["train"])
    alignments = compare(
        [Side(name, (by_split["train"],), rows[0]) for name, by_split in media.items()],
        [Side(name, (by_split["train"],), rows[1]) for name, by_split in texts.items()],
    )
    recipe = _short(selection.recipe, options)
    asked = f"{recipe.model_dump_json(include={'projector', 'train', 'pairs'})}{options.items}"
    results = options.work / f"r1-{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
    done: dict[str, float] = json.loads(results.read_text()) if results.is_file() else {}
    modality = pairs["train"].modality
    measured = []
    for one in tqdm(alignments, desc="train", unit="pair"):
        sources = selection.candidates[modality][one.media], selection.candidates["text"][one.text]
        key = f"{one.media}={sources[0]!r} {one.text}={sources[1]!r}"
        if key not in done:
            prepared = {
                split: Prepared(pairs[split], Features(media[one.media][split]), Features(texts[one.text][split]))
                for split in ("train", "test")
            }
            done[key] = recall(recipe, options.source, prepared)
            write(results, json.dumps(done, indent=1) + "\n")
        random = any(isinstance(source, Network) and source.random for source in sources)
        measured.append(Measured(one, done[key], random))
    return sorted(measured, key=lambda pair: -pair.r1)


def encode(
    selection: Selection, pairs: Mapping[str, Pairs], cache: Path
) -> tuple[dict[str, dict[str, Floats]], dict[str, dict[str, Floats]]]:
    """Features by candidate and split, of media and of texts; what a text encoder is fitted on is the train split."""
    result: list[dict[str, dict[str, Floats]]] = []
    for modality in (pairs["train"].modality, "text"):
        features: dict[str, dict[str, Floats]] = {name: {} for name in selection.candidates[modality]}
        for tower in read(selection.recipe, modality, selection.candidates[modality], pairs["train"].texts, cache):
            for split, part in pairs.items():
                items = part.texts if modality == "text" else part.media
                for name, parts in tower.encode(items, cache, split).items():
                    features[name][split] = np.concatenate(parts, axis=1)
        result.append(features)
    return result[0], result[1]


def recall(recipe: Recipe, source: str, prepared: Mapping[str, Prepared]) -> float:
    """R@1 of projectors trained on the train split, on the test split."""
    part = prepared["train"]
    nothing = replace(part.pairs, media=[], texts=[], links=np.zeros((0, 2), np.int64))
    empty = Prepared(nothing, Features(part.media.pooled[:0]), Features(part.texts.pooled[:0]))
    with tempfile.TemporaryDirectory() as work:
        data = {source: {"train": part, "validation": empty, "test": prepared["test"]}}
        heads = train(recipe, data, Path(work)).heads  # type: ignore[arg-type]
    test = prepared["test"]
    vectors = project(heads[test.pairs.modality], test.media), project(heads["text"], test.texts)
    figures = retrieval(*vectors, test.pairs.links)
    return (figures["m2t.r1"] + figures["t2m.r1"]) / 2


def tell(measured: Sequence[Measured], options: argparse.Namespace) -> dict[str, Any]:
    """Print the tables; every figure of the last line."""
    result: dict[str, Any] = {
        key: getattr(options, key) for key in ("source", "items", "steps", "batch_size", "dimensions", "seed")
    }
    result["pairs"] = len(measured)
    print(f"{'media':14}{'text':14}{'R@1':>7}{''.join(f'{measure:>12}' for measure in MEASURES)}")
    for pair in measured:
        one = pair.alignment
        values = "".join(f"{getattr(one, measure):>12.4f}" for measure in MEASURES)
        print(f"{one.media:14}{one.text:14}{pair.r1:>7.2f}{values}{'  control' if pair.control else ''}")
        result[f"r1.{one.media}.{one.text}"] = round(pair.r1, 2)
    pretrained = [pair for pair in measured if not pair.control]
    print(
        f"\nSpearman's rho with R@1\n{'measure':14}{'all':>8}{'pretrained':>12}{'text':>8}{'media':>8}{'picks R@1':>12}"
    )
    for measure in MEASURES:
        figures = {
            "all": _rho(measured, measure),
            "pretrained": _rho(pretrained, measure),
            "text": _within(pretrained, measure, lambda pair: pair.alignment.media),
            "media": _within(pretrained, measure, lambda pair: pair.alignment.text),
        }
        picked = max(measured, key=lambda pair: getattr(pair.alignment, measure)).r1
        columns = [f"{'-' if rho is None else format(rho, '.3f')}" for rho in figures.values()]
        print(f"{measure:14}{columns[0]:>8}{columns[1]:>12}{columns[2]:>8}{columns[3]:>8}{picked:>12.2f}")
        result |= {f"rho.{measure}.{over}": value for over, value in figures.items()}
        result[f"picked.{measure}"] = round(picked, 2)
    for side in ("text", "media"):
        rhos = {m: rho for m in MEASURES if (rho := result[f"rho.{m}.{side}"]) is not None}
        result[f"trust.{side}"] = max(rhos, key=lambda measure: rhos[measure]) if rhos else None
        print(f"to choose among {side} encoders, trust {result[f'trust.{side}']}")
    print(f"{'best of all':14}{measured[0].r1:>48.2f}\n")
    return result


def _rho(measured: Sequence[Measured], measure: str) -> float | None:
    """Spearman's correlation; None where there are fewer than three pairs, or no differences to rank."""
    values = [getattr(pair.alignment, measure) for pair in measured], [pair.r1 for pair in measured]
    if len(measured) < 3 or any(len(set(series)) == 1 for series in values):
        return None
    return round(float(spearmanr(*values).statistic), 4)


def _within(measured: Sequence[Measured], measure: str, given: Callable[[Measured], str]) -> float | None:
    parts = [[pair for pair in measured if given(pair) == name] for name in dict.fromkeys(map(given, measured))]
    rhos = [rho for part in parts if (rho := _rho(part, measure)) is not None]
    return round(float(np.mean(rhos)), 4) if rhos else None


def _short(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """Linear projectors, one budget for all. Without validation the last weights are kept."""
    projector = ProjectorSpec(kind="linear", dimensions=options.dimensions, dropout=0.1)
    steps = options.steps
    spec = TrainSpec(
        steps=steps,
        batch_size=options.batch_size,
        warmup_steps=max(1, steps // 8),
        validate_every=steps,
        seed=options.seed,
    )
    return recipe.model_copy(update={"projector": projector, "train": spec, "emergent": {}})


if __name__ == "__main__":
    finish(main)
