"""Text encoders that pool in ways of their own: of the two-tower models, and sentence-transformers' rarer modules.

Each: input_ids, attention_mask (B, L), padded on the right → one local vector (B, 1, d), that of the whole text.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ProjectedText(nn.Module):
    """A text model's pooled state through the projection of the whole model, if it has one.

    `pooled`: of the text model's output, where that is not its own pooled state.
    """

    def __init__(self, model: nn.Module, projection: nn.Module | None, pooled: Callable[[Any], Tensor] | None) -> None:
        super().__init__()
        self.model, self.projection = model, projection
        self.pooled = pooled or (lambda output: output.pooler_output)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        state = self.pooled(self.model(input_ids=input_ids, attention_mask=attention_mask))
        return (state if self.projection is None else self.projection(state))[:, None]


class SiglipText(nn.Module):
    """SigLIP's text model, which always sees texts of one length, and reads the state of the last place.

    The padding is made here, on the side that the tokenizer says, so that a call may have texts of any length.
    `masked`: whether attention is told what is padding. SigLIP was trained without (arXiv 2303.15343); transformers
    gives the mask where the tokenizer makes one.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model = model
        self.length, self.pad_id = int(model.config.max_position_embeddings), int(tokenizer.pad_token_id)
        self.left = tokenizer.padding_side == "left"
        self.masked = "attention_mask" in tokenizer.model_input_names

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        lengths = attention_mask.sum(1, keepdim=True)
        place = torch.arange(self.length, device=input_ids.device)[None] - (
            self.length - lengths if self.left else 0 * lengths
        )
        inside = (place >= 0) & (place < lengths)
        ids = torch.where(inside, input_ids.gather(1, torch.minimum(place.clamp(min=0), lengths - 1)), self.pad_id)
        mask = inside.to(attention_mask.dtype) if self.masked else None
        state: Tensor = self.model(input_ids=ids, attention_mask=mask).pooler_output
        return state[:, None]


class SentenceText(nn.Module):
    """Token states → sentence-transformers' poolings side by side → its Dense layers.

    `encoder`: input_ids, attention_mask (B, L) → states (B, L, d).
    """

    def __init__(self, encoder: nn.Module, poolings: Sequence[str], dense: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoder, self.poolings, self.dense = encoder, list(poolings), nn.ModuleList(dense)
        # The poolings have no weights, and are part of what the weights' hash names.
        self.register_buffer("chosen", torch.tensor([POOLINGS.index(name) for name in poolings]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids, attention_mask)
        vector = torch.cat([_pooled(states, attention_mask, name) for name in self.poolings], -1)
        for layer in self.dense:
            vector = layer(vector)
        return vector[:, None]


class Dense(nn.Module):
    """A layer of sentence-transformers: activation(linear(x)), and x beside it where it is residual."""

    def __init__(self, stated: Mapping[str, Any], activation: nn.Module) -> None:
        super().__init__()
        width, height = stated["in_features"], stated["out_features"]
        self.linear = nn.Linear(width, height, bias=stated.get("bias", True))
        self.activation_function, self.use_residual = activation, bool(stated.get("use_residual"))
        self.residual = nn.Linear(width, height, bias=False) if self.use_residual and width != height else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.activation_function(self.linear(x))
        if not self.use_residual:
            return out
        return out + (x if self.residual is None else self.residual(x))


def _pooled(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """States (B, L, d), padded on the right, → (B, d)."""
    weights = mask[..., None].to(states.dtype)
    if pooling == "cls":
        return states[:, 0]
    if pooling == "max":
        return states.masked_fill(weights == 0, float("-inf")).amax(1)
    if pooling == "lasttoken":
        last = mask.sum(1) - 1
        return states.gather(1, last[:, None, None].expand(-1, 1, states.shape[2]))[:, 0]
    if pooling == "weightedmean":
        weights = weights * torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=states.dtype)[:, None]
    total = weights.sum(1)
    return (states * weights).sum(1) / (total.sqrt() if pooling == "mean_sqrt_len_tokens" else total)


def two_tower_text(model: Any, tokenizer: Any) -> nn.Module:
    """The text tower of a whole model of one of TWO_TOWERS, for what a tokenizer of transformers makes."""
    if model.config.model_type == "siglip":
        return SiglipText(model.text_model, tokenizer)
    of_cls = model.config.model_type in ("align", "chinese_clip")
    return ProjectedText(model.text_model, model.text_projection, _first if of_cls else None)


def _first(output: Any) -> Tensor:
    state: Tensor = output.last_hidden_state[:, 0]
    return state


TWO_TOWERS = ("align", "chinese_clip", "clap", "clip", "siglip", "vision-text-dual-encoder")
"""Types of models (`model_type`) of two towers with projections into one space, as transformers has them."""

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
"""Poolings of sentence-transformers, in the order in which it puts several side by side by switches."""
