"""Towers in other precisions: made, measured against the tower's own graph on real inputs, and taken or refused.

The gates: cosine to the tower's own vectors 0.99 on average, and no more than 0.5 points of R@1 (captions, both ways)
or of top-1 (labels) lost, on the mean of the recipe's test sets, the other tower being as it is. So vectors of all
precisions of a space may stand in one store (docs/decisions/0008-precision.md).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from service.contract.bundle import GATE_COSINE as COSINE
from service.contract.bundle import GATE_R1_LOSS as R1_LOSS
from service.contract.bundle import OUTPUT, Accelerator, Modality, Precision, Tower, Variant, sha256_file
from service.contract.vectors import l2_normalise
from training.bundle.quantise import QuantiseError, batches, half, static
from training.data.shards import Medium
from training.encoders import FrozenEncoder
from training.features import Item, feeds, preparer
from training.graphs import session
from training.measure.ranks import class_vectors, mean_recall, top1
from training.measure.validation import label_prompts
from training.pairs import Pairs, Split, read_pairs
from training.recipe import Recipe

Floats = NDArray[np.float32]
Encoders = Mapping[Modality, FrozenEncoder]

OVERLAP = 0.9
"""The least share of a text's ten nearest other texts that stay the same, for a text tower alone."""
_MEDIA = 1000  # of a test set, at most
_CHUNK = 16
_CALIBRATION = 256  # texts of a text tower alone
_DEVICES: dict[Accelerator, Precision] = {"cpu": "int8", "cuda": "fp16"}


@dataclass(frozen=True)
class Measured:
    """A variant's vectors beside those of the tower's own graph."""

    cosine: float
    """Mean over the inputs."""
    cosine_lowest: float
    r1_loss: float
    """Points lost, mean over the sets; below 0: gained."""
    top10_overlap: float
    """Share of what the tower's own graph finds first that the variant finds first too, mean over the queries."""

    @property
    def passes(self) -> bool:
        return self.cosine >= COSINE and self.r1_loss <= R1_LOSS  # NaN passes nothing

    def figures(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in vars(self).items()}


@dataclass(frozen=True)
class _Set:
    """The test pairs of one source, as far as they are measured on."""

    pairs: Pairs
    media: Sequence[Medium]
    prompts: list[str]
    """Captions; or classes in their templates, class by class."""


def make_variants(
    recipe: Recipe, encoders: Encoders, towers: Mapping[Modality, Tower], folder: Path
) -> tuple[dict[Modality, Tower], dict[str, Any]]:
    """The towers with those variants of `export.precisions` that pass the gates, and the figures of all of them.

    `folder` holds the towers' graphs; those that are taken are written beside them. Raises QuantiseError.
    """
    precisions: list[Precision] = [precision for precision in recipe.export.precisions if precision != "fp32"]
    if not precisions:
        return dict(towers), {}
    read = {name: read_pairs(recipe, name) for name in recipe.pairs}
    sets = [test_set for splits in read.values() if len((test_set := _test_set(recipe, splits)).media)]
    if not sets:
        raise QuantiseError("export.precisions: the recipe has no test pairs to measure the loss of R@1 on")
    graphs: dict[Modality, dict[Precision, Path]] = {}
    for modality, tower in towers.items():
        graphs[modality] = {tower.precision: folder / tower.file}
        if tower.precision != "fp32":
            continue  # trained on a quantised encoder: there is nothing smaller to make of it
        for precision in precisions:
            target = folder / f"{modality}.{precision}.onnx"
            _write(recipe, encoders[modality], read, precision, folder / tower.file, target)
            graphs[modality][precision] = target
    vectors = {
        modality: _embedded(encoders[modality], paths, _items(sets, modality)) for modality, paths in graphs.items()
    }
    before = {modality: vectors[modality][towers[modality].precision] for modality in towers}
    figures: dict[str, Any] = {}
    taken: dict[Modality, Tower] = {}
    print(f"{'variant':14}{'cosine':>10}{'lowest':>10}{'R@1 loss':>10}{'top-10':>10}{'MB':>8}", file=sys.stderr)
    for modality, tower in towers.items():
        variants: dict[Precision, Variant] = {}
        for precision, path in graphs[modality].items():
            if precision == tower.precision:
                continue
            measured = _measure(sets, before, modality, vectors[modality][precision])
            _judge(precision, modality, measured, measured.passes, path, variants, figures)
        taken[modality] = tower.model_copy(update={"variants": variants})
    for device, smaller in _DEVICES.items():
        together = {m: vectors[m][smaller] if smaller in t.variants else before[m] for m, t in taken.items()}
        if all(together[m] is before[m] for m in together):
            continue
        loss = _loss(sets, before, together)
        figures[f"{smaller}.r1_loss"] = round(loss, 5)
        stays = "" if loss <= R1_LOSS else ": not the default"
        print(f"{smaller}: all towers together lose {loss:.2f} points of R@1{stays}", file=sys.stderr)
        if loss <= R1_LOSS:
            for modality, tower in taken.items():
                if smaller in tower.variants:
                    taken[modality] = tower.model_copy(update={"defaults": {**tower.defaults, device: smaller}})
    return taken, figures


