"""Contrastive losses over unit vectors; pure functions."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # arXiv 2409.19425


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


def same_pairs(*keys: Tensor) -> Tensor:
    """(B, B) bool: whether pairs i and j agree in any of the keys (B,); a negative key agrees with nothing."""
    same = torch.zeros(len(keys[0]), len(keys[0]), dtype=torch.bool, device=keys[0].device)
    for key in keys:
        same |= (key[:, None] == key[None, :]) & (key >= 0)[:, None]
    return same


@torch.no_grad()
def clamp_log_scale(log_scale: Tensor) -> None:
    """Keep the temperature within [0.001, 0.5], in place. After the step, so that the gradient is never cut."""
    log_scale.clamp_(-torch.log(torch.tensor(MAX_TEMPERATURE)).item(), -torch.log(torch.tensor(MIN_TEMPERATURE)).item())
