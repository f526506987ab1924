"""The training loop of alignment: step, judge, keep the best, save, go on after a stop.

`run` reads top to bottom. What is learned and how it is judged is a Task; how long and how fast is a Plan; what a
checkpoint holds is a Run.
"""

import copy
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training.distributed import ALONE, Ranks
from training.errors import TrainingError

Figures = dict[str, float]


class Task(ABC):
    """The weights and the loss that a run learns."""

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """This process's share of the loss of one step, with its graph."""

    @abstractmethod
    def judge(self, model: nn.Module) -> tuple[float, Figures]:
        """Return the score of the weights on validation, the higher the better, and the figures behind it."""

    def after_step(self) -> None:  # noqa: B027
        """Restore what must hold after each change of the weights."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs to draw the next step as an uninterrupted run would."""
        return {}

    def restore(self, saved: dict[str, Any]) -> None:  # noqa: B027
        """Take back what `state` gave."""

    def report(self, entry: Figures) -> None:  # noqa: B027
        """Tell what one validation found."""

    @property
    def waited_s(self) -> float:
        """Seconds that steps have waited for their inputs so far."""
        return 0.0


@dataclass(frozen=True)
class Plan:
    """The length of a run, its rates, and the steps at which it is judged."""

    steps: int
    rate: Callable[[int], float]
    """The learning rate of a step."""
    validate_every: int
    save_every: int | None = None
    """Steps between checkpoints; None: one at each validation."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    decay: Callable[[int], float] | None = None
    """The decay at a step of the moving average of the weights, which is judged and kept in their place; None: none."""
    patience: int | None = None
    """Validations without a gain after which the rate falls to zero over a tenth of the steps so far, and the run ends:
    weights that are left at a high rate are worse than the same weights after it has fallen."""


@dataclass
class Run:
    """The content of a checkpoint. One whose `signature`, a hash of what the weights depend on, differs is not used."""

    path: Path
    model: nn.Module
    optimiser: torch.optim.Optimizer
    signature: str = ""
    averaged: nn.Module | None = None
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float = -math.inf
    best_step: int = 0
    step: int = 0
    stale: int = 0
    cooled_from: int | None = None
    """The step from which the rate falls to zero, once patience has run out."""
    history: list[Figures] = field(default_factory=list)
    step_s: float = math.nan
    """Seconds of a step, validations apart; and the share of them that it waited for its inputs."""
    host_share: float = math.nan

    _PLAIN = ("best", "best_score", "best_step", "step", "stale", "cooled_from", "history")

    def resume(self, task: Task, ranks: Ranks = ALONE) -> None:
        """Go on from the checkpoint, if there is one of this signature."""
        if not self.path.is_file():
            return
        saved = torch.load(self.path, weights_only=True, map_location="cpu")
        if saved.get("signature") != self.signature:
            return
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        if self.averaged is not None:
            self.averaged.load_state_dict(saved["averaged"])
        for name in self._PLAIN:
            setattr(self, name, saved[name])
        task.restore(json.loads(saved["task"]))
        random = saved["random"][ranks.index]
        torch.set_rng_state(random["cpu"])
        if torch.cuda.is_available() and random["cuda"]:
            torch.cuda.set_rng_state_all(random["cuda"])

    def save(self, task: Task, ranks: Ranks = ALONE) -> None:
        """Write the checkpoint, whole or not at all; the random state of every process is in it."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        random = ranks.collect({"cpu": torch.get_rng_state(), "cuda": cuda})
        if ranks.index:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        state = {
            "signature": self.signature,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged is not None else {},
            "task": json.dumps(task.state()),
            "random": random,
        }
        torch.save(state | {name: getattr(self, name) for name in self._PLAIN}, partial)
        partial.replace(self.path)


