"""The training of a student on `training.fit.loop`: its batches, its loss, its schedule and its checkpoint."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from service.contract.windows import LogMelWindows
from training.distill.graph import DistillError
from training.distill.recipe import DistillRecipe, TrainSpec, load_distill_recipe
from training.distill.spectra import Spectra, cached_spectra
from training.distill.spectra import batch as mixtures
from training.distill.student import Student, image_stages, measure, sound_stages, stage_loss, student_inputs
from training.distill.teacher import Teacher, weights_hash
from training.distill.views import Views, augmented, batch_rows, files_of, pictures
from training.encode.mobilenet_sounds import MobileNetSounds
from training.fit.ahead import Ahead
from training.fit.loop import Figures, Plan, Run, Task, begin, run, warm_cosine

Stored = NDArray[np.uint8] | Spectra
"""What views are made of: pictures (N, H, W, 3), or the spectra of sounds."""
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
_SAMPLE = 256  # pictures
_MIXED = 0.2  # of the batches: two pictures on top of each other


class Distillation(Task):
    """A student that learns its teacher's maps, features and scores."""

    def __init__(
        self, recipe: DistillRecipe, student: Student, stored: Stored, teacher: Teacher, validation: Views
    ) -> None:
        self.recipe, self.student, self.validation = recipe, student, validation
        spec = recipe.train
        self.chained_from = spec.chain_from * (spec.restarts[0].at if spec.restarts else spec.steps)

        def draw(step: int) -> tuple[Tensor, list[Tensor]]:
            inputs = batch(stored, recipe, step)
            return inputs, teacher(inputs.numpy())

        self.batches = Ahead(draw, spec.steps, _AHEAD)

    @property
    def waited_s(self) -> float:
        return self.batches.waited_s

    def loss(self, step: int) -> Tensor:
        taught = self.batches.take(step)
        return stage_loss(self.student, *taught, step >= self.chained_from, self.recipe.train.bfloat16)

    def judge(self, model: nn.Module) -> tuple[float, Figures]:
        assert isinstance(model, Student)
        figures = measure(model, self.validation, self.recipe)
        return -figures["loss"], {f"validation.{name}": value for name, value in figures.items()}

    def report(self, entry: Figures) -> None:
        tqdm.write(json.dumps(entry))


def train(recipe: DistillRecipe, state: Run, stored: Stored, teacher: Teacher, validation: Views) -> None:
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
    """Linear warm-up, then a half cosine down to 1 % of the peak; both once more from each restart on."""
    first, last, peak = 0, spec.steps, spec.learning_rate
    for restart in spec.restarts:
        if restart.at > step:
            last = restart.at
            break
        first, peak = restart.at, spec.learning_rate * restart.peak
    return warm_cosine(step - first, last - first, spec.warmup_steps, peak, _LOWEST * peak)


def stored_media(recipe: DistillRecipe, files: list[Path], work: Path) -> Stored:
    """What the views of the files are made of, from `work` as far as it is there."""
    spec = recipe.preprocessing()
    return cached_spectra(files, spec, work) if isinstance(spec, LogMelWindows) else pictures(files, work)


def batch(stored: Stored, recipe: DistillRecipe, step: int) -> Tensor:
    """The inputs of one step's views: a function of the step."""
    if isinstance(stored, Spectra):
        return mixtures(stored, recipe, step)
    rng = np.random.default_rng([recipe.seed, 1, step])
    size = (recipe.student.preprocessing["width"], recipe.student.preprocessing["height"])
    rows = batch_rows(len(stored), recipe.train.batch_size, step, recipe.seed)
    shown = np.stack([np.asarray(augmented(Image.fromarray(stored[row]), rng, size)) for row in rows])
    pixels = student_inputs(shown, recipe.preprocessing())
    if rng.random() < _MIXED:
        share = rng.uniform()
        pixels = share * pixels + (1 - share) * pixels.flip(0)
    return pixels


def _sample(stored: Stored, recipe: DistillRecipe) -> Tensor:
    """Inputs from which the units of the teacher's maps are taken: pictures as they are, and mixtures of sounds."""
    if isinstance(stored, Spectra):
        steps = range(-(-_SAMPLE // recipe.train.batch_size))
        return torch.cat([mixtures(stored, recipe, step) for step in steps])[:_SAMPLE]
    rows = np.unique(np.linspace(0, len(stored) - 1, _SAMPLE, dtype=int))
    size = (recipe.student.preprocessing["width"], recipe.student.preprocessing["height"])
    shown = [np.asarray(Image.fromarray(stored[row]).resize(size, Image.Resampling.BICUBIC)) for row in rows]
    return student_inputs(np.stack(shown), recipe.preprocessing())


def _spread(values: Tensor) -> Tensor:
    deviation = values.std(0)
    return torch.maximum(deviation, _SMALLEST * deviation.median() + 0.01 * values.abs().mean() + 1e-6)


def new_run(recipe: DistillRecipe, teacher: Teacher, stored: Stored, work: Path) -> Run:
    """A run at its start, with a fresh student in units of what the teacher makes of some of the media.

    The number of steps is a part of the recipe: the stages are chained after a share of them. A student that starts
    from another run's has that one's best weights and units.
    """
    torch.manual_seed(recipe.seed)
    *maps, _ = teacher(_sample(stored, recipe).numpy())
    columns = [each.permute(0, 2, 3, 1).flatten(0, 2) for each in maps]
    features = torch.cat([each.mean((2, 3)) for each in maps], 1)
    last = maps[-1].shape[1]
    head: nn.Module
    if recipe.modality == "image":
        stages, head = image_stages(recipe.student.stages, last), nn.Linear(last, teacher.classes)
    else:
        assert recipe.student.width is not None
        network = MobileNetSounds.of_width(recipe.student.width, teacher.classes)
        stages, head = sound_stages(network, recipe.student.cuts), network.classifier
    student = Student(
        stages,
        head,
        teacher.kept,
        [each.mean(0) for each in columns],
        [_spread(each) for each in columns],
        features.mean(0),
        _spread(features),
        sounds=recipe.modality == "audio",
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
