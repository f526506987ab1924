"""Contrastive losses over unit vectors; pure functions. Each works row by row, so that a block of rows is enough."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # arXiv 2409.19425
Repeats = Literal["mask", "positive"]


def info_nce(media: Tensor, texts: Tensor, log_scale: Tensor, same: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) of unit vectors (B, D) against (B, D): a scalar.

    `log_scale` is log(1 / temperature). `same` (B, B) marks pairs i ≠ j that share media, text or label: false
    negatives, left out of the softmax. Logits are float32 whatever the vectors are.
    """
    logits = log_scale.float().exp() * (media.float() @ texts.float().T)
    if same is not None:
        off_diagonal = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
        logits = logits.masked_fill(same & off_diagonal, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def info_nce_rows(logits: Tensor, own: Tensor, same: Tensor, repeats: Repeats) -> Tensor:
    """Sum over rows of one direction of InfoNCE; logits and same (n, B), own (n,) each row's own column.

    `mask` leaves the other columns that are the same out. `positive` spreads the target evenly over them (SupCon's
    outer form, arXiv 2004.11362), which is the same loss when every row has one positive.
    """
    if repeats == "mask":
        return cross_entropy(logits.masked_fill(_others(same, own), float("-inf")), own, reduction="sum")
    return -(_targets(same, own) * log_softmax(logits, dim=1)).sum()


def similarity_distribution_rows(logits: Tensor, own: Tensor, same: Tensor) -> Tensor:
    """Sum over rows of KL(softmax(logits) ‖ evenly spread positives) (SDM of IRRA, arXiv 2303.12501)."""
    log_p = log_softmax(logits, dim=1)
    return (log_p.exp() * (log_p - torch.log(_targets(same, own) + 1e-8))).sum()


def same_pairs(*keys: Tensor) -> Tensor:
    """(B, B) bool: whether pairs i and j agree in any of the keys (B,); a negative key agrees with nothing."""
    return agreeing(keys, keys)


def agreeing(rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> Tensor:
    """(n, B) bool: whether a row's pair agrees with a column's in any of the keys, (n,) and (B,)."""
    same = torch.zeros(len(rows[0]), len(columns[0]), dtype=torch.bool, device=rows[0].device)
    for row, column in zip(rows, columns, strict=True):
        same |= (row[:, None] == column[None, :]) & (row >= 0)[:, None]
    return same


@torch.no_grad()
def clamp_log_scale(log_scale: Tensor) -> None:
    """Keep the temperature within [0.001, 0.5], in place. After the step, so that the gradient is never cut."""
    log_scale.clamp_(-torch.log(torch.tensor(MAX_TEMPERATURE)).item(), -torch.log(torch.tensor(MIN_TEMPERATURE)).item())


def _own(same: Tensor, own: Tensor) -> Tensor:
    return torch.zeros_like(same).scatter_(1, own[:, None], True)


def _others(same: Tensor, own: Tensor) -> Tensor:
    return same & ~_own(same, own)


def _targets(same: Tensor, own: Tensor) -> Tensor:
    """(n, B): 1 / positives on each of a row's positives, else 0; one-hot where the row's own is the only one."""
    positive = (same | _own(same, own)).float()
    return positive / positive.sum(1, keepdim=True)
