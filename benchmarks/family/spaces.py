"""Rows of the trainer: what heads, objectives, encoders and joined spaces are worth on real pairs.

Unless a row says otherwise its figure is R@1 of Flickr8k's test split, the mean of both directions for each photograph,
over three seeds; what is chosen is chosen on the validation split.
"""

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr
from torch import nn

from benchmarks.family.lab import (
    SEEDS,
    Floats,
    Lab,
    Splits,
    both_ways,
    files_of,
    paired_texts,
    picture,
    pytest_passes,
    recall,
    shuffled,
    some,
    subset,
    tested,
)
from benchmarks.family.rows import Outcome, gain, holds, row, shown, tried
from service.contract.audio import decode_audio
from service.contract.vectors import l2_normalise
from training.bundle.bind.maps import Map, procrustes
from training.encoders import load_encoder, weights_sha256
from training.features import Features, cached_features, preparer, runner
from training.heads.trained import Trained
from training.measure.emergent import average_precision, chance_precision
from training.measure.intervals import interval
from training.measure.prepared import Prepared
from training.measure.ranks import label_ranks
from training.measure.select.sides import Side
from training.measure.select.sides import each as each_row
from training.measure.select.streaming import Sizes, compare
from training.measure.validation import project
from training.pairs import Split, readable
from training.recipe import load_recipe


def _compared(
    lab: Lab, better: Sequence[Trained], base: Sequence[Trained], parts: tuple[Splits, Splits]
) -> tuple[float, list[float], float]:
    """Paired gain of one set of runs over another on the test split, with its interval."""
    hits = [both_ways(tested(runs, part["test"])) for runs, part in zip((better, base), parts, strict=True)]
    return (*gain(hits[0].right, hits[1].right), round(float(hits[1].right.mean()), 2))


@cache
def _plain(lab: Lab) -> list[Trained]:
    """The recipe's linear heads on Flickr8k, one per seed: what most rows compare with."""
    return lab.runs(lab.captions)


@cache
def _control(lab: Lab) -> tuple[float, list[float]]:
    """The positive control: a third of the photographs against all of them, a loss that every test must see."""
    few = lab.runs(some(lab.captions, 2000))
    return _compared(lab, _plain(lab), few, (lab.captions, lab.captions))[:2]


@row(12, "Muffin", "five captions of a photograph against one")
def several_captions(lab: Lab) -> Outcome:
    train = lab.captions["train"]
    links = train.pairs.links[np.unique(train.pairs.links[:, 0], return_index=True)[1]]
    one = {**lab.captions, "train": subset(train, links)}
    value, bounds, before = _compared(lab, _plain(lab), lab.runs(one), (lab.captions, lab.captions))
    return Outcome(f"{shown('five', value, bounds)} on {before}", bounds, holds(bounds[0] > 0))


@row(26, "Escaping Plato's Cave", "CCA's subspace against ridge's affine map, 500 pairs")
def subspace(lab: Lab) -> Outcome:
    differences = []
    for first in (0, 500, 1000):
        few = some(lab.captions, 500, first)
        runs = [[lab.fit({"flickr8k": few}, projector={"kind": kind})] for kind in ("cca", "ridge")]
        differences.append([both_ways(tested(run, lab.captions["test"])).right for run in runs])
    cca, ridge = np.mean(differences, axis=0)
    value, bounds = gain(cca, ridge)
    return Outcome(f"{shown('CCA', value, bounds)} on {ridge.mean():.2f}, three draws", bounds, holds(bounds[0] > 0))


@row(27, "LiMBeR", "a head that is not linear ships only where it beats the linear one")
def ladder(lab: Lab) -> Outcome:
    trained = lab.fit({"flickr8k": lab.captions}, projector={"kind": "mlp", "hidden": 512}, train={"baseline": True})
    score = {kind: trained.ladder[f"head.{kind}"] for kind in ("ridge", "cca", "linear", "mlp")}
    best = max(score, key=lambda kind: score[kind])
    bounds = both_ways(tested([trained], lab.captions["test"])).right
    told = f"validation {json.dumps(score)}; ships {trained.ladder['head.won']}; test R@1 {bounds.mean():.2f}"
    return Outcome(told, interval(bounds), holds(trained.ladder["head.won"] == best))


