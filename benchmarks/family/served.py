"""Rows of what is served: the starter's own vectors, and the service's own functions on them."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.family.lab import (
    SEEDS,
    Floats,
    Lab,
    both_ways,
    drawn,
    files_of,
    paired_texts,
    picture,
    pytest_passes,
    recall,
)
from benchmarks.family.rows import Outcome, gain, holds, row, shown, tried
from service.contract.abstention import auroc, scores
from service.contract.vectors import l2_normalise
from service.retrieval.adapters import shifted, shifts
from service.store.kinds import IndexSpec, build
from training.fit.abstention import halves
from training.measure.gap import Paired, gap
from training.measure.intervals import interval
from training.measure.ranks import label_ranks

Rows = NDArray[np.int64]


def captioned(lab: Lab, split: Any = "test") -> tuple[Floats, Floats, Rows]:
    """The starter's vectors of Flickr8k's photographs and captions, and their links."""
    part = lab.pairs["flickr8k"][split]
    return lab.vectors("image", part.media), lab.vectors("text", part.texts), part.links


def labelled(lab: Lab, name: str, split: Any = "test") -> tuple[Floats, Rows, Floats]:
    """The starter's vectors of media, their labels, and the vectors of the classes' names."""
    part = lab.pairs[name][split]
    assert part.labels is not None
    return lab.vectors(part.modality, part.media), part.labels, lab.labels(part.modality, part.classes)


@row(9, "Uni-MoE", "a report of how each modality is favoured in mixed galleries")
def bias(lab: Lab) -> Outcome:
    images, texts, links = captioned(lab)
    sounds, labels, names = labelled(lab, "esc50")
    heard = np.stack([np.arange(len(sounds)), labels], 1)
    report = gap([Paired("flickr8k", "image", images, texts, links), Paired("esc50", "audio", sounds, names, heard)])
    shares = ", ".join(f"{key} {value:.1f} %" for key, value in report.items() if key.startswith("top10."))
    favoured = l2_normalise(sounds + texts.mean(0) / np.linalg.norm(texts.mean(0)))
    planted = gap(
        [Paired("flickr8k", "image", images, texts, links), Paired("esc50", "audio", favoured, names, heard)]
    )["top10.text.audio"]
    chosen = texts[paired_texts(lab.pairs["flickr8k"]["test"])][:300]
    gallery, kinds = np.concatenate([chosen, images[:300], sounds[:300]]), np.repeat([0, 1, 2], 300)
    similar = chosen @ gallery.T
    np.fill_diagonal(similar, -np.inf)
    same_kind = (kinds[np.argsort(-similar, axis=1)[:, :10]] == 0).mean(1) * 100
    told = f"ten nearest of each kind: {shares}; texts among a text's: {same_kind.mean():.1f} %; "
    told += f"sounds that are moved to the texts' mean are {planted:.1f} % of a text's"
    return Outcome(told, interval(same_kind), holds(planted > report["top10.text.audio"] + 1))


@row(32, "ALPRO", "/classify over a grid of crops: a planted object tops its own cell")
def planted(lab: Lab) -> Outcome:
    part = lab.pairs["caltech101"]["test"]
    assert part.labels is not None
    rng = np.random.default_rng(0)
    folder = lab.made("planted")
    right, paths, chosen = [], [], rng.choice(len(part.media), 100, replace=False)
    for number, place in enumerate(chosen):
        canvas = Image.new("RGB", (448, 448), (128, 128, 128))
        cell = number % 4
        canvas.paste(Image.open(part.media[place]).convert("RGB").resize((224, 224)), (cell % 2 * 224, cell // 2 * 224))
        boxes = [(x, y, x + 224, y + 224) for y in (0, 224) for x in (0, 224)]
        paths += [picture(folder / f"{number}-{at}.png", partial(canvas.crop, box)) for at, box in enumerate(boxes)]
        right.append(cell)
    classes = lab.labels("image", part.classes)[part.labels[chosen]]
    cells = lab.vectors("image", paths).reshape(len(chosen), 4, -1)
    hits = (np.einsum("ncd,nd->nc", cells, classes).argmax(1) == np.array(right)) * 100.0
    bounds = interval(hits)
    passed, total = pytest_passes("tests/service/test_classify_routes.py::test_a_planted_object_tops_its_cell")
    told = f"right cell of four {hits.mean():.1f} %, chance 25; over HTTP {passed} of {total} tests pass"
    return Outcome(told, bounds, holds(bounds[0] > 25 and passed == total))


@row(53, "GILL", "off-topic queries are told from on-topic ones by AUROC")
def abstains(lab: Lab) -> Outcome:
    vectors, labels, classes = labelled(lab, "esc50")
    detector = lab.starter.manifest.abstention.get("audio")
    corrected, plain = [], []
    for half in halves(len(classes)):
        on = np.isin(labels, half)
        scored = scores(vectors @ classes[half].T, lab.starter.manifest.temperature)
        likely = detector.probability(scored) if detector else scored[:, 0]
        corrected.append(auroc(likely[on], likely[~on]) * 100)
        plain.append(auroc(scored[on, 0], scored[~on, 0]) * 100)
    bounds = interval(np.array(corrected))
    return Outcome(
        f"AUROC {np.mean(corrected):.1f} by the starter's detector, {np.mean(plain):.1f} by similarity alone",
        bounds,
        holds(bounds[0] > 50),
    )


@row(54, "ILLUME", "a pair that does not belong together scores lower")
@row(70, "LAION-5B", "curation by similarity drops planted mismatches")
def mismatched(lab: Lab) -> Outcome:
    images, texts, links = captioned(lab)
    paired = (images[links[:, 0]] * texts[links[:, 1]]).sum(1)
    other = (np.roll(images, 1, 0)[links[:, 0]] * texts[links[:, 1]]).sum(1)
    limit = np.quantile(np.concatenate([paired, other]), 0.5)
    kept = (paired > limit).mean() * 100
    bounds = interval((paired > other) * 100.0, links[:, 0])
    passed, total = pytest_passes("tests/training/curate/test_rows.py::test_conditions_on_metadata")
    told = f"the true pair scores higher {((paired > other) * 100).mean():.1f} %; of the better half {kept:.1f} % "
    told += f"are true pairs; filters of metadata: {passed} of {total} tests pass"
    return Outcome(told, bounds, holds(bounds[0] > 90 and kept > 90 and passed == total))


@row(56, "PRE", "examples of some labels: harmonic mean of taught and untaught labels")
def taught(lab: Lab) -> Outcome:
    train, owners, classes = labelled(lab, "caltech101", "train")
    vectors, labels, _ = labelled(lab, "caltech101")
    rng, gains, plain = np.random.default_rng(0), [], []
    for base in halves(len(classes)):
        new = np.setdiff1d(np.arange(len(classes)), base)
        shots, whose = drawn(rng, train, owners, base, 4)
        moved = shifted(classes, shifts(shots, whose, len(classes)))
        both = []
        for choice in (classes, moved):
            tops = [
                (
                    label_ranks(
                        vectors[np.isin(labels, part)] @ choice[part].T,
                        np.searchsorted(part, labels[np.isin(labels, part)]),
                    )
                    < 1
                ).mean()
                for part in (base, new)
            ]
            both.append(200 * tops[0] * tops[1] / (tops[0] + tops[1]))
        gains.append(both[1])
        plain.append(both[0])
    value, bounds = gain(np.array(gains), np.array(plain))
    return Outcome(f"{shown('four examples', value, bounds)} on H {np.mean(plain):.1f}", bounds, holds(bounds[0] > 0))


def _found(spec: IndexSpec, gallery: Floats, queries: Floats, rescore: int = 1) -> Rows:
    """The ten nearest rows of an index of the store's making; with `rescore` of so many times ten by exact scores."""
    built = build(spec, gallery.shape[1], len(gallery), lambda n: gallery[:n], iter([gallery]), lambda: False)
    assert built is not None
    inner = getattr(built.index, "index", None)
    if inner is not None:
        import faiss

        faiss.extract_index_ivf(built.index).nprobe = 16
    near = built.index.search(queries, 10 * rescore)[1]
    exact = np.einsum("qd,qkd->qk", queries, gallery[near])
    return np.asarray(np.take_along_axis(near, np.argsort(-exact, axis=1)[:, :10], axis=1))


