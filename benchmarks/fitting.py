"""What each way of fitting projectors is worth on real pairs: `python -m benchmarks.fitting RECIPE --cache DIR`.

Every table trains on the captions of one source (its validation split measures: mean R@1 of both directions, the best
validation of the run), on cached features. Each cell is one seed unless `--seeds` says more; the last line is JSON.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from service.contract.vectors import l2_normalise
from training import pipeline
from training.errors import TrainingError
from training.features import Features, default_cache
from training.fit.ladder import Trained, project, train
from training.measure.prepared import Prepared
from training.measure.ranks import retrieval
from training.measure.validation import validate
from training.pairs import Split
from training.recipe import Recipe, load_recipe

Splits = Mapping[Split, Prepared]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fitting", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path, help="gives the encoders, the pairs and the projector")
    parser.add_argument("--source", default="flickr8k", help="captioned pairs of the recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tables", nargs="+", choices=sorted(_TABLES), default=sorted(_TABLES))
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.source not in recipe.pairs or recipe.pairs[options.source].text is None:
            raise TrainingError(f"{options.recipe} has no captioned pairs named {options.source}")
        pairs = {options.source: recipe.pairs[options.source]}
        recipe = recipe.model_copy(update={"pairs": pairs, "emergent": {}})
        splits = pipeline.prepare(recipe, options.cache or default_cache())[2][options.source]
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    short = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "warmup_steps": options.steps // 8,
        "validate_every": max(1, options.steps // 4),
        "baseline": False,
    }
    results: dict[str, float] = {}
    for name in options.tables:
        print(f"\n{name}: {_TABLES[name][1]}")
        for row, changes, data in _TABLES[name][0](splits):
            scores = [
                _score(recipe, options.source, data, short | {"seed": seed}, changes) for seed in range(options.seeds)
            ]
            for column in scores[0]:
                key = re.sub(r"[^\w.]+", "_", ".".join(part for part in (name, row, column) if part))
                results[key] = round(float(np.mean([score[column] for score in scores])), 2)
            shown = "  ".join(f"{column or 'R@1'} {np.mean([s[column] for s in scores]):6.2f}" for column in scores[0])
            print(f"  {row:38}{shown}", flush=True)
    print(json.dumps({"steps": options.steps, "batch_size": options.batch_size, "seeds": options.seeds} | results))
    return 0


def _score(
    recipe: Recipe, source: str, splits: Splits, short: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, float]:
    """Validation R@1 of one run, whole and, where the row asks, of vectors cut short."""
    further: Mapping[str, Splits] = changes.get("further", {})
    values = recipe.model_dump()
    values["pairs"] |= dict.fromkeys(further, values["pairs"][source])
    values["projector"] |= changes.get("projector", {})
    values["train"] |= {**short, **changes.get("train", {})}
    changed = Recipe.model_validate(values)
    with tempfile.TemporaryDirectory() as work:
        trained = train(changed, {source: splits, **further}, Path(work))
    figures = {"": validate(changed, trained.heads, {source: splits})[source]}
    for length in changes.get("cut", ()):
        figures[f"at {length}"] = _cut(trained, splits["validation"], length)
    return figures


def _cut(trained: Trained, held: Prepared, length: int) -> float:
    media = l2_normalise(project(trained.heads[held.pairs.modality], held.media)[:, :length])
    texts = l2_normalise(project(trained.heads["text"], held.texts)[:, :length])
    recall = retrieval(media, texts, held.pairs.links)
    return (recall["m2t.r1"] + recall["t2m.r1"]) / 2


def _some(splits: Splits, media: int, first: int = 0) -> Splits:
    """`media` training media from the `first` on, and their texts."""
    part = splits["train"]
    keep = (part.pairs.links[:, 0] >= first) & (part.pairs.links[:, 0] < first + media)
    links = part.pairs.links[keep]
    used, texts = np.unique(links[:, 1], return_inverse=True)
    pairs = replace(
        part.pairs,
        media=part.pairs.media[first : first + media],
        texts=[part.pairs.texts[i] for i in used],
        links=np.stack([links[:, 0] - first, texts.reshape(-1)], 1),
    )
    rows = ((part.media, np.arange(first, first + len(pairs.media))), (part.texts, used))
    features = [Features(np.array(side.pooled[chosen])) for side, chosen in rows]
    return {**splits, "train": Prepared(pairs, *features)}


def _shuffled(splits: Splits, share: float) -> Splits:
    """A share of the training media with the captions of one another."""
    part, rng = splits["train"], np.random.default_rng(0)
    wrong = rng.permutation(len(part.pairs.media))[: int(share * len(part.pairs.media))]
    moved = np.arange(len(part.pairs.media))
    moved[wrong] = np.roll(wrong, 1)
    links = part.pairs.links.copy()
    links[:, 0] = moved[links[:, 0]]
    return {**splits, "train": replace(part, pairs=replace(part.pairs, links=links))}


Row = tuple[str, dict[str, Any], Splits]


def _heads(splits: Splits) -> Iterable[Row]:
    for kind in ("ridge", "cca", "linear", "mlp"):
        yield kind, {"projector": {"kind": kind, "dimensions": 256}}, splits


def _few(splits: Splits) -> Iterable[Row]:
    for count in (250, 500, 1000, 2000, len(splits["train"].media)):
        part = _some(splits, count)
        for kind in ("ridge", "cca", "linear"):
            yield f"{count} media {kind}", {"projector": {"kind": kind, "dimensions": 256}}, part


def _captions(splits: Splits) -> Iterable[Row]:
    one = splits["train"]
    first = replace(
        one, pairs=replace(one.pairs, links=one.pairs.links[np.unique(one.pairs.links[:, 0], return_index=True)[1]])
    )
    yield "one caption in the data", {}, {**splits, "train": first}
    yield "all, one per batch", {}, splits
    for kind in ({"kind": "info_nce"}, {"kind": "info_nce", "repeats": "positive"}, {"kind": "sdm"}):
        name = " ".join(str(value) for value in kind.values())
        yield f"all, two per batch, {name}", {"train": {"objective": {**kind, "captions": 2}}}, splits


def _objectives(splits: Splits) -> Iterable[Row]:
    yield "info_nce", {}, splits
    for temperature in (0.07, 0.02):  # IRRA's own is 0.02, and fixed
        yield f"sdm from {temperature}", {"train": {"objective": {"kind": "sdm"}, "temperature": temperature}}, splits


def _noise(splits: Splits) -> Iterable[Row]:
    for share in (0.0, 0.1, 0.3):
        part = _shuffled(splits, share)
        for weight in (0.0, 10.0, 100.0):
            row = f"{share:.0%} shuffled, weight {weight:g}"
            yield row, {"train": {"regularise": {"noise_robust": weight}}}, part


def _curriculum(splits: Splits) -> Iterable[Row]:
    """Two thirds of the media are noisy, one third is clean; every run has as many steps."""
    media = len(splits["train"].media)
    clean = _some(splits, media - 2 * media // 3, first=2 * media // 3)
    unjudged: Splits = {split: _some({"train": part}, 0)["train"] for split, part in splits.items()}
    yield "the clean third alone", {}, clean
    for share in (0.3, 0.6):
        part = _shuffled(_some(splits, 2 * media // 3), share)["train"]
        noisy = {**unjudged, "train": replace(part, pairs=replace(part.pairs, name="noisy"))}
        yield f"{share:.0%} of the rest shuffled, to the end", {"further": {"noisy": noisy}}, clean
        for end in (0.5, 0.75):
            changes = {"further": {"noisy": noisy}, "train": {"until": {"noisy": end}}}
            yield f"{share:.0%} shuffled, clean alone from {end:.0%} on", changes, clean


def _regularisers(splits: Splits) -> Iterable[Row]:
    for count in (1000, len(splits["train"].media)):
        part = _some(splits, count)
        yield f"{count} media plain", {}, part
        yield f"{count} media uniformity 0.1", {"train": {"regularise": {"uniformity": 0.1}}}, part


def _matryoshka(splits: Splits) -> Iterable[Row]:
    lengths = (32, 64, 128)
    yield "plain", {"cut": lengths}, splits
    yield "trained for 32, 64, 128", {"cut": lengths, "projector": {"matryoshka": lengths}}, splits


_TABLES = {
    "heads": (_heads, "closed forms and trained heads, 256 dimensions"),
    "few": (_few, "CCA's subspace against affine maps, by the number of media (arXiv 2503.05283)"),
    "captions": (_captions, "several captions of a medium"),
    "objectives": (_objectives, "contrasts"),
    "noise": (_noise, "pairs shuffled among one another, and the noise-robust terms (arXiv 2309.17002)"),
    "curriculum": (_curriculum, "noisy pairs first, then clean ones, against both throughout (arXiv 2410.08202)"),
    "regularisers": (_regularisers, "what is added to the contrast"),
    "matryoshka": (_matryoshka, "vectors cut short (arXiv 2205.13147)"),
}


if __name__ == "__main__":
    sys.exit(main())