@row(77, "NMTune", "the noise-robust term against the plain head with 0, 10 and 30 % of the captions shuffled")
def noise_robust(lab: Lab) -> Outcome:
    told, gained = [], []
    for share in (0.0, 0.1, 0.3):
        noisy = shuffled(lab.captions, share)
        grid = [{"train": {"regularise": {"noise_robust": weight}}} for weight in (3.0, 10.0)]
        _, runs = lab.best(noisy, grid)
        hits = [both_ways(tested(several, lab.captions["test"])).right for several in (runs, lab.runs(noisy))]
        gained.append(hits)
        told.append(shown(f"{share:.0%}", *gain(hits[0], hits[1])))
    better, base = np.mean(gained, axis=0)
    value, bounds = gain(better, base)
    return Outcome(f"{'; '.join(told)}; {shown('mean', value, bounds)}", bounds, tried(bounds, _control(lab)[1]))


@row(50, "Mono-InternVL", "noisy pairs first and clean ones last against both throughout, equal steps")
def curriculum(lab: Lab) -> Outcome:
    media = len(lab.captions["train"].media)
    clean = some(lab.captions, media // 3, first=2 * media // 3)
    rest = shuffled(some(lab.captions, 2 * media // 3), 0.6)["train"]
    empty: Splits = {split: some({"train": part}, 0)["train"] for split, part in clean.items()}
    noisy = {**empty, "train": replace(rest, pairs=replace(rest.pairs, name="noisy"))}
    data = {"flickr8k": clean, "noisy": noisy}
    runs = {
        end: [lab.fit(data, seed, train={"until": {"noisy": end}} if end < 1 else {}) for seed in SEEDS]
        for end in (0.5, 0.75, 1.0)
    }
    scores = {end: lab.validated(run, clean) for end, run in runs.items() if end < 1}
    top = max(scores, key=lambda end: scores[end])
    value, bounds, before = _compared(lab, runs[top], runs[1.0], (clean, clean))
    return Outcome(f"{shown(f'clean from {top}', value, bounds)} on {before}", bounds, tried(bounds, _control(lab)[1]))


@row(61, "Uni-Perceiver v2", "one pair type per step against mixed batches, on captions and labels")
@row(65, "IMP", "alternating over pair types: no source is starved")
def unmixed(lab: Lab) -> Outcome:
    data: dict[str, Any] = {
        "flickr8k": lab.captions,
        "esc50": lab.splits("esc50"),
        "caltech101": lab.splits("caltech101"),
    }
    hits: list[Any] = []
    for mixed in (False, True):
        runs = [lab.fit(data, seed, train={"objective": {"mixed": mixed}}) for seed in SEEDS]
        hits.append(both_ways(tested(runs, lab.captions["test"])).right)
        labels = [lab.score(run, {name: data[name] for name in ("esc50", "caltech101")}) for run in runs]
        hits.append(float(np.mean(labels)))
    value, bounds = gain(hits[0], hits[2])
    chance = 100 / 50
    told = f"{shown('alternating', value, bounds)} on {hits[2].mean():.2f}; labels {hits[1]:.1f} against {hits[3]:.1f}"
    return Outcome(told, bounds, holds(bounds[1] > -1 and hits[1] > 10 * chance))


@row(63, "It's Not a Modality Gap", "alignment and uniformity terms: R@1 must not fall")
def uniform(lab: Lab) -> Outcome:
    grid = [{"train": {"regularise": {"uniformity": u, "alignment": a}}} for u in (0.02, 0.1) for a in (0.0, 0.1)]
    change, runs = lab.best(lab.captions, grid)
    value, bounds, before = _compared(lab, runs, _plain(lab), (lab.captions, lab.captions))
    gaps = []
    for several in (_plain(lab), runs):
        test = lab.captions["test"]
        sides = project(several[0].heads["image"], test.media), project(several[0].heads["text"], test.texts)
        gaps.append(float(np.linalg.norm(sides[0].mean(0) - sides[1].mean(0))))
    told = f"{shown('terms', value, bounds)} on {before}; gap {gaps[0]:.3f} → {gaps[1]:.3f}; {json.dumps(change)}"
    return Outcome(told, bounds, holds(bounds[1] >= 0 and bounds[0] > -1))


def _layered(lab: Lab) -> dict[Any, Floats]:
    """Features of all layers side by side, (N, Σ d): a split each."""
    other = lab.other("encoders.image.layers=[1,2,3,4,5,6,7]")
    return {
        split: np.asarray(other.encoded("image", part.media, f"layers {split}").pooled)
        for split, part in lab.pairs["flickr8k"].items()
    }


def _with_media(splits: Splits, media: Mapping[Any, Floats]) -> Splits:
    return {split: replace(part, media=Features(media[split])) for split, part in splits.items()}


@row(73, "BridgeTower", "several layers of the image encoder against the last one")
@row(38, "Arcana (QLadder)", "frozen layers mixed against the last layer")
def layers(lab: Lab) -> Outcome:
    deep = _with_media(lab.captions, _layered(lab))
    value, bounds, before = _compared(lab, lab.runs(deep), _plain(lab), (deep, lab.captions))
    return Outcome(f"{shown('layers 1 to 7 too', value, bounds)} on {before}", bounds, holds(bounds[0] > 0))


def _sides(lab: Lab, split: str) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Frozen views of the photographs and of one caption each: layers, the last one, and two controls."""
    part, deep = lab.captions[split], _layered(lab)[split][:2000]  # type: ignore[index]
    width = part.media.pooled.shape[1]
    rng = np.random.default_rng(0)
    cut = deep.shape[1] - width
    media = {
        "last layer": np.asarray(part.media.pooled)[:2000],
        "all layers": deep,
        "lower layers": deep[:, :cut],
        "lowest layers": deep[:, : cut // 4],
        "control: random map of 8 numbers": deep[:, : cut // 4] @ rng.standard_normal((cut // 4, 8)).astype(np.float32),
    }
    chosen = paired_texts(part.pairs)[:2000]
    sentences = np.asarray(part.texts.pooled)[chosen]
    texts = {"MiniLM": sentences, "GloVe": _words(lab, [part.pairs.texts[place] for place in chosen])}
    texts["control: lengths"] = np.stack(
        [[len(part.pairs.texts[place]), len(part.pairs.texts[place].split())] for place in chosen]
    ).astype(np.float32)
    return media, texts


def _words(lab: Lab, texts: Sequence[str]) -> Floats:
    """Mean GloVe vectors (N, 50)."""
    folder = lab.data / "encoders" / "glove_50d"
    known = {word: place for place, word in enumerate((folder / "words_60k.txt").read_text().split())}
    vectors = np.load(folder / "vectors_60k_f16.npy", allow_pickle=False).astype(np.float32)
    rows = [[known[word] for word in text.lower().replace(".", " ").split() if word in known] for text in texts]
    return np.stack([vectors[places].mean(0) if places else vectors.mean(0) for places in rows])


@row(1, "From Unimodal to Multimodal", "likeness of frozen encoders (debiased CKA) and the R@1 that heads reach")
@row(75, "CroCo", "controls of low CKA rank last, and train worst")
def likeness(lab: Lab) -> Outcome:
    media, texts = _sides(lab, "train")
    sides = _sides(lab, "test")
    alignments = compare(
        [Side(name, (array,), each_row(len(array))) for name, array in media.items()],
        [Side(name, (array,), each_row(len(array))) for name, array in texts.items()],
        Sizes(queries=1000),
    )
    cka, reached, names = [], [], []
    for alignment in alignments:
        through = _ridge(media[alignment.media], texts[alignment.text])
        similar = (
            l2_normalise(through(sides[0][alignment.media]))
            @ l2_normalise(_standard(sides[1][alignment.text], texts[alignment.text])).T
        )
        rank = (similar >= similar.diagonal()[:, None]).sum(1)
        cka.append(alignment.cka)
        reached.append(float((rank <= 10).mean() * 100))
        names.append((alignment.media, alignment.text))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        rows = rng.integers(0, len(cka), len(cka))
        if len(set(rows.tolist())) > 3:
            drawn.append(spearmanr(np.array(cka)[rows], np.array(reached)[rows]).statistic)
    bounds = [round(float(value), 3) for value in np.nanpercentile(drawn, [2.5, 97.5])]
    controls = np.array(["control" in first or "control" in second for first, second in names])
    worst = max(np.array(cka)[controls]) < max(np.array(cka)[~controls]) and max(np.array(reached)[controls]) < max(
        np.array(reached)[~controls]
    )
    rho = float(spearmanr(cka, reached).statistic)
    best = int(np.argmax(cka))
    told = (
        f"Spearman(CKA, R@10 by ridge) {rho:.3f} over {len(cka)} pairs; first by CKA: {' × '.join(names[best])}, R@10 "
    )
    told += (
        f"{reached[best]:.1f} of at best {max(reached):.1f}; best control R@10 {max(np.array(reached)[controls]):.1f}"
    )
    return Outcome(told, bounds, holds(bounds[0] > 0 and bool(worst)))


def _standard(array: Floats, like: Floats) -> Floats:
    return np.asarray((array - like.mean(0)) / np.maximum(like.std(0), 1e-3), np.float32)


def _ridge(x: Floats, y: Floats, penalty: float = 0.1) -> Any:
    """Ridge from standardised x to standardised y."""
    a, b = _standard(x, x).astype(np.float64), _standard(y, y).astype(np.float64)
    square = a.T @ a
    square[np.diag_indices_from(square)] += penalty * square.trace() / len(square)
    weight = np.linalg.solve(square, a.T @ b).astype(np.float32)
    return lambda new: _standard(new, x) @ weight


def _sound_to_image(lab: Lab, sounds: Floats, images: Floats) -> tuple[NDArray[np.floating], float]:
    """Average precision, in percent, of each test sound that searches Caltech101's test pictures, and chance's mean."""
    heard, seen = lab.pairs["esc50"]["test"], lab.pairs["caltech101"]["test"]
    shows = json.loads((lab.data / "data" / "esc50_to_image_classes.json").read_text())
    names = lab.recipe.pairs["caltech101"].names
    right = {
        sound.lower(): {names.get(label, readable(label)) for label in words["caltech"]}
        for sound, words in shows.items()
        if "caltech" in words
    }
    assert heard.labels is not None and seen.labels is not None
    rows = [place for place, label in enumerate(heard.labels) if heard.classes[label].lower() in right]
    relevant = np.stack(
        [
            np.isin(
                seen.labels, [seen.classes.index(name) for name in right[heard.classes[heard.labels[place]].lower()]]
            )
            for place in rows
        ]
    )
    precision = average_precision(sounds[rows] @ images.T, relevant) * 100
    return precision, float(chance_precision(relevant.sum(1), len(images)).mean() * 100)


def _two_spaces(lab: Lab) -> tuple[Trained, Trained]:
    """Pictures with captions and labels, and sounds with labels: two spaces with text heads of their own."""
    pictures = lab.fit({"flickr8k": lab.captions, "caltech101": lab.splits("caltech101")})
    return pictures, lab.fit({"esc50": lab.splits("esc50")}, seed=1)


def _anchor_texts(lab: Lab) -> Features:
    """Texts that join spaces: captions of the train split, and the names of both sets."""
    names = [*lab.pairs["esc50"]["train"].texts, *lab.pairs["caltech101"]["train"].texts]
    return lab.encoded("text", [*lab.pairs["flickr8k"]["train"].texts[:2000], *names], "anchors")


def _projected(lab: Lab, trained: Trained, source: str, split: Any = "test") -> Floats:
    part = lab.pairs[source][split]
    return project(trained.heads[part.modality], lab.encoded(part.modality, part.media, tokens=source == "flickr8k"))


@row(
    11,
    "OneEncoder",
    "a modality is added later: vectors of the others stay the same bits; sound finds image without pairs",
)
def progressive(lab: Lab) -> Outcome:
    pictures, _ = _two_spaces(lab)
    before = _projected(lab, pictures, "caltech101")
    sounds = lab.fit({"esc50": lab.splits("esc50")}, frozen={"text": pictures.heads["text"]})
    same = np.array_equal(before, _projected(lab, pictures, "caltech101"))
    precision, chance = _sound_to_image(lab, _projected(lab, sounds, "esc50"), before)
    bounds = interval(precision)
    told = f"sound → image mAP {precision.mean():.2f}, chance {chance:.2f}; older vectors the same bits: {same}"
    return Outcome(told, bounds, holds(same and bounds[0] > chance))


@row(40, "OmniBind", "two spaces bound through texts alone: sound → image above chance")
def bound(lab: Lab) -> Outcome:
    pictures, sounds = _two_spaces(lab)
    anchors = _anchor_texts(lab)
    moved = procrustes(project(sounds.heads["text"], anchors), project(pictures.heads["text"], anchors))
    images = _projected(lab, pictures, "caltech101")
    precision, chance = _sound_to_image(lab, moved(_projected(lab, sounds, "esc50")), images)
    bounds = interval(precision)
    return Outcome(f"mAP {precision.mean():.2f}, chance {chance:.2f}", bounds, holds(bounds[0] > chance))


@row(30, "MM-Lego", "three spaces joined without training, in six orders; any two of them work")
def three_spaces(lab: Lab) -> Outcome:
    pictures = lab.fit({"caltech101": lab.splits("caltech101")})
    spaces = {"caltech101": pictures, "esc50": _two_spaces(lab)[1], "flickr8k": _plain(lab)[0]}
    anchors = _anchor_texts(lab)
    texts = {name: project(space.heads["text"], anchors) for name, space in spaces.items()}
    media = {name: _projected(lab, space, name) for name, space in spaces.items()}
    precisions: dict[tuple[str, ...], NDArray[np.floating]] = {}
    equal = True
    for order in permutations(spaces):
        last = order[-1]  # its texts stay as they are, so that what joins it first changes nothing for what joins later
        moved: dict[str, Floats] = {last: media[last]}
        for name in order[:-1]:
            through: Map = procrustes(texts[name], texts[last])
            moved[name] = through(media[name])
        precisions[order], chance = _sound_to_image(lab, moved["esc50"], moved["caltech101"])
        other = precisions.get((order[1], order[0], last))
        equal = equal and (other is None or np.array_equal(other, precisions[order]))
    means = {" + ".join(order): float(precision.mean()) for order, precision in precisions.items()}
    bounds = interval(min(precisions.values(), key=lambda precision: float(precision.mean())))
    pairs = {}
    for first, second in permutations(("esc50", "caltech101"), 2):
        alone = procrustes(texts[first], texts[second])(media[first])
        sides = {first: alone, second: media[second]}
        pairs[f"{first} into {second}"] = float(_sound_to_image(lab, sides["esc50"], sides["caltech101"])[0].mean())
    told = (
        f"mAP {min(means.values()):.2f} to {max(means.values()):.2f} by which space is last, chance {chance:.2f}; the "
    )
    told += f"order before it changes no bit: {equal}; two alone {', '.join(f'{v:.2f}' for v in pairs.values())}"
    return Outcome(told, bounds, holds(equal and bounds[0] > chance and min(pairs.values()) > chance))


@row(34, "4M-21", "vectors translated from one space into another find their captions there")
def translated(lab: Lab) -> Outcome:
    first, second = _plain(lab)[:2]
    anchors = _anchor_texts(lab)
    through = procrustes(project(first.heads["text"], anchors), project(second.heads["text"], anchors))
    test = lab.captions["test"]
    texts = project(second.heads["text"], test.texts)
    moved, home = (
        both_ways(recall(vectors, texts, test.pairs.links)).right
        for vectors in (through(project(first.heads["image"], test.media)), project(second.heads["image"], test.media))
    )
    bounds = interval(moved)
    return Outcome(
        f"R@1 {moved.mean():.2f} translated, {home.mean():.2f} at home", bounds, holds(bounds[0] > home.mean() / 2)
    )


def _labels_right(lab: Lab, trained: Trained, name: str) -> NDArray[np.floating]:
    """Top-1, 0 or 100 for each test medium, over all classes."""
    return _told_apart(lab, trained, lab.splits(name)["test"])


def _kept(splits: Splits, keep: NDArray[np.bool_]) -> Splits:
    """The training media that are kept, by the links alone."""
    train = splits["train"]
    return {**splits, "train": subset(train, train.pairs.links[keep[train.pairs.links[:, 0]]])}


@row(66, "UniMed-CLIP", "labels as captions, equal ones no negatives: classes that were withheld are told apart")
def withheld(lab: Lab) -> Outcome:
    """Ten classes at a time are withheld and told apart among themselves, as a set of new classes is (zero-shot
    learning without a bias to what was learned, arXiv 1605.04253); beside the same with the labels of others.
    """
    splits = lab.splits("esc50")
    right: list[NDArray[np.floating]] = []
    wrong: list[NDArray[np.floating]] = []
    among_all: list[NDArray[np.floating]] = []
    train, test = splits["train"].pairs, splits["test"].pairs
    labels = train.labels
    assert labels is not None and test.labels is not None
    parts = np.array_split(np.random.default_rng(0).permutation(len(train.classes)), 5)
    for seed, classes in enumerate(parts):
        kept = _kept(splits, ~np.isin(labels, classes))
        links = kept["train"].pairs.links.copy()
        texts = np.unique(links[:, 1])
        links[:, 1] = texts[np.random.default_rng(seed).permutation(len(texts))][np.searchsorted(texts, links[:, 1])]
        shuffled = {**kept, "train": replace(kept["train"], pairs=replace(kept["train"].pairs, links=links))}
        of_these = np.isin(test.labels, classes)
        for data, hits in ((kept, right), (shuffled, wrong)):
            trained = lab.fit({"esc50": data}, seed)
            hits.append(_told_apart(lab, trained, splits["test"], classes)[of_these])
            if data is kept:
                among_all.append(_told_apart(lab, trained, splits["test"])[of_these])
    told_right, control = np.concatenate(right), np.concatenate(wrong)
    bounds = interval(told_right)
    told = f"top-1 of ten withheld classes: {told_right.mean():.2f}, chance 10; shuffled labels {control.mean():.2f}; "
    told += f"among all fifty, of which forty were learned: {np.concatenate(among_all).mean():.2f}"
    return Outcome(told, bounds, holds(bounds[0] > max(10.0, interval(control)[1])))


@row(16, "MultiMAE", "what a frozen classifier names sounds, as pairs, against few real pairs and shuffled names")
def pseudo_labels(lab: Lab) -> Outcome:
    named = lab.other("encoders.audio.concepts=true", "encoders.audio.labels=AudioSet")
    splits = lab.splits("esc50")
    part = splits["train"]
    scores = np.asarray(named.encoded("audio", part.pairs.media).pooled)[:, lab.encoders["audio"].width :]
    best, texts = scores.argmax(1), [f"the sound of {name}." for name in named.encoders["audio"].concepts]
    encoded = Features(np.asarray(lab.encoded("text", texts, "names").pooled))
    assert part.pairs.labels is not None
    first = np.unique(part.pairs.labels, return_index=True)[1]  # one real clip of each class
    few = _kept(splits, np.isin(np.arange(len(part.media)), first))

    def made(names: NDArray[np.int64]) -> dict[Split, Prepared]:
        links = np.stack([np.arange(len(names)), names], 1)
        pairs = replace(part.pairs, name="named", texts=texts, links=links, labels=None, classes=[])
        validation, test = (some({"train": lab.captions[split]}, 0)["train"] for split in ("validation", "test"))
        return {"train": replace(part, pairs=pairs, texts=encoded), "validation": validation, "test": test}

    wrong = np.random.default_rng(0).permutation(best)
    right = {
        name: np.mean([_labels_right(lab, lab.fit(data, seed), "esc50") for seed in SEEDS], axis=0)
        for name, data in {
            "real": {"esc50": few},
            "both": {"esc50": few, "named": made(best)},
            "shuffled": {"esc50": few, "named": made(wrong)},
        }.items()
    }
    value, bounds = gain(right["both"], right["real"])
    told = f"{shown('named pairs', value, bounds)} on {right['real'].mean():.2f} with 50 real pairs; "
    told += shown("shuffled names", *gain(right["shuffled"], right["real"]))
    control = gain(right["both"], right["shuffled"])[1]
    return Outcome(told, bounds, tried(bounds, control))


def _random_like(lab: Lab) -> Lab:
    """Returns the same recipe with an image encoder of random weights."""
    other = lab.other()
    encoder = other.encoders["image"]
    module = copy.deepcopy(encoder.module)
    assert module is not None
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight)
    other.encoders = {**other.encoders, "image": replace(encoder, module=module, weights_sha256=weights_sha256(module))}
    return other


@row(
    7,
    "Vision-language integration in the brain",
    "ridge probes of word vectors, with random-weight and one-sense controls",
)
@row(
    72,
    "Visio-linguistic brain encoding",
    "features that learned with texts tell more of them than those of pictures alone",
)
def probes(lab: Lab) -> Outcome:
    """GloVe vectors of captions, which nothing was trained on, are told from pictures; the share of other photographs
    whose vector is farther than a photograph's own is its score (50 by chance)."""
    some_media, scores = 1500, {}
    parts = {split: lab.captions[split] for split in ("train", "test")}
    targets = {
        split: _words(lab, [part.pairs.texts[place] for place in paired_texts(part.pairs)])
        for split, part in parts.items()
    }
    random = _random_like(lab)
    views = {
        "joined with texts": {s: project(_plain(lab)[0].heads["image"], part.media) for s, part in parts.items()},
        "pictures alone": {s: np.asarray(part.media.pooled) for s, part in parts.items()},
        "random weights": {
            s: np.asarray(random.encoded("image", part.pairs.media[:some_media], "random weights").pooled)
            for s, part in parts.items()
        },
    }
    for name, view in views.items():
        guess = _ridge(view["train"][:some_media], targets["train"][:some_media], 1.0)(view["test"])
        similar = l2_normalise(guess) @ l2_normalise(_standard(targets["test"], targets["train"][:some_media])).T
        scores[name] = (similar < similar.diagonal()[:, None]).mean(1) * 100
    joined, alone, control = scores.values()
    value, bounds = gain(joined, alone)
    known = gain(alone, control)
    told = f"{', '.join(f'{name} {score.mean():.1f}' for name, score in scores.items())}, chance 50; "
    told += f"{shown('joined over alone', value, bounds)}; {shown('alone over random', *known)}"
    return Outcome(told, known[1], holds(known[1][0] > 0 and interval(joined)[0] > 50))


@row(58, "Cambrian-1", "two encoders side by side against the better one; select ranks encoders; caps per source")
def side_by_side(lab: Lab) -> Outcome:
    other = lab.other("encoders.image={folder: encoders/mobilenet_v2}")
    second = {
        split: np.asarray(other.encoded("image", part.media, f"second encoder {split}").pooled)
        for split, part in lab.pairs["flickr8k"].items()
    }
    first = {split: np.asarray(part.media.pooled) for split, part in lab.captions.items()}
    both = {split: np.concatenate([first[split], second[split]], 1) for split in first}
    data = {name: _with_media(lab.captions, media) for name, media in {"second": second, "both": both}.items()}
    runs = {"first": _plain(lab), **{name: lab.runs(sources) for name, sources in data.items()}}
    better = max(("first", "second"), key=lambda name: lab.validated(runs[name], data.get(name, lab.captions)))
    value, bounds, before = _compared(lab, runs["both"], runs[better], (data["both"], data.get(better, lab.captions)))
    names = ("test_captions_are_ranked_written_and_drawn", "test_the_rarest_concept_chooses_first_and_a_cap_holds")
    passed, total = pytest_passes("tests/training/select", "tests/training/curate", "-k", " or ".join(names))
    told = f"{shown('both', value, bounds)} on {before} of the {better}; {passed} of {total} tests pass"
    return Outcome(told, bounds, holds(bounds[0] > 0 and passed == total))


@row(43, "Meta-Transformer", "spectrograms as pictures through the image encoder, against the audio encoder")
def spectrograms(lab: Lab) -> Outcome:
    folder, data = lab.made("spectrograms"), {}
    for name in ("sounds", "pictures"):
        splits: dict[Split, Prepared] = lab.splits("esc50")
        if name == "pictures":
            for split, part in splits.items():
                paths = [
                    picture(folder / f"{file.stem}.png", partial(_spectrogram, file)) for file in files_of(part.pairs)
                ]
                seen = Features(np.asarray(lab.encoded("image", paths, "spectrograms").pooled))
                splits[split] = replace(part, media=seen)
        data[name] = splits
    right = {}
    for name, sources in data.items():
        runs = [lab.fit({"esc50": sources}, seed) for seed in SEEDS]
        right[name] = np.mean([_told_apart(lab, trained, sources["test"]) for trained in runs], axis=0)
    value, bounds = gain(right["sounds"], right["pictures"])
    told = (
        f"top-1 by spectrograms {right['pictures'].mean():.1f}, chance 2; {shown('the audio encoder', value, bounds)}"
    )
    return Outcome(told, bounds, holds(bounds[0] > 0))


def _spectrogram(path: Path) -> Image.Image:
    """Log-mel power of a sound, 224 × 224, low pitches below."""
    spec = 128, 1024, 16_000
    samples = decode_audio(path.read_bytes(), spec[2])
    size = len(samples) // 224
    frames = np.stack(
        [samples[at * size : at * size + spec[1]] for at in range(224) if at * size + spec[1] <= len(samples)]
    )
    power = np.abs(np.fft.rfft(frames * np.hanning(spec[1]), axis=1)) ** 2
    edges = (700 * (10 ** (np.linspace(0, 2840, spec[0] + 2) / 2595) - 1) / (spec[2] / 2) * (spec[1] // 2)).astype(int)
    mel = np.stack([power[:, a : max(c, a + 1)].mean(1) for a, c in zip(edges[:-2], edges[2:], strict=True)])
    decibels = np.clip(10 * np.log10(mel + 1e-8), -60, 20)
    values = ((decibels + 60) / 80 * 255).astype(np.uint8)[::-1]
    return Image.fromarray(values).resize((224, 224)).convert("RGB")


def _told_apart(
    lab: Lab, trained: Trained, part: Prepared, among: NDArray[np.int64] | None = None
) -> NDArray[np.floating]:
    """Top-1 of test sounds, 0 or 100 for each: of all classes, or of those `among` (others are then wrong)."""
    template = lab.recipe.templates["audio"][0]
    texts = project(
        trained.heads["text"], lab.encoded("text", [template.format(label) for label in part.pairs.classes])
    )
    assert part.pairs.labels is not None
    scores = project(trained.heads["audio"], part.media) @ texts.T
    if among is not None:
        scores[:, ~np.isin(np.arange(len(texts)), among)] = -np.inf
    return (label_ranks(scores, part.pairs.labels) < 1) * 100.0


@row(48, "SparseFormers", "a student's features are near its teacher's, in less time")
def student(lab: Lab) -> Outcome:
    """The starter's student of sounds, on ESC-50's test fold, which it never heard."""
    data = f"data.root={lab.data.resolve()}"
    student_encoder = load_encoder(load_recipe(Path("training/recipes/starter.yaml"), [data]), "audio")
    teacher = load_encoder(load_recipe(Path("training/recipes/best.yaml"), [data]), "audio")
    part = {split: lab.pairs["esc50"][split] for split in ("train", "test")}
    features = {
        name: {
            split: np.asarray(cached_features(graph, one.media, lab.cache, what=name).pooled)
            for split, one in part.items()
        }
        for name, graph in (("student", student_encoder), ("teacher", teacher))
    }
    width = student_encoder.width - len(student_encoder.concepts)
    centre = features["teacher"]["train"][:, :width].mean(0)
    near = (
        l2_normalise(features["student"]["test"][:, :width] - centre)
        * l2_normalise(features["teacher"]["test"][:, :width] - centre)
    ).sum(1)
    bounds, times = interval(near), {}
    for name, graph in (("student", student_encoder), ("teacher", teacher)):
        prepare, run = preparer(graph), runner(graph, tokens=False)
        ready = [prepare(path) for path in part["test"].media[:20]]
        run(ready[:1])
        started = time.process_time()
        for one in ready:
            run([one])
        times[name] = (time.process_time() - started) / len(ready) * 1000
    told = f"mean-centred cosine {near.mean():.3f}; processor time a sound {times['student']:.1f} ms against "
    return Outcome(
        f"{told}{times['teacher']:.1f}", bounds, holds(bounds[0] > 0.5 and times["student"] < times["teacher"])
    )
