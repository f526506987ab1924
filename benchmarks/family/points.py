"""Rows of a modality that is none of the three: point clouds, added to the starter by a recipe alone.

The clouds are made here (examples.shapes): 21 things, plain, flat and tall, turned about the vertical axis, of any size
and place, with noise. One proportion of each thing is in no training pair. The encoder is fixed: histograms. The
head is a ridge regression, whose λ is chosen on validation, as is, on the first draw, the power of the features. Heads
of three draws of clouds are tested once, beside controls that learned from the same clouds with captions shuffled.
"""

import base64
import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

from benchmarks.family.lab import SEEDS, Floats, Lab
from benchmarks.family.rows import Outcome, gain, holds, row, shown
from benchmarks.servers import isthmus
from examples import shapes
from service.contract.bundle import Bundle, Modality, read_bundle
from training.__main__ import main as trainer
from training.features import Item, preparer, runner
from training.heads.bundled import as_encoder
from training.measure.emergent import average_precision, chance_precision
from training.measure.intervals import interval
from training.measure.ranks import class_vectors

Row = dict[str, str]
_COUNTS = {"train": 15, "validation": 4, "test": 8}
_POWERS = (1.0, 0.5, 0.25)
_CAPTIONS = [shapes.caption(thing, proportion) for thing in shapes.THINGS for proportion in shapes.PROPORTIONS]


