"""The training of a student on `training.fit.loop`: its batches, its loss, its schedule and its checkpoint."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.distill.graph import DistillError
from training.distill.recipe import DistillRecipe, TrainSpec, load_distill_recipe
from training.distill.spectra import Spectra, batch
from training.distill.student import Student, measure, stage_loss
from training.distill.teacher import Teacher, weights_hash
from training.distill.views import Views, files_of
from training.encode.mobilenet_sounds import MobileNetSounds
from training.fit.ahead import Ahead
from training.fit.loop import Figures, Plan, Run, Task, begin, run, warm_cosine

_ELSEWHERE: Any = {
    "train": {"threads", "validate_every", "checkpoint_every"},
    "student": {"exported"},
    "licence": True,
    "trained_on": True,
}
"""Fields of a recipe that may differ in a run that goes on from a checkpoint."""
_AHEAD = 3  # batches that are prepared while the student is at its own
_CLIP = 2.0
_LOWEST = 0.01  # of the peak: the rate at which a cosine ends
_SMALLEST = 0.1  # a channel's deviation against the median: one that hardly ever fires must not outweigh the others
_SAMPLE = 256  # rows from which the units of the teacher's maps are taken


class Distillation(Task):
    """A student that learns its teacher's maps, features and scores."""

    def __init__(
        self, recipe: DistillRecipe, student: Student, stored: Spectra, teacher: Teacher, validation: Views
    ) -> None:
        self.recipe, self.student, self.validation = recipe, student, validation
        spec = recipe.train
        self.chained_from = spec.chain_from * spec.steps

        def draw(step: int) -> tuple[Tensor, list[Tensor]]:
            inputs = batch(stored, recipe, step)
            return inputs, teacher(inputs.numpy())

        self.batches = Ahead(draw, spec.steps, _AHEAD)

    @property
    def waited_s(self) -> float:
        return self.batches.waited_s

    def loss(self, step: int) -> Tensor:
        taught = self.batches.take(step)
        return stage_loss(self.student, *taught, step >= self.chained_from)

    def judge(self, model: nn.Module) -> tuple[float, Figures]:
        assert isinstance(model, Student)
        figures = measure(model, self.validation, self.recipe)
        return -figures["loss"], {f"validation.{name}": value for name, value in figures.items()}

    def report(self, entry: Figures) -> None:
        tqdm.write(json.dumps(entry))


def train(recipe: DistillRecipe, state: Run, stored: Spectra, teacher: Teacher, validation: Views) -> None:
    """Train to the recipe's last step; the averaged weights of the lowest validation loss are the student's then."""
    spec, student = recipe.train, state.model
    assert isinstance(student, Student)
    task = Distillation(recipe, student, stored, teacher, validation)
    plan = Plan(
        steps=spec.steps,
        rate=lambda step: learning_rate(spec, step),
        validate_every=spec.validate_every,
        save_every=spec.checkpoint_every,
        clip=_CLIP,
        decay=lambda step: min(spec.ema, (1 + step) / (10 + step)),
    )
    try:
        state.resume(task)
        run(state, task, plan, recipe.name)
    finally:
        task.batches.close()
    student.load_state_dict(state.best)
    student.eval()


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Linear warm-up, then a half cosine down to 1 % of the peak."""
    return warm_cosine(step, spec.steps, spec.warmup_steps, spec.learning_rate, _LOWEST * spec.learning_rate)


def _spread(values: Tensor) -> Tensor:
    deviation = values.std(0)
    return torch.maximum(deviation, _SMALLEST * deviation.median() + 0.01 * values.abs().mean() + 1e-6)


def new_run(recipe: DistillRecipe, teacher: Teacher, stored: Spectra, work: Path) -> Run:
    """A run at its start, with a fresh student in units of what the teacher makes of some mixtures.

    The number of steps is a part of the recipe: the stages are chained after a share of them. A student that starts
    from another run's has that one's best weights and units.
    """
    torch.manual_seed(recipe.seed)
    sample = torch.cat([batch(stored, recipe, step) for step in range(-(-_SAMPLE // recipe.train.batch_size))])
    *maps, _ = teacher(sample[:_SAMPLE].numpy())
    columns = [map_.permute(0, 2, 3, 1).flatten(0, 2) for map_ in maps]
    features = torch.cat([map_.mean((2, 3)) for map_ in maps], 1)
    classes = len(teacher.labels)
    student = Student(
        MobileNetSounds.of_width(recipe.student.width, classes),
        recipe.student.ends,
        classes,
        [column.mean(0) for column in columns],
        [_spread(column) for column in columns],
        features.mean(0),
        _spread(features),
    )
    if recipe.train.start is not None:
        earlier = load_distill_recipe(recipe.train.start, [f"data.root={recipe.data.root}"])
        student.load_state_dict(_best_of(earlier, work))
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    path = checkpoint_path(recipe, work)
    return begin(path, student, recipe.train.weight_decay, path.stem, average=True)


def _best_of(recipe: DistillRecipe, work: Path) -> dict[str, Tensor]:
    """The best weights of another recipe's finished run. Raises DistillError where there is none."""
    path = checkpoint_path(recipe, work)
    saved: dict[str, Any] = torch.load(path, weights_only=True) if path.is_file() else {"step": 0}
    if saved["step"] < recipe.train.steps:
        raise DistillError(
            f"train.start: {recipe.name} has {saved['step']} of its {recipe.train.steps} steps: run it first"
        )
    best: dict[str, Tensor] = saved["best"]
    return best


def checkpoint_path(recipe: DistillRecipe, work: Path) -> Path:
    """Return a checkpoint's path, by a hash of the recipe, the teacher's weights, and the files' names and sizes."""
    identity = recipe.model_dump(mode="json", exclude=_ELSEWHERE)
    root = recipe.data.root
    files = [[f"{path.relative_to(root)} {path.stat().st_size}" for path in part] for part in files_of(recipe)]
    parts = [identity, weights_hash(root / recipe.teacher.folder), files]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return work / f"{recipe.name}-{digest}.pt"
