"""What the students' features are worth beside their teachers': `python -m starter.probes --data ../shared`.

Each readout is a ridge regression in closed form on standardised features; its strength is chosen on every tenth row
of what it is fitted on. Nothing here touches the test sets (Flickr8k test, Caltech101 test, ESC-50 fold 5). The
features are cached under --cache. Prints one JSON object.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.contract.vectors import l2_normalise
from training.distill.views import listed_files
from training.encoders import load_encoder
from training.features import cached_features
from training.recipe import Recipe, load_recipe

Floats = NDArray[np.float32]
STRENGTHS = (30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0)
CALTECH = {"files": "data/caltech101/index.csv", "folder": "data/caltech101/images", "where": {"split": ["train"]}}
ESC50 = {  # as in training/recipes/distill-audio.yaml
    "files": "data/esc50/index.csv",
    "folder": "data/esc50/audio",
    "where": {"fold": [1, 2, 3, 4]},
    "group": r"-(\d+)-",
    "hold_out": 0.1,
}


def ridge(features: Floats, targets: Floats, held: Floats) -> Floats:
    """Fit (n, d) → (n, t) and predict for `held` (m, d): (m, t)."""
    mean, deviation, offset = features.mean(0), features.std(0) + 1e-3, targets.mean(0)
    features, held, targets = (features - mean) / deviation, (held - mean) / deviation, targets - offset
    tenth = np.arange(len(features)) % 10 == 9
    identity = np.eye(features.shape[1], dtype=np.float32)

    def weights(rows: NDArray[np.bool_], strength: float) -> Floats:
        x, y = features[rows], targets[rows]
        return np.asarray(np.linalg.solve(x.T @ x + np.float32(strength) * identity, x.T @ y))

    errors = [float(np.square(features[tenth] @ weights(~tenth, s) - targets[tenth]).mean()) for s in STRENGTHS]
    return held @ weights(np.ones_like(tenth), STRENGTHS[int(np.argmin(errors))]) + offset


def accuracy(features: Floats, names: list[str], held: NDArray[np.bool_]) -> float:
    classes = sorted(set(names))
    labels = np.array([classes.index(name) for name in names])
    one_hot = np.eye(len(classes), dtype=np.float32)[labels[~held]]
    return round(float((ridge(features[~held], one_hot, features[held]).argmax(1) == labels[held]).mean()), 4)


def caltech101(recipe: Recipe, cache: Path) -> float:
    """Accuracy on the tenth of the train split that the student was not trained on; fitted on the rest."""
    root, source = recipe.data.root, CALTECH | {"hold_out": 0.1}
    kept, held = (listed_files(root, [source], held_out=value) for value in (False, True))
    files = [*kept, *held]
    features = cached_features(load_encoder(recipe, "image"), files, cache).pooled
    return accuracy(features, [path.parent.name for path in files], np.arange(len(files)) >= len(kept))


def esc50(recipe: Recipe, cache: Path) -> dict[str, float]:
    """Accuracy on recordings that the student never heard (a tenth of folds 1 to 4), fitted on the others; and on
    fold 4, fitted on folds 1 to 3, where the student did hear nine tenths of fold 4, without labels."""
    root = recipe.data.root
    with (root / "data/esc50/index.csv").open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["fold"] in "1234"]
    files = [root / "data/esc50/audio" / row["file"] for row in rows]
    features = cached_features(load_encoder(recipe, "audio"), files, cache).pooled
    names = [row["class"] for row in rows]
    unheard = set(listed_files(root, [ESC50], held_out=True))
    return {
        "unheard_recordings": accuracy(features, names, np.array([file in unheard for file in files])),
        "fold4": accuracy(features, names, np.array([row["fold"] == "4" for row in rows])),
    }


def flickr8k(recipe: Recipe, cache: Path) -> dict[str, float]:
    """Recall among the 1,000 dev photographs and their 5,000 captions; fitted on the train split's first captions."""
    folder = recipe.data.root / "data/flickr8k"
    captions: dict[str, list[str]] = {}
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            captions.setdefault(row["image"], []).append(row["caption"])
    train, dev = ((folder / f"split_{name}.txt").read_text().split() for name in ("train", "dev"))
    images, texts = load_encoder(recipe, "image"), load_encoder(recipe, "text")
    vectors = [
        cached_features(images, [folder / "images" / name for name in names], cache).pooled for names in (train, dev)
    ]
    first = l2_normalise(cached_features(texts, [captions[name][0] for name in train], cache).pooled)
    sentences = l2_normalise(cached_features(texts, [text for name in dev for text in captions[name]], cache).pooled)
    owner = np.repeat(np.arange(len(dev)), 5)
    # Without the mean caption, which every prediction shares, cosines compare what is particular.
    similarity = (
        l2_normalise(ridge(vectors[0], first - first.mean(0), vectors[1])) @ l2_normalise(sentences - first.mean(0)).T
    )
    rank = (similarity > similarity[owner, np.arange(len(owner))]).sum(axis=0)  # of each caption's own photograph
    return {
        "text_to_image_r1": round(float((rank < 1).mean()), 4),
        "text_to_image_r10": round(float((rank < 10).mean()), 4),
        "image_to_text_r1": round(float((owner[similarity.argmax(axis=1)] == np.arange(len(dev))).mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/features"))
    args = parser.parse_args()
    here = Path(__file__).resolve().parent
    base = here.parent / "training/recipes/flickr8k-mobilenet-yamnet.yaml"
    root = f"data.root={args.data}"
    students = [f"encoders.{modality}={json.dumps({'onnx': str(here / modality)})}" for modality in ("image", "audio")]
    report = {}
    for name, overrides in (("student", [root, *students]), ("teacher", [root])):
        recipe = load_recipe(base, overrides)
        report[name] = {
            "esc50_accuracy": esc50(recipe, args.cache),
            "caltech101_held_out_accuracy": caltech101(recipe, args.cache),
            "flickr8k_dev": flickr8k(recipe, args.cache),
        }
        print(name, json.dumps(report[name]), file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
