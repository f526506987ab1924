"""Say what a recipe needs and lacks, before it starts: data, encoders, room, packages, and how long it will take.

Every check looks, and none stops the others: what is missing is counted, not met one by one. Encoders are really loaded
and fed a few of the recipe's own items, so that widths and speeds are measured. Ends with 1 where something is lacking.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from service.contract.bundle import Modality
from training.doctor.data import Check, check_source
from training.doctor.machine import (
    check_encoder,
    check_memory,
    check_packages,
    check_room,
    check_training,
    epochs,
    time_class,
    timed,
    training_memory,
    training_seconds,
    weight,
)
from training.encoders import FrozenEncoder
from training.errors import TrainingError
from training.features import Item, stored_as
from training.flags import add_flags
from training.pairs import Pairs, Split
from training.recipe import Recipe, load_recipe

_LIBRARIES = 600_000_000  # bytes that torch, transformers and ONNX Runtime take themselves, roundly
_PAIR = 1_250  # bytes of a pair's names and places (benchmarks.scale); features are mapped from the cache, not held


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "recipe", "--set", "--cache")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Print the table. `ok` is whether nothing is lacking. Raises RecipeError where there is no recipe to look at."""
    recipe = load_recipe(options.recipe, options.overrides)
    lacking, figures = 0, dict[str, Any]()
    for check in examine(recipe, options.cache, figures):
        print(f"{check.state:9}{check.what:24}{check.detail}", file=sys.stderr, flush=True)
        lacking += check.state == "missing"
    return {"ok": not lacking, "lacking": lacking, **figures}


def examine(recipe: Recipe, cache: Path, figures: dict[str, Any]) -> Iterator[Check]:
    """Run every check in turn; what is counted and estimated goes into `figures`."""
    pairs: dict[str, Mapping[Split, Pairs]] = {}
    loaded: dict[Modality, FrozenEncoder] = {}
    root = recipe.data.root
    yield Check("data.root", "ok" if root.is_dir() else "missing", str(root.absolute()))
    for name in recipe.pairs:
        yield from check_source(recipe, name, pairs)
    for modality in recipe.encoders:
        yield from check_encoder(recipe, modality, loaded)
    yield from check_packages(recipe)
    yield from check_training(recipe)
    if len(pairs) == len(recipe.pairs) and len(loaded) == len(recipe.encoders):
        yield from _estimate(recipe, pairs, loaded, cache, figures)


def _estimate(
    recipe: Recipe,
    pairs_of: Mapping[str, Mapping[Split, Pairs]],
    loaded: Mapping[Modality, FrozenEncoder],
    cache: Path,
    figures: dict[str, Any],
) -> Iterator[Check]:
    """Room, memory and time, from the number of items and from what a few of them take."""
    items: dict[Modality, list[Item]] = {modality: [] for modality in loaded}
    learned = dict.fromkeys(loaded, 0)
    for splits in pairs_of.values():
        learned[splits["train"].modality] += len(splits["train"].media)
        for part in splits.values():
            items[part.modality] += part.media
            items["text"] += part.texts
    encoding, online, size, counts = 0.0, 0.0, 0, dict[Modality, int]()
    for modality, several_items in items.items():
        if not several_items:
            continue
        try:
            seconds, item_bytes, counts[modality] = timed(
                loaded[modality], several_items, recipe.projector.needs_tokens
            )
        except TrainingError as error:
            yield Check(f"encoders.{modality}", "missing", str(error))
            return
        views, several = recipe.encoders[modality].views, len(several_items)
        if views == "online":
            online += seconds * learned[modality] * epochs(recipe, learned[modality])
            pooled = loaded[modality].width * np.dtype(stored_as(loaded[modality])).itemsize
            size -= learned[modality] * (item_bytes - pooled)
        else:
            several += learned[modality] * views
        encoding, size = encoding + seconds * several, size + item_bytes * several
        yield Check(
            f"encoding {modality}", "ok", f"{len(several_items):,} items, {1 / seconds:,.0f} per second, measured"
        )
    pairs = sum(len(part.links) for splits in pairs_of.values() for part in splits.values())
    memory = _LIBRARIES + _PAIR * pairs + sum(weight(encoder) for encoder in loaded.values())
    memory += training_memory(recipe, loaded, counts)
    training = training_seconds(recipe, loaded) + online
    yield check_room(cache, size)
    yield check_memory(memory)
    whole = time_class(encoding + training)
    parts = f"encoding {time_class(encoding)} where nothing is cached, training {time_class(training)}"
    yield Check("time", "ok", f"{whole} at most: {parts}")
    figures |= {f"items.{modality}": len(several_items) for modality, several_items in items.items()}
    figures |= {"cache_bytes": size, "memory_bytes": memory, "time": whole}
    figures |= {"encoding_seconds": round(encoding, 1), "training_seconds": round(training, 1)}