@row(60, "SEED", "product codes: recall@10 against a flat search")
@row(21, "MIO", "product codes of the starter's vectors find what exact ones find")
def codes(lab: Lab) -> Outcome:
    gallery = np.concatenate([captioned(lab, split)[1] for split in ("validation", "test")])
    queries = captioned(lab)[0][:500]
    exact = np.argsort(-(queries @ gallery.T), axis=1)[:, :10]
    right = {}
    for rescore in (1, 10):
        near = _found(IndexSpec("ivf_pq", None), gallery, queries, rescore)
        right[rescore] = np.array(
            [len(set(a) & set(b)) * 10.0 for a, b in zip(near.tolist(), exact.tolist(), strict=True)]
        )
    bounds = interval(right[10])
    told = f"recall@10 {right[10].mean():.1f} % among {len(gallery):,}, scored again as served; "
    told += f"codes alone {right[1].mean():.1f} %"
    return Outcome(told, bounds, holds(bounds[0] > 90))


@row(36, "DPTR", "a classifier learned from perturbed label texts alone against zero-shot labels")
def from_texts(lab: Lab) -> Outcome:
    """A softmax classifier of prompts with Gaussian noise; noise and penalty are chosen on other sets' media."""
    templates = lab.starter.manifest.templates
    prompts = {}
    for name in ("caltech101", "esc50"):
        part = lab.pairs[name]["test"]
        several = [template.format(label) for label in part.classes for template in templates[part.modality]]
        prompts[name] = lab.vectors("text", several, "prompts").reshape(
            len(part.classes), -1, lab.starter.manifest.dimensions
        )
    tops: dict[tuple[float, float, str], NDArray[np.floating]] = {}
    for name, texts in prompts.items():
        for split in ("validation", "test"):
            vectors, labels, classes = labelled(lab, name, split)
            tops[-1.0, 0.0, f"{name}.{split}"] = (label_ranks(vectors @ classes.T, labels) < 1) * 100.0
            for noise in (0.02, 0.05):
                for penalty in (1e-4, 1e-3):
                    hits = [
                        (label_ranks(_logits(texts, noise, penalty, seed, vectors), labels) < 1) * 100.0
                        for seed in SEEDS
                    ]
                    tops[noise, penalty, f"{name}.{split}"] = np.mean(hits, axis=0)
    told, all_bounds, controls = [], [], []
    for name in prompts:
        grid = [(noise, penalty) for noise in (0.02, 0.05) for penalty in (1e-4, 1e-3)]
        noise, penalty = max(grid, key=lambda g: tops[*g, f"{name}.validation"].mean())
        value, bounds = gain(tops[noise, penalty, f"{name}.test"], tops[-1.0, 0.0, f"{name}.test"])
        told.append(f"{shown(name, value, bounds)} on {tops[-1.0, 0.0, f'{name}.test'].mean():.1f}")
        all_bounds.append(bounds)
        vectors, labels, classes = labelled(lab, name)
        shots, whose = drawn(np.random.default_rng(0), *labelled(lab, name, "train")[:2], np.arange(len(classes)), 4)
        taught = shifted(classes, shifts(shots, whose, len(classes)))
        known = (label_ranks(vectors @ taught.T, labels) < 1) * 100.0  # four real examples of each class: a known gain
        controls.append(gain(known, tops[-1.0, 0.0, f"{name}.test"])[1])
    return Outcome("; ".join(told), min(all_bounds), tried(min(all_bounds), max(controls)))


