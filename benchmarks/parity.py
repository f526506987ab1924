"""Are the vectors that are served those that training made? Real inputs, over HTTP, against training's own code.

python -m benchmarks.parity --url http://127.0.0.1:8000 --recipe training/recipes/flickr8k-mobilenet-yamnet.yaml \\
    --bundle DIR [--count 100] [--set data.root=FOLDER]

Prints a table and, as its last line, one JSON object. Ends with 1 where any cosine is below 0.9999.
"""

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from numpy.typing import NDArray

from benchmarks.commands import finish, parser_of
from service.contract.bundle import BundleError, Modality, read_bundle
from training import pipeline
from training.bundle.export import PARITY
from training.encoders import load_encoder
from training.features import FeatureError, Item, cached_features
from training.heads.trained import load_projectors
from training.measure.validation import project
from training.pairs import PairError
from training.preprocessors import EncoderError
from training.recipe import Recipe, RecipeError, load_recipe

_CONCURRENCY = 8  # so that the service batches, and a fault of batching shows


class ParityError(Exception):
    """Training and the service cannot be compared: the message says why."""


@dataclass(frozen=True)
class Agreement:
    """Cosines between the two vectors of each input of one modality."""

    n: int
    lowest: float
    median: float


def compare(client: httpx2.Client, recipe: Recipe, bundle: Path, count: int) -> dict[Modality, Agreement]:
    """Agreement per modality on up to `count` of the recipe's test inputs. Raises ParityError.

    `bundle` is the one that the service behind `client` serves; its projectors.safetensors is all that is read of it
    for training's side, where the frozen encoders run in their own library.
    """
    manifest = read_bundle(bundle).manifest
    trained = load_projectors(bundle / "projectors.safetensors", recipe)
    result: dict[Modality, Agreement] = {}
    for modality, items in real_items(recipe, count).items():
        if modality not in trained.heads:
            continue
        head, encoder = trained.heads[modality], load_encoder(recipe, modality)
        with tempfile.TemporaryDirectory() as cache:
            features = cached_features(encoder, items, Path(cache), tokens=head.needs_tokens)
            made = project(head, features)
        served = embed(client, items, manifest.space)
        if made.shape != served.shape:
            raise ParityError(f"{modality}: training makes {made.shape}, and the service {served.shape}")
        # Of unit vectors; in float64, so that a rounding of the sum is not taken for a difference.
        cosines = (made.astype(np.float64) * served).sum(axis=1)
        result[modality] = Agreement(len(items), float(cosines.min()), float(np.median(cosines)))
    if not result:
        raise ParityError("the recipe has no test inputs of the bundle's modalities")
    return result


def real_items(recipe: Recipe, count: int) -> dict[Modality, list[Item]]:
    """Returns up to `count` distinct inputs per modality, evenly out of every source's test split."""
    pools: dict[Modality, list[Sequence[Item]]] = {}
    for splits in pipeline.pairs(recipe).values():
        pools.setdefault(splits["test"].modality, []).append(splits["test"].media)
        pools.setdefault("text", []).append(splits["test"].texts)
    result: dict[Modality, list[Item]] = {}
    for modality, lists in pools.items():
        every = list(dict.fromkeys(item for pool in lists for item in pool))
        chosen = np.unique(np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int))
        if len(chosen):
            result[modality] = [every[index] for index in chosen]
    return result


def embed(client: httpx2.Client, items: Sequence[Item], space: str) -> NDArray[np.float64]:
    """The service's vectors (N, D): media as files of a form, texts as JSON. Raises ParityError."""

    def one(item: Item) -> list[float]:
        if isinstance(item, Path):
            response = client.post("/embed", files=[("file", (item.name, item.read_bytes()))])
        else:
            response = client.post("/embed", json={"inputs": [item]})
        if response.is_error:
            raise ParityError(f"the service refuses {item}: {response.status_code} {response.text}")
        answer = response.json()
        if answer["space"] != space:
            raise ParityError(f"the service serves the space {answer['space']}, and the bundle is {space}")
        vector: list[float] = answer["embeddings"][0]["embedding"]
        return vector

    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        return np.asarray(list(pool.map(one, items)), np.float64)


def table(result: Mapping[Modality, Agreement]) -> str:
    lines = [f"{'modality':10}{'n':>6}{'lowest':>12}{'median':>12}"]
    lines += [f"{name:10}{row.n:>6}{row.lowest:>12.7f}{row.median:>12.7f}" for name, row in result.items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("parity", __doc__, bundle=False)
    parser.add_argument("--url", required=True, help="of the service")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True, help="the bundle that the service serves")
    parser.add_argument("--count", type=int, default=100, help="inputs per modality (default: 100)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        with httpx2.Client(base_url=options.url, timeout=120.0, trust_env=False) as client:
            result = compare(client, recipe, options.bundle, options.count)
    except (ParityError, RecipeError, PairError, EncoderError, FeatureError, BundleError, httpx2.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    passed = all(row.lowest >= PARITY for row in result.values())
    print(table(result))
    figures: dict[str, Any] = {name: asdict(row) for name, row in result.items()}
    print(json.dumps({**figures, "least": PARITY, "passed": passed}))
    return 0 if passed else 1


if __name__ == "__main__":
    finish(main)
