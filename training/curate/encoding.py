"""Vectors that depend on their item alone, so that a pool's shards may be cut and ordered in any way.

A matrix product may round differently for another batch or another padding. Here every batch has one size and every
text is padded to one of few lengths, which follows from its own.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.contract.tokens import TextPreprocessing, Tokens
from service.contract.vectors import l2_normalise
from training.encoders import FrozenEncoder
from training.features import FeatureError, preparer, runner

Floats = NDArray[np.float32]
_BATCH = 16
_LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def text_vectors(encoder: FrozenEncoder) -> Callable[[Sequence[str]], Floats]:
    """A function from N texts to unit vectors (N, d); NaN for a text in which the tokenizer finds nothing."""
    prepare, run = preparer(encoder), runner(encoder, False)
    spec = encoder.preprocessing
    assert isinstance(spec, TextPreprocessing)

    def encode(texts: Sequence[str]) -> Floats:
        lengths: dict[int, list[tuple[int, Tokens]]] = {}
        for row, text in enumerate(texts):
            try:
                tokens = prepare(text)
            except FeatureError:
                continue
            padded = next((length for length in _LENGTHS if length >= len(tokens.ids)), spec.max_length)
            lengths.setdefault(min(padded, spec.max_length), []).append((row, tokens))
        vectors = np.full((len(texts), encoder.width), np.nan, np.float32)
        for length, members in lengths.items():
            filler = Tokens((spec.pad_id,) * length, False)  # one at least: it makes the batch as long as it must be
            for start in range(0, len(members), _BATCH - 1):
                rows, batch = zip(*members[start : start + _BATCH - 1], strict=True)
                pooled = run([*batch, *[filler] * (_BATCH - len(batch))])["pooled"]
                vectors[list(rows)] = l2_normalise(pooled[: len(batch)])
        return vectors

    return encode


def media_vectors(encoder: FrozenEncoder) -> Callable[[Iterable[Any]], Floats]:
    """A function from N preprocessed media, taken a batch at a time, to unit vectors (N, d)."""
    run = runner(encoder, False)
    # Sounds differ in length, and a batch of them in size: each is a batch of its own.
    size = _BATCH if encoder.modality == "image" else 1

    def encode(prepared: Iterable[Any]) -> Floats:
        media, parts = iter(prepared), [np.zeros((0, encoder.width), np.float32)]
        while batch := list(islice(media, size)):
            filled = [*batch, *[np.zeros_like(batch[0])] * (size - len(batch))]
            parts.append(l2_normalise(run(filled)["pooled"][: len(batch)]))
        return np.concatenate(parts)

    return encode
