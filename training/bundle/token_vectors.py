"""Token vectors of a tower, for reranking by late interaction: what `export: {tokens: true}` adds to its graph.

A token's vector is what the head would make of an item that had this token alone: for heads of pooled features, of the
token in place of the pooled vector; for heads of tokens, of the token beside the item's own pooled vector.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from service.contract.bundle import TOKEN_MASK, TOKENS
from training.encoders import FrozenEncoder, example_inputs
from training.errors import TrainingError
from training.features import Item, collate, preparer
from training.graphs import session
from training.heads.projector import Head

PARITY = 0.9999


class TokenError(TrainingError):
    """A tower has no token vectors, or its graph does not compute what torch computes."""


def token_vectors(head: Head, pooled: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Unit vectors of `tokens` (B, N, d) → (B, N, D), or packed (ΣN, d) → (ΣN, D); see the head for the arguments."""
    if not head.needs_tokens:
        vectors: Tensor = head(tokens.flatten(0, -2))
        return vectors.unflatten(0, tokens.shape[:-1]) if tokens.dim() == 3 else vectors
    if head.kind == "attention":
        # One token takes the whole weight: attention over it is its value.
        local = head.local
        alone = local.out(gelu(local.values(local.norm(tokens))))  # type: ignore[operator]
        return normalize(alone + _spread(head.skip(pooled), weights, packed=tokens.dim() == 2), dim=-1)
    alone = head.local(tokens)
    if head.modality == "image":
        alone = alone + _spread(head.whole(pooled), weights, packed=tokens.dim() == 2)
    if head.modality == "text":
        projected = head.project(alone)
        alone = head.norm(projected + head.refine(gelu(projected)))
    return normalize(alone, dim=-1)


def _spread(items: Tensor, weights: Tensor, *, packed: bool) -> Tensor:
    """What belongs to an item (B, D), at each of its tokens: (B, 1, D), or (ΣN, D) where they are packed."""
    return (weights > 0).to(items.dtype).T @ items if packed else items[:, None]


def check_has_tokens(encoder: FrozenEncoder) -> None:
    """Raises TokenError for an encoder that gives nothing but one vector per item."""
    if encoder.module is None:
        raise TokenError(f"export.tokens: {encoder.source} is an ONNX encoder with pooled features only")
    if encoder.modality == "image":
        arrays = example_inputs(encoder.preprocessing, 1)
        with torch.inference_mode():
            _, local = encoder.module(*[torch.from_numpy(array) for array in arrays])
        if local.shape[1] == 1:
            raise TokenError(
                f"export.tokens: {encoder.source} has one vector per image: layers, concepts, encoders beside it and "
                "scales have no common cells"
            )
    if encoder.concepts:
        raise TokenError(f"export.tokens: {encoder.source} has concepts, which are told of whole items")
    if encoder.modality == "text" and encoder.pooling == "both":
        raise TokenError(f"export.tokens: {encoder.source} pools CLS and mean side by side, and a token has one state")


def check_tokens(encoder: FrozenEncoder, whole: nn.Module, graph: Path, items: Sequence[Item]) -> float:
    """Lowest cosine of the graph's token vectors, of real items in one batch, to what torch makes of each item alone.

    Raises TokenError below PARITY, and where an item's own tokens are not as many.
    """
    prepare = preparer(encoder)
    prepared = [prepare(item) for item in items]
    running = session(graph)
    inputs = dict(zip(encoder.preprocessing.inputs, collate(encoder.preprocessing, prepared), strict=True))
    tokens, mask = running.run([TOKENS, TOKEN_MASK], inputs)
    lowest = 1.0
    for row, one in enumerate(prepared):
        alone = [torch.from_numpy(array) for array in collate(encoder.preprocessing, [one])]
        with torch.inference_mode():
            _, wanted, own = whole(*alone)
        wanted = wanted.numpy() if wanted.dim() == 2 else wanted[0][own[0] > 0].numpy()
        found = (tokens if tokens.ndim == 2 else tokens[row])[mask[row] > 0]
        if found.shape != wanted.shape or not np.isfinite(found).all():
            raise TokenError(
                f"the {encoder.modality} graph gives {found.shape} token vectors, and torch {wanted.shape}"
            )
        lowest = min(lowest, float((found * wanted).sum(1).min()))
    if lowest < PARITY:
        raise TokenError(f"the {encoder.modality} graph's token vectors differ from torch's: {lowest:.6f}")
    return lowest
