"""Candidates as frozen encoders: those that are layers and poolings of one network are encoded in one pass.

`read` loads a network once with every layer that some candidate asks for, side by side (training.encoders), and says
which columns of its features are whose.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import interpolate

from service.contract.bundle import Modality
from training.encoders import FrozenEncoder, example_inputs, load_encoder, weights_sha256
from training.errors import TrainingError
from training.features import Item, cached_features
from training.measure.select.candidates import Candidate, Network, SelectError
from training.measure.select.sides import Floats
from training.measure.select.words import word_encoder
from training.recipe import EncoderSource, Recipe

_NOISE = 16  # inputs that the normalisations of a random network are set by


@dataclass(frozen=True)
class Tower:
    """An encoder, and the columns of its features that belong to each of the candidates that share it."""

    encoder: FrozenEncoder
    columns: Mapping[str, tuple[slice, ...]]

    def encode(self, items: Sequence[Item], cache: Path, what: str) -> dict[str, tuple[Floats, ...]]:
        """Return each candidate's features of `items`, memory-mapped, as arrays to be put side by side. Resumable."""
        pooled = cached_features(self.encoder, items, cache, what=f"{what} {', '.join(self.columns)}").pooled
        return {name: tuple(pooled[:, column] for column in columns) for name, columns in self.columns.items()}


def read(
    recipe: Recipe, modality: Modality, candidates: Mapping[str, Candidate], texts: Sequence[str], cache: Path
) -> list[Tower]:
    """The towers of a modality's candidates. `texts` are what LSA is fitted on. Raises SelectError."""
    shared: dict[str, dict[str, Network]] = {}
    towers = []
    for name, source in candidates.items():
        if isinstance(source, Network):
            alone = source.onnx or source.layers or source.concepts or source.beside
            identity = source.model_dump_json(exclude={"layer", "pooling", "licence", "labels"})
            shared.setdefault(f"{identity}{name if alone else ''}", {})[name] = source
        else:
            located = source
            if not hasattr(source, "lsa"):
                paths = {"words": recipe.path(source.words), "vectors": source.vectors and recipe.path(source.vectors)}
                located = source.model_copy(update=paths)
            encoder = word_encoder(name, located, texts, cache)
            towers.append(Tower(encoder, {name: (slice(None),)}))
    for networks in shared.values():
        try:
            towers.append(_tower(recipe, modality, networks))
        except SelectError:
            raise
        except TrainingError as error:
            raise SelectError(f"candidates.{modality} {', '.join(networks)}: {error}") from None
    return towers


def _tower(recipe: Recipe, modality: Modality, networks: Mapping[str, Network]) -> Tower:
    first = next(iter(networks.values()))
    plain = all(source.layer is None and not source.random for source in networks.values())
    if plain and len({source.pooling for source in networks.values()}) == 1:
        encoder = _load(recipe, modality, first)
        return Tower(encoder, dict.fromkeys(networks, (slice(None),)))
    if modality == "text":  # of several poolings side by side none could be brought to length 1 alone
        first = first.model_copy(update={"normalise": False})
    unpooled = _load(recipe, modality, first.model_copy(update={"pooling": None}))
    model = cast(Any, unpooled.module).model
    if modality == "audio" and not getattr(unpooled.module, "convolutional", False):
        raise SelectError(
            f"candidates.audio {', '.join(networks)}: of sounds only convolutions are read at a layer or at random"
        )
    poolings = {name: _pooling(unpooled, model, name, source) for name, source in networks.items()}
    pooling = poolings[next(iter(poolings))] if len(set(poolings.values())) == 1 else "both"
    layers = tuple(sorted({source.layer for source in networks.values() if source.layer is not None}))
    update = {"layers": layers, "pooling": None if pooling == "map" else pooling}
    encoder = _load(recipe, modality, first.model_copy(update=update))
    if first.random:
        encoder = _with_random_weights(encoder, first.seed)
    widths = _widths(encoder, layers, unpooled.width)
    return Tower(
        encoder,
        {
            name: _columns(
                widths, layers.index(source.layer) if source.layer is not None else -1, poolings[name], pooling
            )
            for name, source in networks.items()
        },
    )


def _load(recipe: Recipe, modality: Modality, source: Network) -> FrozenEncoder:
    plain = EncoderSource.model_validate(source.model_dump(include=set(EncoderSource.model_fields)))
    return load_encoder(recipe.model_copy(update={"encoders": {modality: plain}}), modality)


def _pooling(unpooled: FrozenEncoder, model: Any, name: str, source: Network) -> str:
    """Return how a candidate's states become a vector: cls, mean or both; `map`: the mean over a convolution's map."""
    if not hasattr(model.config, "num_hidden_layers"):
        if source.pooling in ("cls", "both"):
            raise SelectError(
                f"candidates.{unpooled.modality}.{name}: {source.pooling} pooling needs a CLS state, and it has none"
            )
        return "map"
    if source.pooling == "last":
        raise SelectError(f"candidates.{unpooled.modality}.{name}: last pooling cannot stand beside others")
    return source.pooling or (unpooled.pooling if unpooled.modality == "text" else "cls")


@torch.inference_mode()
def _widths(encoder: FrozenEncoder, layers: Sequence[int], last: int) -> list[int]:
    """Widths of the hidden states side by side: of `layers`, and of the last one."""
    model = cast(Any, encoder.module).model
    inputs = [torch.from_numpy(array) for array in example_inputs(encoder.preprocessing, 1)]
    states = model(*inputs, output_hidden_states=True).hidden_states
    return [*(states[layer].shape[1 if states[layer].dim() == 4 else -1] for layer in layers), last]


def _columns(widths: Sequence[int], part: int, pooling: str, whole: str) -> tuple[slice, ...]:
    part %= len(widths)
    start = sum(widths[:part])
    first = slice(start, start + widths[part])
    second = slice(first.start + sum(widths), first.stop + sum(widths))  # of the means, which follow the CLS states
    if whole != "both":
        return (first,)
    return {"cls": (first,), "mean": (second,), "both": (first, second)}[pooling]


def _with_random_weights(encoder: FrozenEncoder, seed: int) -> FrozenEncoder:
    """Makes the same architecture, initialised by its own library from `seed`.

    Running statistics of batch normalisation are set by smooth noise: as initialised, they would let the signal of a
    deep convolution die out, and the control would be constant and not random.
    """
    from transformers import AutoModel

    wrapper = cast(Any, encoder.module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(wrapper.model.config, dtype=torch.float32)
        normalisations = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        if normalisations:
            for module in normalisations:
                module.momentum = 1.0
            shape = example_inputs(encoder.preprocessing, 1)[0].shape
            noise = interpolate(torch.randn(_NOISE, shape[1], 8, 8), shape[2:], mode="bicubic")
            with torch.no_grad():
                model.train()(noise)
    wrapper.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    identity = hashlib.sha256(f"{weights_sha256(wrapper)}:{encoder.weights_sha256}".encode()).hexdigest()
    return replace(encoder, weights_sha256=identity)
