"""A student that learns its teacher stage by stage.

A deep student that is trained on the teacher's last features alone sees one target per sound. Here it is cut where
the teacher is, and each stage learns to make the teacher's next map from the teacher's last one, at every position
(blockwise distillation, Li et al., 2020, arXiv 1911.13053); then the stages are chained, and what each was off by is
trained away together, on maps and on pooled features (hints: Romero et al., 2015, arXiv 1412.6550). Its features are
all that it learned: pooled maps of every stage, the last one's, the scores of the teacher's classes.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.distill.recipe import DistillRecipe
from training.distill.views import Views
from training.encode.mobilenet_sounds import MobileNetSounds
from training.encoders import Classifier

_MAPS, _SCORES = 0.5, 0.3
_HEARD = 20.0


def stages_of(network: MobileNetSounds, ends: Sequence[int]) -> list[nn.Module]:
    """A network's blocks, cut behind those that `ends` counts."""
    blocks = list(network.features)
    cuts = [0, *(end + 1 for end in ends), len(blocks)]
    return [nn.Sequential(*blocks[start:end]) for start, end in itertools.pairwise(cuts)]


class Student(nn.Module):
    """Rows of sound (B, 1, frames, mels) → (B, d): pooled maps of all stages, and scores of C classes.

    `centres` and `spreads` are the teacher's means and deviations per channel of every map, over positions; `mean` and
    `deviation` those of its pooled features. Inside, maps but the last are in units of their spread.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        network: MobileNetSounds,
        ends: Sequence[int],
        classes: int,
        centres: Sequence[Tensor],
        spreads: Sequence[Tensor],
        mean: Tensor,
        deviation: Tensor,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages_of(network, ends))
        self.head, self.width = network.classifier, network.width
        self.scores = Classifier(self.head, range(classes), sounds=True)
        self.register_buffer("mean", mean.clone())
        self.register_buffer("deviation", deviation.clone())
        for index, (centre, spread) in enumerate(zip(centres, spreads, strict=True)):
            self.register_buffer(f"centre_{index}", centre.clone())
            self.register_buffer(f"spread_{index}", spread.clone())

    def standard(self, index: int, made: Tensor) -> Tensor:
        """A map of the teacher's in the units that stage `index` works in."""
        if index == len(self.stages) - 1:
            return made
        centre, spread = getattr(self, f"centre_{index}"), getattr(self, f"spread_{index}")
        return (made - centre[:, None, None]) / spread[:, None, None]

    def maps(self, inputs: Tensor, given: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return what each stage makes of what the one before it made, or of what is `given` for that."""
        made: list[Tensor] = []
        below = inputs.transpose(2, 3)
        for index, stage in enumerate(self.stages):
            made.append(stage(below))
            below = made[-1] if given is None else given[index]
        return made

    def pooled(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, d) without the scores, in the teacher's units."""
        parts = [map_.float().mean((2, 3)) for map_ in maps]
        for index in range(len(parts) - 1):
            parts[index] = parts[index] * getattr(self, f"spread_{index}") + getattr(self, f"centre_{index}")
        return torch.cat(parts, 1)

    def last(self, pooled: Tensor) -> Tensor:
        return pooled[:, -self.width :]

    def standardised(self, inputs: Tensor) -> Tensor:
        return (self.pooled(self.maps(inputs)) - self.mean) / self.deviation

    def forward(self, inputs: Tensor) -> Tensor:
        pooled = self.pooled(self.maps(inputs))
        return torch.cat([pooled, self.scores(self.last(pooled))], 1)


def student_inputs(rows: NDArray[np.float16]) -> Tensor:
    """Stored rows (N, frames, mels) → the student's float32 input."""
    return torch.from_numpy(rows.astype(np.float32))[:, None]


def stage_loss(student: Student, inputs: Tensor, taught: Sequence[Tensor], chained: bool) -> Tensor:
    """The distance of a stage's outputs: of maps, per channel in units of its spread; of pooled features; of logits
    in units of theirs.
    """
    *maps, logits = taught
    targets = [student.standard(index, map_) for index, map_ in enumerate(maps)]
    given = None if chained else [target.contiguous(memory_format=torch.channels_last) for target in targets]
    made = student.maps(inputs.contiguous(memory_format=torch.channels_last), given)
    errors = [(map_.float() - target).square() for map_, target in zip(made[:-1], targets[:-1], strict=True)]
    spread = getattr(student, f"spread_{len(maps) - 1}")[:, None, None]
    errors.append(((made[-1].float() - maps[-1]) / spread).square())
    of_maps = torch.stack([error.mean() for error in errors]).sum()
    pooled = student.last(student.pooled(made))
    mean, deviation = student.last(student.mean[None]), student.last(student.deviation[None])
    features, target = (pooled - mean) / deviation, (maps[-1].mean((2, 3)) - mean) / deviation
    of_features = (features - target).square().mean()
    of_features = of_features + (1 - nn.functional.cosine_similarity(features, target)).mean()
    scored = student.head(pooled)
    # What is heard: the error of hundreds of classes that are never there must not outweigh the few that are.
    heard = nn.functional.binary_cross_entropy_with_logits(scored, torch.sigmoid(logits))
    of_scores = (scored - logits).square().mean() / logits.var() + _HEARD * heard
    if chained:
        return _MAPS * of_maps + of_features + _SCORES * of_scores
    return of_maps + _SCORES * (of_features + of_scores)


def distillation_loss(student: Student, predicted: Tensor, target: Tensor, cosine_weight: float) -> Tensor:
    """Mean squared error of standardised features plus weighted (1 - cosine) of the raw features; both (B, d).

    `predicted` is standardised, `target` is the teacher's raw feature.
    """
    error = (predicted - (target - student.mean) / student.deviation).square().mean()
    raw = predicted * student.deviation + student.mean
    return error + cosine_weight * (1 - nn.functional.cosine_similarity(raw, target)).mean()


@torch.inference_mode()
def measure(student: Student, views: Views, recipe: DistillRecipe) -> dict[str, float]:
    """Loss, mean cosine of raw and of mean-centred features, and explained variance (R²) against the teacher."""
    student.eval()
    parts = [views.inputs[start : start + 256] for start in range(0, len(views.inputs), 256)]
    standardised = torch.cat([student.standardised(student_inputs(part)) for part in parts])
    target = torch.from_numpy(views.features.astype(np.float32))
    taught = (target - student.mean) / student.deviation
    cosine = nn.functional.cosine_similarity(standardised * student.deviation + student.mean, target).mean()
    centred = nn.functional.cosine_similarity(standardised, taught).mean()
    unexplained = (standardised - taught).square().sum() / (taught - taught.mean(dim=0)).square().sum()
    loss = distillation_loss(student, standardised, target, recipe.train.cosine_weight)
    figures = {"loss": loss, "cosine": cosine, "cosine_centred": centred, "r2": 1 - unexplained}
    return {name: round(float(value), 4) for name, value in figures.items()}
