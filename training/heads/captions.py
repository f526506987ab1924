"""A text projector that is computed from captions alone, for a space that is trained without captioned media.

Sentence vectors of one kind of text lie in a narrow cone: they are centred on the mean of the captions and partly
whitened (Su et al., 2021, arXiv 2103.15316), along the axes in which captions vary most. Media are then trained towards
the vectors of the names that their encoders' own classifiers give them.
"""

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from training.encoders import FrozenEncoder
from training.features import Features, cached_features
from training.files import QUOTING, dialect
from training.heads.projector import Head, Linear
from training.pairs import PairError
from training.recipe import Recipe

_WHITENED = 0.25
"""How far variances are evened out: 0 leaves them, 1 makes all axes alike. Chosen on captions of Flickr8k dev and the
tags of Corel5k (docs/LOG.md, 2026-11-30)."""
_RIDGE = 1e-4
_MOST = 5_000
"""Captions that the statistics are taken from."""


def captions(recipe: Recipe) -> list[str]:
    """The captions of the recipe's text-only sets, each once. Raises PairError."""
    texts: dict[str, None] = {}
    for name, source in recipe.texts.items():
        path = recipe.path(source.table)
        try:
            plain = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise PairError(
                f"texts.{name}: {path} cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from None
        number = 0
        try:
            lines = io.StringIO(plain.decode("utf-8-sig"), newline="")
            for number, row in enumerate(csv.reader(lines, dialect(path.name)), start=1):
                if len(row) <= source.column:
                    raise PairError(f"texts.{name}: row {number} of {path} has no column {source.column}")
                texts[row[source.column].strip()] = None
        except csv.Error as error:
            raise PairError(f"texts.{name}: {path}, after row {number}: {error} ({QUOTING})") from None
        except UnicodeDecodeError:
            raise PairError(f"texts.{name}: {path} is not UTF-8: save it as UTF-8") from None
    return [text for text in texts if text]


def caption_features(recipe: Recipe, encoder: FrozenEncoder, cache: Path) -> Features:
    """Frozen features of the captions of the recipe's text-only sets, of at most so many. Raises PairError."""
    return cached_features(encoder, _some(captions(recipe)), cache, what="captions")


def text_head(recipe: Recipe, encoder: FrozenEncoder, given: Features) -> Head:
    """The text projector of a recipe with text-only sets, from their features: sentence vectors (B, d) → unit (B, D).

    Raises PairError where the sets hold fewer captions than the space has dimensions.
    """
    width = recipe.projector.inner
    if len(given) < width or width > encoder.width:
        raise PairError(f"texts: {len(given)} captions of {encoder.width} features do not fill {width} dimensions")
    features = np.asarray(given.pooled, np.float64)
    mean = features.mean(0)
    variances, axes = np.linalg.eigh(np.cov((features - mean).T))
    largest = np.argsort(variances)[::-1][:width]
    scale = (variances[largest] + _RIDGE * variances.max()) ** (-_WHITENED / 2)
    matrix = torch.from_numpy((axes[:, largest] * scale).T).float()
    head = Head("text", encoder.width, recipe.projector.model_copy(update={"kind": "linear"}))
    assert isinstance(head.pooled, Linear)
    with torch.no_grad():
        head.pooled.standardise.mean.copy_(torch.from_numpy(mean))
        head.pooled.linear.weight.copy_(matrix)
        head.pooled.linear.bias.zero_()
    return head.eval().requires_grad_(False)


def _some(texts: Sequence[str]) -> list[str]:
    """Returns at most so many of the texts, evenly spaced."""
    return list(texts[:: max(1, len(texts) // _MOST)])