def calibrating_and_judging(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """A third of the texts, 256 at most, taken at random, and all others."""
    order = np.random.default_rng(0).permutation(len(texts))
    cut = min(len(texts) // 3, _CALIBRATION)
    return [texts[place] for place in order[:cut]], [texts[place] for place in order[cut:]]


def measured_by_neighbours(before: Floats, variant: Floats) -> Measured:
    """Vectors (N, d) of texts by a tower and by its variant, without pairs.

    R@1 is how often the nearest of the tower's vectors is of the same text, which is easy; the overlap is of the ten
    other texts that are nearest.
    """
    similarity = variant @ before.T
    same = np.where(np.eye(len(before), dtype=bool), np.inf, 0)
    tops = [
        np.argsort(same - table, axis=1)[:, : min(10, len(before) - 1)] for table in (before @ before.T, similarity)
    ]
    return Measured(
        cosine=float(similarity.diagonal().mean()),
        cosine_lowest=float(similarity.diagonal().min()),
        r1_loss=float(100 * (similarity.argmax(1) != np.arange(len(before))).mean()),
        top10_overlap=float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(*tops, strict=True)])),
    )


def text_variants(
    encoder: FrozenEncoder, tower: Tower, folder: Path, texts: Sequence[str], precisions: Sequence[Precision]
) -> tuple[Tower, dict[str, Any]]:
    """Make variants as `make_variants` does, of a text tower alone, which has no pairs.

    Some of the texts calibrate int8, and the others judge it.
    """
    calibrating, texts = calibrating_and_judging(texts)
    prepare = preparer(encoder)
    graphs: dict[Precision, Path] = {tower.precision: folder / tower.file}
    for precision in precisions:
        graphs[precision] = folder / f"text.{precision}.onnx"
        if precision == "fp16":
            half(folder / tower.file, graphs[precision])
        else:
            sample = [prepare(text) for text in calibrating]
            calibration = batches(folder / tower.file, encoder.preprocessing, sample)
            static(folder / tower.file, graphs[precision], calibration)
    vectors = {p: np.stack([rows[text] for text in texts]) for p, rows in _embedded(encoder, graphs, texts).items()}
    before = vectors[tower.precision]
    variants: dict[Precision, Variant] = {}
    figures: dict[str, Any] = {}
    for precision in precisions:
        measured = measured_by_neighbours(before, vectors[precision])
        passes = measured.passes and measured.top10_overlap >= OVERLAP
        _judge(precision, "text", measured, passes, graphs[precision], variants, figures)
    defaults = {device: smaller for device, smaller in _DEVICES.items() if smaller in variants}
    return tower.model_copy(update={"variants": variants, "defaults": defaults}), figures


def _write(
    recipe: Recipe,
    encoder: FrozenEncoder,
    read: Mapping[str, Mapping[Split, Pairs]],
    precision: Precision,
    source: Path,
    target: Path,
) -> None:
    if precision == "fp16":
        half(source, target)
    else:
        items = calibration_items(read, encoder.modality, recipe.export.calibration)
        prepare = preparer(encoder)
        static(source, target, batches(source, encoder.preprocessing, [prepare(item) for item in items]))