def begin(path: Path, model: nn.Module, weight_decay: float, signature: str = "", average: bool = False) -> Run:
    """A run at its start, with AdamW and, where asked for, a moving average of the weights."""
    optimiser = torch.optim.AdamW(groups(model, weight_decay))
    return Run(path, model, optimiser, signature, copy.deepcopy(model) if average else None)


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for an optimiser: no weight decay on biases, norms and scales."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def run(state: Run, task: Task, plan: Plan, name: str, ranks: Ranks = ALONE) -> None:
    """Train to the last step. A run that goes on from its checkpoint ends with the weights of one never stopped.

    Raises TrainingError where the loss, its gradient or a score is not finite: such weights are never kept.
    """
    first, began, judging, waited = state.step, time.perf_counter(), 0.0, task.waited_s
    with tqdm(total=plan.steps, initial=first, desc=name, unit="step", disable=ranks.index > 0 or None) as bar:
        while state.step < (end := _end(state, plan)):
            loss = _step(state, task, plan, end, ranks)
            bar.update(1)
            last = state.step == end
            if state.step % plan.validate_every == 0 or last:
                at = time.perf_counter()
                entry = _validate(state, task, plan, loss, ranks)
                bar.set_postfix(score=f"{entry['score']:.2f}", waits=f"{_share(task, waited, began, judging):.0%}")
                judging += time.perf_counter() - at
                if plan.save_every is None:
                    state.save(task, ranks)
            if plan.save_every is not None and (state.step % plan.save_every == 0 or last):
                state.save(task, ranks)
    if state.step > first:
        state.step_s = (time.perf_counter() - began - judging) / (state.step - first)
        state.host_share = _share(task, waited, began, judging)


def _share(task: Task, waited: float, began: float, judging: float) -> float:
    return (task.waited_s - waited) / max(1e-9, time.perf_counter() - began - judging)


def _end(state: Run, plan: Plan) -> int:
    if state.cooled_from is None:
        return plan.steps
    return min(plan.steps, state.cooled_from + max(plan.validate_every, state.cooled_from // 10))


def _step(state: Run, task: Task, plan: Plan, end: int, ranks: Ranks) -> float:
    rate = plan.rate(state.step)
    if state.cooled_from is not None:
        rate = min(rate, plan.rate(state.cooled_from) * (end - state.step) / (end - state.cooled_from + 1))
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.model.train()
    loss = task.loss(state.step)
    state.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    parameters = list(state.model.parameters())
    ranks.sum_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, plan.clip)  # of the sum: the same in every process
    _check_finite(state, "the loss or its gradient", loss.detach(), norm)
    state.optimiser.step()
    task.after_step()
    if state.averaged is not None and plan.decay is not None:
        follow(state.averaged, state.model, plan.decay(state.step))
    state.step += 1
    return loss.item()


def _validate(state: Run, task: Task, plan: Plan, loss: float, ranks: Ranks) -> Figures:
    """Judge the weights, or their average; keep what is best; count what is no gain."""
    kept = state.model if state.averaged is None else state.averaged
    # The first process judges for all of them.
    score, figures = ranks.agree(task.judge(kept) if ranks.index == 0 else None)
    entry = {"step": state.step, "loss": round(sum(ranks.collect(loss)), 4), "score": round(score, 3)} | figures
    _check_finite(state, "a score or a weight", torch.tensor(score), *kept.state_dict().values())
    # Without anything to judge by, the last weights are kept.
    gained = score > state.best_score or not figures
    state.stale = 0 if gained else state.stale + 1
    if gained:
        state.best = {key: value.detach().clone() for key, value in kept.state_dict().items()}
        state.best_score, state.best_step = score, state.step
    elif plan.patience is not None and state.stale >= plan.patience and state.cooled_from is None:
        state.cooled_from = state.step
    state.history.append(entry)
    if ranks.index == 0:
        task.report(entry)
    return entry


def _check_finite(state: Run, what: str, *values: Tensor) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        best = f"; the best so far is step {state.best_step:,}" if state.best else ""
        raise TrainingError(
            f"training diverged: {what} is not finite at step {state.step:,}{best}. Lower the learning rate, or let it "
            "rise over more steps of warm-up"
        )


@torch.no_grad()
def follow(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """Exponential moving average of weights and of statistics, in place."""
    for old, new in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)


def warm_cosine(step: int, steps: int, warmup: int, peak: float, lowest: float = 0.0, hold: int = 1) -> float:
    """The rate of a step: linear warm-up, then a half cosine from `peak` to `lowest`.

    The cosine moves every `hold` steps, as one that is set once an epoch does.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step // hold * hold if hold > 1 else step - warmup) / max(1, steps if hold > 1 else steps - warmup)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
