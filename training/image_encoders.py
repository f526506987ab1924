"""Image encoders of the two-tower models, which pool in ways of their own; training.encoders holds the others.

Each: pixels (B, 3, H, W) → whole-image vector (B, d) and local vectors (B, N, d).
"""

from typing import Any

import torch
from torch import Tensor, nn


def pooled(cls: Tensor, local: Tensor, pooling: str | None) -> Tensor:
    """A CLS state (B, d), the mean of local vectors (B, N, d), or, for `both`, the two side by side."""
    if pooling not in ("mean", "both"):
        return cls
    return local.mean(1) if pooling == "mean" else torch.cat([cls, local.mean(1)], -1)


class ClipEncoder(nn.Module):
    """CLIP's and Chinese-CLIP's vision model: its normalised CLS state, and patches likewise.

    Through the model's own projection if it has one.
    """

    def __init__(self, model: nn.Module, pooling: str | None = None) -> None:
        super().__init__()
        self.model: Any = getattr(model, "vision_model", model)
        self.projection: Any = getattr(model, "visual_projection", None)
        self.pooling = pooling

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        states = self.model.post_layernorm(self.model(pixels).last_hidden_state)
        if self.projection is not None:
            states = self.projection(states)
        return pooled(states[:, 0], states[:, 1:], self.pooling), states[:, 1:]


class SiglipEncoder(nn.Module):
    """SigLIP's vision model: pooled by its attention head, or, asked for or where it has none, by the mean."""

    def __init__(self, model: nn.Module, pooling: str | None = None) -> None:
        super().__init__()
        self.model: Any = getattr(model, "vision_model", model)
        self.mean = pooling == "mean" or not self.model.use_head
        if self.mean and self.model.use_head:
            self.model.use_head, self.model.head = False, None

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixels)
        local = output.last_hidden_state
        return (local.mean(1) if self.mean else output.pooler_output), local


class PooledEncoder(nn.Module):
    """A vision model's own pooled state, through the whole model's projection if it has one; the one local vector too.

    ALIGN's EfficientNet, and the vision model of a vision-text dual encoder.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model.vision_model
        self.projection: Any = getattr(model, "visual_projection", None)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        state = self.model(pixel_values=pixels).pooler_output
        whole = state if self.projection is None else self.projection(state)
        return whole, whole[:, None]
