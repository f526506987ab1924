"""Training of the student on cached views: AdamW, a moving average of the weights, checkpoints to go on from."""

import copy
import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from training.distill.recipe import DistillRecipe, TrainSpec
from training.distill.student import Learner, Student, distillation_loss, student_inputs
from training.distill.teacher import files_of, weights_hash
from training.distill.views import Views
from training.errors import TrainingError
from training.fit.loop import follow


@dataclass
class TrainingState:
    """What a checkpoint holds; `best` is the averaged student of the lowest validation loss."""

    path: Path
    student: Learner
    averaged: Learner
    optimiser: torch.optim.Optimizer
    best: dict[str, Tensor]
    best_loss: float = float("inf")
    best_step: int = 0
    step: int = 0

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        if not self.path.exists():
            return
        saved = torch.load(self.path, weights_only=True)
        self.student.load_state_dict(saved["student"])
        self.averaged.load_state_dict(saved["averaged"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.best, self.best_loss = saved["best"], saved["best_loss"]
        self.best_step, self.step = saved["best_step"], saved["step"]

    def keep_if_best(self, loss: float) -> None:
        """Keep the averaged student if its validation loss is the lowest. Raises TrainingError if it is not finite."""
        if not math.isfinite(loss):
            what = f"the validation loss is {loss} at step {self.step:,}"
            raise TrainingError(f"training diverged: {what}. Lower train.learning_rate")
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self.best = copy.deepcopy(self.averaged.state_dict())

    def save(self) -> None:
        partial = self.path.with_suffix(".partial")
        torch.save(
            {
                "student": self.student.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "best": self.best,
                "best_loss": self.best_loss,
                "best_step": self.best_step,
                "step": self.step,
            },
            partial,
        )
        os.replace(partial, self.path)


def start_or_resume(recipe: DistillRecipe, views: Views, work: Path) -> TrainingState:
    """A fresh student, or the checkpoint of this recipe. The number of steps may differ."""
    torch.manual_seed(recipe.seed)
    sample = np.asarray(views.features[:: max(1, len(views.features) // 20_000)], np.float32)
    # A dimension that hardly ever fires must not outweigh the others.
    deviation = np.maximum(sample.std(axis=0), 0.1 * np.median(sample.std(axis=0)) + 1e-6)
    student = Student(
        3 if recipe.modality == "image" else 1,
        recipe.student.stem,
        recipe.student.widths,
        recipe.student.depths,
        torch.from_numpy(sample.mean(axis=0)),
        torch.from_numpy(deviation),
    )
    return resumed(recipe, student, work, {"steps", "threads", "validate_every", "checkpoint_every"})


def resumed(recipe: DistillRecipe, student: Learner, work: Path, free: set[str]) -> TrainingState:
    """A fresh student and its optimiser, or the checkpoint of its recipe; what is `free` of `train` may differ."""
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    matrices = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in student.parameters() if parameter.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.train.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.train.learning_rate,
    )
    work.mkdir(parents=True, exist_ok=True)
    averaged = copy.deepcopy(student)
    state = TrainingState(
        checkpoint_path(recipe, work, free), student, averaged, optimiser, copy.deepcopy(averaged.state_dict())
    )
    state.resume()
    return state


def checkpoint_path(recipe: DistillRecipe, work: Path, free: set[str]) -> Path:
    """Return a checkpoint's path, by a hash of all that matters to it; what is `free` of `train` does not.

    Its teacher's weights and its files, by name and size, matter too: another of them is another student.
    """
    no_matter: dict[str, Any] = {"train": free, "student": {"exported"}, "licence": True, "trained_on": True}
    identity = recipe.model_dump(mode="json", exclude=no_matter)
    root = recipe.data.root
    files = [[f"{path.relative_to(root)} {path.stat().st_size}" for path in part] for part in files_of(recipe)]
    parts = [identity, weights_hash(root / recipe.teacher.folder), files]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return work / f"{recipe.name}-{digest}.pt"


def train(recipe: DistillRecipe, state: TrainingState, views: Views, validation: Views) -> bool:
    """Train to the recipe's last step. True when it was reached; False after Ctrl-C, which keeps a checkpoint."""
    spec = recipe.train
    student, averaged = state.student, state.averaged
    with tqdm(total=spec.steps, initial=state.step, desc=recipe.name) as bar:
        try:
            while state.step < spec.steps:
                rows = batch_rows(len(views.inputs), spec.batch_size, state.step, recipe.seed)
                inputs = student_inputs(views.inputs[rows], recipe.preprocessing())
                target = torch.from_numpy(views.features[rows].astype(np.float32))
                for group in state.optimiser.param_groups:
                    group["lr"] = learning_rate(spec, state.step)
                student.train()
                with torch.autocast("cpu", torch.bfloat16, enabled=spec.bfloat16):
                    predicted = student.standardised(inputs)
                loss = distillation_loss(student, predicted, target, spec.cosine_weight)
                state.optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), 1.0)
                state.optimiser.step()
                follow(averaged, student, min(spec.ema, (1 + state.step) / (10 + state.step)))
                state.step += 1
                bar.update()
                if state.step % spec.validate_every == 0 or state.step == spec.steps:
                    figures = measure(averaged, validation, recipe)
                    tqdm.write(json.dumps({"step": state.step, "train_loss": round(loss.item(), 4), **figures}))
                    state.keep_if_best(figures["loss"])
                if state.step % spec.checkpoint_every == 0 or state.step == spec.steps:
                    state.save()
        except KeyboardInterrupt:
            state.save()
            tqdm.write(f"interrupted at step {state.step}; the same command goes on from {state.path}")
            return False
    return True


def batch_rows(total: int, size: int, step: int, seed: int) -> NDArray[np.int64]:
    """The rows of one step, from a fresh shuffle each epoch; a function of the step, so that a resumed run sees the
    batches that an uninterrupted one would."""
    size = min(size, total)
    each_epoch = total // size
    epoch, position = divmod(step, each_epoch)
    return _shuffled(total, seed, epoch)[position * size : (position + 1) * size]


@functools.lru_cache(maxsize=1)
def _shuffled(total: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(total)


def learning_rate(spec: TrainSpec, step: int) -> float:
    """Linear warm-up, then a half cosine down to 1 % of the peak; both once more from each restart on."""
    first, last, peak = 0, spec.steps, spec.learning_rate
    for restart in spec.restarts:
        if restart.at > step:
            last = restart.at
            break
        first, peak = restart.at, spec.learning_rate * restart.peak
    if step - first < spec.warmup_steps:
        return peak * (step - first + 1) / spec.warmup_steps
    progress = (step - first - spec.warmup_steps) / max(1, last - first - spec.warmup_steps)
    return float(peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * progress))))


@torch.no_grad()
@torch.inference_mode()
def measure(student: Learner, views: Views, recipe: DistillRecipe) -> dict[str, float]:
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


def best_student(state: TrainingState) -> Learner:
    student = copy.deepcopy(state.averaged)
    student.load_state_dict(state.best)
    return student.eval()