def _logits(prompts: Floats, noise: float, penalty: float, seed: int, vectors: Floats) -> Floats:
    """Class logits of vectors by a linear softmax learned from prompts (C, T, D) with noise added."""
    import torch

    torch.manual_seed(seed)
    classes, count, width = prompts.shape
    x = torch.from_numpy(prompts.reshape(-1, width))
    y = torch.arange(classes).repeat_interleave(count)
    linear = torch.nn.Linear(width, classes)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(l2_normalise(prompts.mean(1))) * 20)
        linear.bias.zero_()
    optimiser = torch.optim.AdamW(linear.parameters(), 3e-3, weight_decay=penalty)
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(linear(x + noise * torch.randn_like(x)), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.inference_mode():
        return np.asarray(linear(torch.from_numpy(vectors)).numpy())


def _corner(path: Path, box: tuple[int, int, int, int]) -> Image.Image:
    return Image.open(path).convert("RGB").crop(box)


def cropped(lab: Lab, split: Any, count: int = 500) -> Floats:
    """Vectors (N, 4, D) of the four overlapping corners of the first photographs of Flickr8k."""
    folder, paths = lab.made(f"crops-{split}"), []
    for number, path in enumerate(files_of(lab.pairs["flickr8k"][split])[:count]):
        for place, (x, y) in enumerate(((0, 0), (64, 0), (0, 64), (64, 64))):
            box = (x, y, x + 160, y + 160)
            paths.append(
                picture(
                    folder / f"{number}-{place}.png",
                    partial(_corner, path, box),
                )
            )
    return lab.vectors("image", paths, f"crops {split}").reshape(-1, 4, lab.starter.manifest.dimensions)


@row(55, "NVLM", "vectors of a picture and its crops against the picture alone; texts stay as they are")
def crops(lab: Lab) -> Outcome:
    measured = {}
    for split in ("validation", "test"):
        images, texts, links = captioned(lab, split)
        links = links[links[:, 0] < 500]
        parts = cropped(lab, split)
        for share in (0.0, 0.25, 0.5):
            mixed = l2_normalise((1 - share) * images[:500] + share * parts.mean(1))
            measured[split, share] = both_ways(recall(mixed, texts, links)).right
    best = max((0.25, 0.5), key=lambda share: measured["validation", share].mean())
    value, bounds = gain(measured["test", best], measured["test", 0.0])
    control = gain(measured["test", 0.0], both_ways(recall(l2_normalise(parts[:, 0]), texts, links)).right)[1]
    told = f"{shown(f'crops at {best}', value, bounds)} on {measured['test', 0.0].mean():.2f}, 500 photographs"
    return Outcome(told, bounds, tried(bounds, control))


@row(71, "IMAGINATOR", "arithmetic: a product in one colour less that colour plus another finds the other product")
def analogies(lab: Lab) -> Outcome:
    folder = lab.data / "data" / "ikea"
    with (folder / "index.csv").open() as file:
        table = list(csv.DictReader(file))
    images = lab.vectors("image", [folder / photograph["file"] for photograph in table])
    colours = ("white", "black", "blue", "red", "green", "yellow", "grey", "brown", "pink", "beige")
    owns = []
    for photograph in table:
        colours_of = [colour for colour in colours if f" {colour}" in f" {photograph['caption'].lower()}"]
        owns.append((photograph["label"], colours_of[0]) if len(colours_of) == 1 else None)
    words = dict(zip(colours, lab.vectors("text", list(colours), "colours"), strict=True))
    places = {key: [p for p, owner in enumerate(owns) if owner == key] for key in set(owns) if key is not None}
    hits: dict[float, list[float]] = {0.0: [], 0.5: [], 1.0: []}
    split: list[int] = []
    for (kind, colour), at in sorted(places.items()):
        for other in colours:
            right = places.get((kind, other), [])
            if other == colour or not right:
                continue
            for place in at[:3]:
                split.append(_sum_of_bytes(kind) % 2)
                for share in hits:
                    query = images[place] + share * (words[other] - words[colour])
                    similar = images @ query
                    similar[[p for p, k in enumerate(owns) if k == (kind, colour)]] = -np.inf
                    hits[share].append(100.0 * bool(set(np.argsort(-similar)[:5].tolist()) & set(right)))
    rows = np.array(split)
    shares = {share: np.array(values) for share, values in hits.items()}
    best = max((0.5, 1.0), key=lambda share: shares[share][rows == 0].mean())
    value, bounds = gain(shares[best][rows == 1], shares[0.0][rows == 1])
    told = f"{shown(f'found in five, share {best}', value, bounds)} on {shares[0.0][rows == 1].mean():.1f} alone, "
    return Outcome(f"{told}{(rows == 1).sum()} analogies", bounds, holds(bounds[0] > 0))


def _sum_of_bytes(text: str) -> int:
    return sum(text.encode())


@row(74, "Video-LLaMA", "a head that learned from pictures labels sounds above chance")
def across(lab: Lab) -> Outcome:
    from sklearn.linear_model import LogisticRegression

    pictures, labels, _ = labelled(lab, "caltech101", "train")
    seen, heard = lab.pairs["caltech101"]["train"], lab.pairs["esc50"]["test"]
    shows = {"dog": "dalmatian", "cat": "wild cat", "chirping birds": "pigeon", "clock tick": "watch"}
    shows |= {"helicopter": "helicopter", "car horn": "car seen from the side", "airplane": "airplane"}
    names = [seen.classes.index(name) for name in shows.values()]
    keep = np.isin(labels, names)
    sounds, sound_labels, _ = labelled(lab, "esc50")
    assert heard.labels is not None
    among = [heard.classes.index(name) for name in shows]
    rows = np.isin(sound_labels, among)
    means = lab.starter.manifest.means
    between = np.array(means["image"]) - np.array(means["audio"])
    model = LogisticRegression(max_iter=2000, C=10).fit(pictures[keep], labels[keep])
    told = model.predict(sounds[rows] + between)
    right = (told == np.array(names)[[among.index(label) for label in sound_labels[rows]]]) * 100.0
    bounds = interval(right)
    return Outcome(
        f"{right.mean():.1f} % of {rows.sum()} sounds, chance {100 / len(names):.1f}",
        bounds,
        holds(bounds[0] > 100 / len(names)),
    )
