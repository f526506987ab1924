"""What reranking by token vectors does to recall at 1, on a recipe's captions, by the towers that a bundle serves.

    python -m benchmarks.rerank BUNDLE RECIPE --pairs flickr8k [--media 1000] [--pool 20] [--set key=value]

The weight of the tokens' score is chosen on the validation split, for each method and direction, 0 included; the test
split is then reranked with it. One caption per medium. The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle, Modality, read_bundle
from service.engine.handling import handling
from service.engine.inputs import Media, Single, Text
from service.engine.towers import Tower
from service.retrieval.late_interaction import maxsim, transport
from service.settings import Settings
from training.pairs import Pairs, read_pairs
from training.recipe import load_recipe

Floats = NDArray[np.float32]
_METHODS: dict[str, Callable[[Floats, Sequence[Floats]], NDArray[np.float64]]] = {
    "maxsim": maxsim,
    "transport": transport,
}
_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--media", type=int, default=1_000)
    parser.add_argument("--pool", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    options = parser.parse_args()
    bundle = read_bundle(options.bundle)
    splits = read_pairs(load_recipe(options.recipe, options.overrides), options.pairs)
    scored = {split: _scored(bundle, splits[split], options.media, options.pool) for split in ("validation", "test")}
    figures: dict[str, Any] = {}
    print(f"{'direction':16}{'method':12}{'weight':>8}{'first stage':>14}{'reranked':>10}{'ms/query':>10}   R@1, test")
    for direction in ("media to text", "text to media"):
        for method in _METHODS:
            similar, tokens, right, milliseconds = scored["validation"][direction, method]
            weight = max(_WEIGHTS, key=lambda each: (_recall(similar, tokens, right, each), -each))
            similar, tokens, right, milliseconds = scored["test"][direction, method]
            before, after = (_recall(similar, tokens, right, each) for each in (0.0, weight))
            print(f"{direction:16}{method:12}{weight:8.1f}{before:14.2f}{after:10.2f}{milliseconds:10.1f}")
            figures[f"{direction}.{method}"] = {
                "weight": weight,
                "first_stage_r1": before,
                "reranked_r1": after,
                "tokens_alone_r1": _recall(similar, tokens, right, 1.0),
                "ms_per_query": milliseconds,
            }
    print(json.dumps({"pool": options.pool, "media": options.media} | figures))


def _recall(
    similar: NDArray[np.float64], tokens: NDArray[np.float64], right: NDArray[np.bool_], weight: float
) -> float:
    """R@1, in percent, of pools (Q, K) whose members are `right` or not, under the weighted mean of both scores."""
    best = ((1 - weight) * similar + weight * tokens).argmax(1)
    return round(100 * float(right[np.arange(len(right)), best].mean()), 2)


def _scored(bundle: Bundle, pairs: Pairs, media: int, pool: int) -> dict[tuple[str, str], tuple[Any, ...]]:
    """By direction and method: similarities and tokens' scores of each query's pool, which are right, ms per query."""
    own, first = np.unique(pairs.links[:, 0], return_index=True)
    own, first = own[:media], first[:media]
    texts = [pairs.texts[pairs.links[place, 1]] for place in first]
    sides = {
        "media": _embedded(
            bundle, pairs.modality, [Media(pairs.modality, Path(pairs.media[place]).read_bytes()) for place in own]
        ),
        "text": _embedded(bundle, "text", [Text(text) for text in texts]),
    }
    found = {}
    for query, gallery in (("media", "text"), ("text", "media")):
        (vectors, tokens), (others, other_tokens) = sides[query], sides[gallery]
        similar = vectors @ others.T
        nearest = np.argsort(-similar, axis=1)[:, :pool]
        for method, compare in _METHODS.items():
            started = time.perf_counter()
            reranked = [compare(tokens[row], [other_tokens[each] for each in near]) for row, near in enumerate(nearest)]
            milliseconds = round(1_000 * (time.perf_counter() - started) / len(nearest), 2)
            right = nearest == np.arange(len(nearest))[:, None]
            first_stage = np.take_along_axis(similar, nearest, axis=1)
            found[f"{query} to {gallery}", method] = (first_stage, np.stack(reranked), right, milliseconds)
    return found


def _embedded(bundle: Bundle, modality: Modality, contents: Sequence[Single]) -> tuple[Floats, list[Floats]]:
    """Vectors (N, D) and token vectors of inputs, as the service prepares them."""
    tower, how = Tower(bundle, modality, "cpu", 0), handling(bundle, modality, Settings())
    vectors, tokens = [], []
    for start in range(0, len(contents), 16):
        arrays = how.collate([how.prepare(each).value for each in contents[start : start + 16]])
        vectors.append(tower.run(arrays))
        tokens += tower.run_tokens(arrays)
    return np.concatenate(vectors), tokens


if __name__ == "__main__":
    main()