def _drawn(lab: Lab, seed: int) -> tuple[Path, dict[str, list[Row]]]:
    """The folder of a draw, and its clouds by split."""
    folder = lab.made(f"points-{seed}")
    if not (folder / "recipe.yaml").is_file():
        shapes.write_all(folder, _COUNTS, withheld=True, seed=seed)
    with (folder / "clouds.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    return folder, {split: [row for row in rows if row["split"] == split] for split in _COUNTS}


def _extended(lab: Lab, seed: int, power: float, text: str = "caption") -> Bundle:
    """The starter with a tower for clouds that learned from the captions of one column."""
    folder, _ = _drawn(lab, seed)
    out = folder / f"{lab.starter.manifest.space}-{power}-{text}"  # another starter: another tower
    if not (out / "manifest.json").is_file():
        changes = [f"data.root={folder}", f"projector.power={power}", f"pairs.clouds.text={text}"]
        sets = [part for change in changes for part in ("--set", change)]
        arguments = [str(lab.bundle), str(folder / "recipe.yaml"), "--out", str(out), "--cache", str(lab.cache), *sets]
        with TemporaryDirectory() as work:
            if trainer(["add-modality", *arguments, "--work", work]):
                raise RuntimeError(f"add-modality failed: {' '.join(arguments)}")
    return read_bundle(out)


def _clouds(lab: Lab, seed: int, bundle: Bundle, rows: Sequence[Row]) -> Floats:
    folder, _ = _drawn(lab, seed)
    return lab.vectors("points", [folder / row["file"] for row in rows], "clouds", bundle)


def _found(lab: Lab, seed: int, bundle: Bundle, rows: Sequence[Row]) -> NDArray[np.float64]:
    """100 for each cloud that finds its own caption first among all 63, else 0."""
    nearest = (_clouds(lab, seed, bundle, rows) @ lab.vectors("text", _CAPTIONS, "captions").T).argmax(1)
    return np.array([100.0 * (_CAPTIONS[place] == row["caption"]) for place, row in zip(nearest, rows, strict=True)])


@cache
def _power(lab: Lab) -> float:
    rows = _drawn(lab, 0)[1]["validation"]
    return max(_POWERS, key=lambda power: _found(lab, 0, _extended(lab, 0, power), rows).mean())


def _both(lab: Lab, seed: int) -> tuple[Bundle, Bundle, list[Row]]:
    """The extended bundle of a draw, its control, and the test clouds."""
    bundles = [_extended(lab, seed, _power(lab), text) for text in ("caption", "shuffled")]
    return bundles[0], bundles[1], _drawn(lab, seed)[1]["test"]


def _unchanged(lab: Lab, bundle: Bundle) -> bool:
    """Return whether the starter's towers are the same files, and give the same bits."""
    old = lab.starter
    photographs = lab.pairs["caltech101"]["test"].media[:8]
    items: dict[Modality, Sequence[Item]] = {"image": photographs, "text": _CAPTIONS[:32]}
    same = [
        bundle.manifest.towers[name] == tower
        and bundle.tower_path(name).read_bytes() == old.tower_path(name).read_bytes()
        for name, tower in old.manifest.towers.items()
    ]
    for name, given in items.items():
        first, second = (_computed(each, name, given) for each in (old, bundle))
        same.append(np.array_equal(first, second))
    return all(same) and bundle.manifest.accepts(old.manifest.space)


def _computed(bundle: Bundle, modality: Modality, items: Sequence[Item]) -> Floats:
    encoder = as_encoder(bundle, modality)
    return runner(encoder, tokens=False)([preparer(encoder)(item) for item in items])["pooled"]


def _groups(rows: Sequence[Row], key: str) -> NDArray[np.int64]:
    return np.unique([row[key] for row in rows], return_inverse=True)[1]


@row(39, "ULIP-2", "point clouds into a frozen space by captions, zero-shot names, old vectors unchanged")
def clouds(lab: Lab) -> Outcome:
    right, shuffled, named, same = [], [], [], []
    for seed in SEEDS:
        bundle, control, rows = _both(lab, seed)
        right.append(_found(lab, seed, bundle, rows))
        shuffled.append(_found(lab, seed, control, rows))
        templates = bundle.manifest.templates["points"]
        prompts = [template.format(thing) for thing in shapes.THINGS for template in templates]
        names = class_vectors(lab.vectors("text", prompts, "names"), len(templates))
        called = np.array(list(shapes.THINGS))[(_clouds(lab, seed, bundle, rows) @ names.T).argmax(1)]
        named.append(100.0 * (called == np.array([row["thing"] for row in rows])))
        same.append(_unchanged(lab, bundle))
    groups, unseen = _groups(rows, "caption"), np.array([row["unseen"] == "1" for row in rows])
    hits, control_hits, names_right = (np.mean(values, axis=0) for values in (right, shuffled, named))
    value, bounds = gain(hits, control_hits, groups)
    of_names, of_unseen = interval(names_right, _groups(rows, "thing")), interval(hits[unseen], groups[unseen])
    told = f"{shown('R@1 of 63 captions over shuffled ones', value, bounds)}, of {hits.mean():.1f}; "
    told += f"of captions that no pair had {hits[unseen].mean():.1f} {of_unseen}, chance {100 / 63:.1f}; "
    told += f"one of 21 names, zero-shot prompts {names_right.mean():.1f} {of_names}, chance {100 / 21:.1f}; "
    told += f"power {_power(lab)} chosen; old towers and vectors the same bits in {sum(same)} of {len(same)}"
    return Outcome(told, bounds, holds(bounds[0] > 0 and of_names[0] > 100 / 21 and all(same)))


@row(
    68, "ONE-PEACE", "a modality registered by configuration alone answers; clouds find photographs without such pairs"
)
def registered(lab: Lab) -> Outcome:
    photographs = lab.pairs["caltech101"]["test"]
    assert photographs.labels is not None
    classes = np.array(photographs.classes)[photographs.labels]
    kept = np.flatnonzero(np.isin(classes, list(shapes.THINGS)))
    gallery, classes = lab.vectors("image", [photographs.media[place] for place in kept.tolist()]), classes[kept]
    precision: list[NDArray[np.float64]] = []
    shuffled: list[NDArray[np.float64]] = []
    chance = 0.0
    for seed in SEEDS:
        bundle, control, rows = _both(lab, seed)
        rows = [row for row in rows if row["thing"] in classes]
        relevant = np.array([classes == row["thing"] for row in rows])
        for values, space in ((precision, bundle), (shuffled, control)):
            values.append(100 * average_precision(_clouds(lab, seed, space, rows) @ gallery.T, relevant))
        chance = float(100 * chance_precision(relevant.sum(1), relevant.shape[1]).mean())
    value, bounds = gain(np.mean(precision, axis=0), np.mean(shuffled, axis=0), _groups(rows, "thing"))
    level = interval(np.mean(precision, axis=0), _groups(rows, "thing"))
    answers = _served(lab)
    told = shown("mAP cloud → photograph over shuffled captions", value, bounds)
    told += f", of {np.mean(precision):.1f} {level}, chance {chance:.1f}, "
    told += f"{len(gallery)} photographs of {len(set(classes))} things; served: "
    told += ", ".join(f"{name} {'yes' if yes else 'no'}" for name, yes in answers.items())
    return Outcome(told, bounds, holds(bounds[0] > 0 and level[0] > chance and all(answers.values())))


def _served(lab: Lab) -> dict[str, bool]:
    """Return what a server of the extended bundle answers over HTTP, over a store that the starter filled."""
    bundle, _, rows = _both(lab, 0)
    folder, _ = _drawn(lab, 0)
    photographs = lab.pairs["caltech101"]["test"].media[:5]

    def as_input(row: Row) -> dict[str, Any]:
        return {"modality": "points", "array": base64.b64encode((folder / row["file"]).read_bytes()).decode()}

    def post(path: str, **body: Any) -> Any:
        return http.post(path, json=body).raise_for_status().json()

    with TemporaryDirectory() as name:
        store = Path(name) / "store"
        with isthmus("starter", lab.bundle, store) as server, httpx2.Client(base_url=server.address) as http:
            files = [("file", (f"{place}.jpg", Path(str(file)).read_bytes())) for place, file in enumerate(photographs)]
            http.post("/items", files=files).raise_for_status()
            before = http.get("/items/0.jpg?include=vector").json()
        with isthmus("extended", bundle.path, store) as server, httpx2.Client(base_url=server.address) as http:
            embedded = post("/embed", inputs=[as_input(rows[0])])["embeddings"][0]
            post("/items", items=[{"id": row["file"], **as_input(row)} for row in rows[::8]])
            words = post("/search", query=rows[0]["caption"], modalities=["points"], top_k=3)["results"]
            across = post("/search", query=as_input(rows[0]), modalities=["image"], top_k=5)["results"]
            return {
                "/embed": embedded["modality"] == "points" and len(embedded["embedding"]) == 384,
                "text → cloud": rows[0]["thing"] in {hit["id"].split("/")[1].split("-")[0] for hit in words},
                "cloud → image": [hit["modality"] for hit in across] == ["image"] * 5,
                "old vectors": http.get("/items/0.jpg?include=vector").json() == before,
            }
