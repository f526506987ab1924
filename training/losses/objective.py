"""The training loss of a batch: which contrast, in how much memory, over how many processes."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from training.distributed import ALONE, Ranks
from training.losses.contrastive import (
    agreeing,
    info_nce,
    info_nce_rows,
    same_pairs,
    similarity_distribution_rows,
)
from training.recipe import ObjectiveSpec


def contrast(
    spec: ObjectiveSpec,
    media: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    keys: tuple[Tensor, ...],
    ranks: Ranks = ALONE,
) -> Tensor:
    """This process's share of the loss of all pairs: unit vectors (n, D) of both sides, keys (n,) for `same_pairs`.

    Over all processes the shares, and their gradients, add up to those of one process with every pair (n the same
    everywhere). With `spec.chunk` only (chunk, B) logits exist at a time, in the backward pass too: each block is
    computed again there (gradient checkpointing, arXiv 1604.06174), at about twice the arithmetic.
    """
    if spec.negatives == "own" and ranks.count > 1:  # each process's pairs alone: the mean over the processes
        return contrast(spec, media, texts, log_scale, keys) / ranks.count
    if spec.kind == "info_nce" and spec.repeated == "mask" and spec.chunk is None and ranks.count == 1:
        return info_nce(media, texts, log_scale, same_pairs(*keys))
    all_media, all_texts = ranks.gather(media), ranks.gather(texts)
    all_keys = tuple(ranks.gather_constant(key) for key in keys)
    total, first = len(all_media), ranks.index * len(media)
    size = spec.chunk or len(media)
    loss = torch.zeros((), device=media.device)
    for queries, others in ((media, all_texts), (texts, all_media)):
        for start in range(0, len(queries), size):
            rows = slice(start, min(start + size, len(queries)))
            own = torch.arange(first + rows.start, first + rows.stop, device=media.device)
            block = partial(_block, spec, own=own, keys=tuple(key[rows] for key in keys), all_keys=all_keys)
            inputs = (queries[rows], others, log_scale)
            if spec.chunk is None:
                loss = loss + block(*inputs)
            else:
                loss = loss + checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return loss / total if spec.kind == "sdm" else loss / (2 * total)


def nested(vectors: Tensor, dimensions: int) -> Tensor:
    """Unit vectors (B, D) cut to their first `dimensions` numbers and normalised (Matryoshka, arXiv 2205.13147)."""
    return vectors if dimensions == vectors.shape[1] else normalize(vectors[:, :dimensions], dim=-1)


def _block(
    spec: ObjectiveSpec,
    queries: Tensor,
    others: Tensor,
    log_scale: Tensor,
    *,
    own: Tensor,
    keys: tuple[Tensor, ...],
    all_keys: tuple[Tensor, ...],
) -> Tensor:
    logits = log_scale.float().exp() * (queries.float() @ others.float().T)
    same = agreeing(keys, all_keys)
    if spec.kind == "info_nce":
        return info_nce_rows(logits, own, same, spec.repeated)
    return similarity_distribution_rows(logits, own, same)
