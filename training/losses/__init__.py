"""What projectors are trained on: contrasts of pairs, and regularisers of a batch."""

from training.losses.contrastive import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    clamp_log_scale,
    info_nce,
    same_pairs,
)
from training.losses.objective import contrast, nested
from training.losses.regularise import alignment, noise_robust, uniformity

__all__ = [
    "MAX_TEMPERATURE",
    "MIN_TEMPERATURE",
    "alignment",
    "clamp_log_scale",
    "contrast",
    "info_nce",
    "nested",
    "noise_robust",
    "same_pairs",
    "uniformity",
]