def calibration_items(read: Mapping[str, Mapping[Split, Pairs]], modality: Modality, count: int) -> list[Item]:
    """Items of a modality from the train splits, evenly from each source and over its length."""
    sources: list[Sequence[Item]] = []
    for splits in read.values():
        if len(items := _of(splits["train"], modality)):
            sources.append(items)
    if not sources:  # nothing of this modality is trained on: its test media are all there is
        return [item for splits in read.values() for item in _of(splits["test"], modality)][:count]
    quota = -(-count // len(sources))
    return [
        items[index] for items in sources for index in np.linspace(0, len(items) - 1, min(quota, len(items)), dtype=int)
    ]


def _of(part: Pairs, modality: Modality) -> Sequence[Item]:
    return part.texts if modality == "text" else part.media if part.modality == modality else []


def _test_set(recipe: Recipe, splits: Mapping[Split, Pairs]) -> _Set:
    pairs = splits["test"] if len(splits["test"].media) else splits["validation"]
    media = pairs.media[:_MEDIA]
    if pairs.labels is not None:
        return _Set(pairs, media, label_prompts(recipe, pairs))
    texts = max((text for medium, text in pairs.links if medium < len(media)), default=-1) + 1
    return _Set(pairs, media, pairs.texts[:texts])


def _items(sets: Sequence[_Set], modality: Modality) -> list[Item]:
    if modality == "text":
        return list(dict.fromkeys(text for test_set in sets for text in test_set.prompts))
    return list(
        dict.fromkeys(path for test_set in sets if test_set.pairs.modality == modality for path in test_set.media)
    )


def _embedded(
    encoder: FrozenEncoder, graphs: Mapping[Precision, Path], items: Sequence[Item]
) -> dict[Precision, dict[Item, Floats]]:
    """Unit vectors of the items by each graph, prepared once for all of them."""
    if not items:
        return {precision: {} for precision in graphs}
    sessions = {precision: session(path) for precision, path in graphs.items()}
    prepare = preparer(encoder)
    parts: dict[Precision, list[Floats]] = {precision: [] for precision in graphs}
    for start in tqdm(range(0, len(items), _CHUNK), desc=f"gates {encoder.modality}", disable=None):
        prepared = [prepare(item) for item in items[start : start + _CHUNK]]
        inputs = feeds(encoder.preprocessing, prepared)
        for precision, graph in sessions.items():
            parts[precision].append(np.asarray(graph.run([OUTPUT], inputs)[0], np.float32))
    return {p: dict(zip(items, l2_normalise(np.concatenate(rows)), strict=True)) for p, rows in parts.items()}


def _measure(
    sets: Sequence[_Set],
    before: Mapping[Modality, Mapping[Item, Floats]],
    modality: Modality,
    variant: Mapping[Item, Floats],
) -> Measured:
    cosines = [float(before[modality][item] @ vector) for item, vector in variant.items()]
    sides = {**before, modality: variant}
    touched = [test_set for test_set in sets if modality in ("text", test_set.pairs.modality)]
    overlaps = [_overlap(test_set, before, sides) for test_set in touched]
    return Measured(
        cosine=float(np.mean(cosines)) if cosines else float("nan"),
        cosine_lowest=min(cosines, default=float("nan")),
        r1_loss=_loss(touched, before, sides),
        top10_overlap=float(np.mean(overlaps)) if overlaps else float("nan"),
    )


def _loss(
    sets: Sequence[_Set],
    before: Mapping[Modality, Mapping[Item, Floats]],
    other: Mapping[Modality, Mapping[Item, Floats]],
) -> float:
    losses = [_score(test_set, before) - _score(test_set, other) for test_set in sets]
    return float(np.mean(losses)) if losses else float("nan")


def _score(test_set: _Set, vectors: Mapping[Modality, Mapping[Item, Floats]]) -> float:
    """Mean R@1 of the two directions for captions, top-1 for labels; in percent."""
    media, texts = _sides(test_set, vectors)
    if test_set.pairs.labels is not None:
        return top1(media, texts, test_set.pairs.labels[: len(media)])[0]
    return mean_recall(media, texts, test_set.pairs.links[test_set.pairs.links[:, 0] < len(media)])


def _overlap(
    test_set: _Set,
    before: Mapping[Modality, Mapping[Item, Floats]],
    other: Mapping[Modality, Mapping[Item, Floats]],
) -> float:
    """Return how much of the ten media that each text finds is the same."""
    tops = []
    for vectors in (before, other):
        media, texts = _sides(test_set, vectors)
        count = min(10, len(media))
        tops.append(np.argpartition(-(texts @ media.T), count - 1, axis=1)[:, :count])
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(*tops, strict=True)]))


def _sides(test_set: _Set, vectors: Mapping[Modality, Mapping[Item, Floats]]) -> tuple[Floats, Floats]:
    """Media, and captions or classes."""
    media = np.stack([vectors[test_set.pairs.modality][path] for path in test_set.media])
    texts = np.stack([vectors["text"][text] for text in test_set.prompts])
    if test_set.pairs.labels is None:
        return media, texts
    return media, class_vectors(texts, len(test_set.prompts) // len(test_set.pairs.classes))


def _judge(
    precision: Precision,
    modality: Modality,
    measured: Measured,
    passes: bool,
    path: Path,
    variants: dict[Precision, Variant],
    figures: dict[str, Any],
) -> None:
    """Print a variant's line, note its figures, and take it where it passes."""
    numbers = f"{measured.cosine:>10.4f}{measured.cosine_lowest:>10.4f}{measured.r1_loss:>10.2f}"
    size = path.stat().st_size / 1e6
    verdict = "" if passes else "  refused"
    print(
        f"{f'{precision} {modality}':14}{numbers}{measured.top10_overlap:>10.3f}{size:>8.1f}{verdict}", file=sys.stderr
    )
    figures |= {f"{precision}.{modality}.{key}": value for key, value in measured.figures().items()}
    figures[f"{precision}.{modality}.refused"] = not passes
    if passes:
        variants[precision] = Variant(file=path.name, sha256=sha256_file(path), gates=measured.figures())
