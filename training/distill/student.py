"""A student that learns its teacher stage by stage.

A deep student that is trained on the teacher's last features alone sees one target per picture. Here it is cut where
the teacher has hidden states, and each stage learns to make the teacher's next map from the teacher's last one, at
every position (blockwise distillation, Li et al., 2020, arXiv 1911.13053); then the stages are chained, and what each
was off by is trained away together, on maps and on pooled features (hints: Romero et al., 2015, arXiv 1412.6550). Its
features are all that it learned: pooled maps of every stage, the last one's, the scores of the teacher's classes.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.contract.images import ImagePreprocessing
from service.contract.windows import LogMelWindows
from training.distill.recipe import DistillRecipe, StageSpec
from training.distill.views import Views
from training.encode.mobilenet_sounds import MobileNetSounds
from training.encoders import Classifier

_MAPS, _SCORES = 0.5, 0.3
_HEARD = 20.0


class Block(nn.Module):
    """A dense 3 × 3 convolution to more channels and a 1 × 1 back (Fused-MBConv, Tan and Le, 2021), and a way round it.

    On a CPU quicker than the depthwise one that it stands for, which has a ninth of its multiplications.
    """

    def __init__(self, inputs: int, expanded: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, expanded, 3, stride),
            nn.Conv2d(expanded, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.around = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return x + made if self.around else made


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU6()


def image_stages(stages: Sequence[StageSpec], last: int) -> list[nn.Module]:
    """The stages of a student of pictures, whose last map has `last` channels."""
    built: list[nn.Module] = []
    width = 3
    for stage in stages:
        layers: list[nn.Module] = []
        if stage.stem:
            layers += _convolution(width, stage.stem, 3, 2)
            width = stage.stem
        for expanded, outputs, stride in stage.blocks:
            layers.append(Block(width, expanded, outputs, stride))
            width = outputs
        if stage.layer is None:
            layers.append(nn.Sequential(*_convolution(width, last, 1)))
        built.append(nn.Sequential(*layers))
    return built


def sound_stages(network: MobileNetSounds, ends: Sequence[int]) -> list[nn.Module]:
    """A network's blocks, cut behind those that `ends` counts."""
    blocks = list(network.features)
    cuts = [0, *(end + 1 for end in ends), len(blocks)]
    return [nn.Sequential(*blocks[start:end]) for start, end in itertools.pairwise(cuts)]


class Student(nn.Module):
    """Inputs → (B, d): pooled maps of all stages but the last, the last's, and scores of C classes.

    Inputs are pixels (B, 3, H, W) or rows of sound (B, 1, frames, mels). `centres` and `spreads` are the teacher's
    means and deviations per channel of every map, over positions; `mean` and `deviation` those of its pooled features.
    Inside, maps but the last are in units of their spread. `head` gives the logits of the teacher's classes.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        stages: Sequence[nn.Module],
        head: nn.Module,
        kept: Sequence[int],
        centres: Sequence[Tensor],
        spreads: Sequence[Tensor],
        mean: Tensor,
        deviation: Tensor,
        sounds: bool = False,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.head, self.sounds, self.width = head, sounds, len(centres[-1])
        self.scores = Classifier(self.head, kept, sounds=sounds)
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
        """What each stage makes of what the one before it made, or of what is `given` for that."""
        made: list[Tensor] = []
        below = inputs.transpose(2, 3) if self.sounds else inputs
        for index, stage in enumerate(self.stages):
            made.append(stage(below))
            below = made[-1] if given is None else given[index]
        return made

    def pooled(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, d) without the scores, in the teacher's units."""
        parts = [each.float().mean((2, 3)) for each in maps]
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


def student_inputs(stored: NDArray[Any], spec: ImagePreprocessing | LogMelWindows) -> Tensor:
    """Stored views → the student's float32 input, as the contract's preprocessing gives it."""
    if isinstance(spec, LogMelWindows):
        return torch.from_numpy(stored.astype(np.float32))[:, None]
    pixels = torch.from_numpy(np.array(stored)).permute(0, 3, 1, 2).float() / 255.0
    return (pixels - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]


def stage_loss(student: Student, inputs: Tensor, taught: Sequence[Tensor], chained: bool, bfloat16: bool) -> Tensor:
    """The distance of a stage's outputs: of maps, per channel in units of its spread; of pooled features; of logits
    in units of theirs.
    """
    *maps, logits = taught
    wanted = [student.standard(index, each) for index, each in enumerate(maps)]
    given = None if chained else [each.contiguous(memory_format=torch.channels_last) for each in wanted]
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        made = student.maps(inputs.contiguous(memory_format=torch.channels_last), given)
    errors = [(own.float() - other).square() for own, other in zip(made[:-1], wanted[:-1], strict=True)]
    spread = getattr(student, f"spread_{len(maps) - 1}")[:, None, None]
    errors.append(((made[-1].float() - maps[-1]) / spread).square())
    of_maps = torch.stack([error.mean() for error in errors]).sum()
    pooled = student.last(student.pooled(made))
    target = maps[-1].mean((2, 3))
    mean, deviation = student.last(student.mean[None]), student.last(student.deviation[None])
    own, other = (pooled - mean) / deviation, (target - mean) / deviation
    of_features = (own - other).square().mean() + (1 - nn.functional.cosine_similarity(own, other)).mean()
    scored = student.head(pooled)
    of_scores = (scored - logits).square().mean() / logits.var()
    if student.sounds:
        # What is heard: the error of hundreds of classes that are never there must not outweigh the few that are.
        taught_scores = torch.sigmoid(logits)
        of_scores = of_scores + _HEARD * nn.functional.binary_cross_entropy_with_logits(scored, taught_scores)
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
    predicted = []
    for start in range(0, len(views.inputs), 256):
        inputs = student_inputs(views.inputs[start : start + 256], recipe.preprocessing())
        predicted.append(student.standardised(inputs))
    standardised, target = torch.cat(predicted), torch.from_numpy(views.features.astype(np.float32))
    wanted = (target - student.mean) / student.deviation
    cosine = nn.functional.cosine_similarity(standardised * student.deviation + student.mean, target).mean()
    centred = nn.functional.cosine_similarity(standardised, wanted).mean()
    unexplained = (standardised - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum()
    loss = distillation_loss(student, standardised, target, recipe.train.cosine_weight)
    figures = {"loss": loss, "cosine": cosine, "cosine_centred": centred, "r2": 1 - unexplained}
    return {name: round(float(value), 4) for name, value in figures.items()}
