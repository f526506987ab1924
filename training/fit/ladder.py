"""Train projectors on cached frozen features: one space for all modalities, the text projector shared.

`train` climbs a ladder: ridge and CCA (closed forms, seconds), a trained linear map (LiMBeR, arXiv 2209.15162), then
the head that the recipe asks for. A head that is not linear ships only if it beats all of them on validation.
`optimise` is the training loop of one rung. Under torchrun every process trains on the negatives of all.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from service.contract.bundle import Modality
from training.distributed import joined
from training.fit.alignment import FitError, new_heads, optimise
from training.fit.closed_form import cca, ridge
from training.fit.hubs import with_querybank
from training.heads.concepts import Named
from training.heads.projector import Head
from training.heads.trained import Trained
from training.measure.validation import Data, Heads, calibrate, means, overall, validate
from training.recipe import ProjectorSpec, Recipe

_CLOSED = {"ridge": ridge, "cca": cca}


@dataclass(frozen=True)
class _Rung:
    """One kind of head, as far as it got on validation."""

    kind: str
    score: float
    figures: Mapping[str, float]
    seconds: float
    trained: Trained
    note: str = ""


def train(
    recipe: Recipe,
    data: Data,
    work: Path,
    frozen: Mapping[Modality, Head] | None = None,
    names: Mapping[Modality, Named] | None = None,
) -> Trained:
    """Train one head per modality and return the best on validation; print how each kind of head did.

    Under torchrun the first process returns them; the others have done their share when they return.

    `frozen` heads belong to a space that is there already: they are aligned to, and left as they are. `names` are those
    of encoders with concepts: their heads have a branch for them, which the closed forms do not, and are not compared.

    Checkpoints in `work` are written at each validation; an interrupted run of the same recipe goes on from them and
    ends where an uninterrupted one would. Raises TrainingError.
    """
    spec, frozen, names = recipe.projector, frozen or {}, names or {}
    if joined().index:  # the first process alone compares and chooses
        if recipe.train.baseline and not spec.linear and _judged(data):
            optimise(_linear(recipe), data, work / "linear", frozen, names)
        if spec.closed:
            return Trained({}, recipe.train.temperature, {}, [])
        return optimise(recipe, data, work, frozen, names)
    if spec.closed:
        _check_room(recipe, data, frozen)
    judged = _judged(data)
    rungs: list[_Rung] = []
    for kind in ("ridge", "cca"):
        possible = not names and (not frozen or (kind == "ridge" and "text" in frozen))
        if kind == spec.kind or (recipe.train.baseline and judged and possible):
            rungs.append(_closed(kind, recipe, data, frozen))
    if recipe.train.baseline and judged and not spec.linear:
        rungs.append(_descended(_linear(recipe), data, work / "linear", frozen, names))
    if not spec.closed:
        rungs.append(_descended(recipe, data, work, frozen, names))
    asked = next(rung for rung in rungs if rung.kind == spec.kind)
    won = asked
    if not spec.linear:
        # Ties go to the simpler head: max keeps the first of equals, and the wanted one is the last.
        won = max(rungs, key=lambda rung: rung.score)
    _print(rungs, won)
    ladder: dict[str, Any] = {"head.won": won.kind}
    ladder |= {f"head.{rung.kind}": round(rung.score, 3) for rung in rungs}
    trained = replace(won.trained, history=asked.trained.history, ladder=ladder | won.trained.ladder)
    # A frozen text head keeps the banks that it has.
    return with_querybank(recipe, trained, data, names) if spec.querybank and "text" not in frozen else trained


def _judged(data: Data) -> bool:
    return any(len(splits["validation"].pairs.media) for splits in data.values())


def _closed(kind: str, recipe: Recipe, data: Data, frozen: Mapping[Modality, Head]) -> _Rung:
    """A closed form with the penalty that is best on validation; without a validation split, the middle one."""
    started = time.monotonic()
    fill: Callable[..., Iterator[float]] = _CLOSED[kind]
    heads = new_heads(recipe, data, frozen, recipe.projector.model_copy(update={"kind": kind}))
    for head in heads.values():
        head.eval().requires_grad_(False)
    best, best_figures, best_state, chosen = -np.inf, dict[str, float](), {}, 0.0
    for index, penalty in enumerate(fill(recipe, heads, data, frozen)):
        figures = validate(recipe, heads, data)
        score = overall(figures) if figures else -abs(index - 2.0)
        if score > best:
            best, best_figures, chosen = score, figures, penalty
            best_state = {m: {k: v.clone() for k, v in head.state_dict().items()} for m, head in heads.items()}
    for modality, head in heads.items():
        head.load_state_dict(best_state[modality])
    history = [{"step": 0, "score": round(best, 3), **best_figures}]
    temperature = calibrate(recipe, heads, data, recipe.train.temperature)
    trained = Trained(heads, temperature, means(heads, data), history)
    return _Rung(kind, best, best_figures, time.monotonic() - started, trained, f"λ {chosen:g}")


def _descended(
    recipe: Recipe, data: Data, work: Path, frozen: Mapping[Modality, Head], names: Mapping[Modality, Named]
) -> _Rung:
    started = time.monotonic()
    trained = optimise(recipe, data, work, frozen, names)
    top = max(trained.history, key=lambda entry: entry["score"])
    figures = {name: top[name] for name in data if name in top}
    seconds, note = time.monotonic() - started, f"step {top['step']:,.0f}"
    return _Rung(recipe.projector.kind, top["score"], figures, seconds, trained, note)


def _linear(recipe: Recipe) -> Recipe:
    """The recipe with a linear head instead of its own, for no more than `baseline_steps`."""
    spec = recipe.train
    steps = min(spec.steps, spec.baseline_steps)
    bounded = spec.model_copy(
        update={
            "steps": steps,
            "epochs": None,
            "warmup_steps": min(spec.warmup_steps, max(1, steps // 8)),
            "start": None,
        }
    )
    linear: ProjectorSpec = recipe.projector.model_copy(update={"kind": "linear"})
    return recipe.model_copy(update={"projector": linear, "train": bounded})


def _check_room(recipe: Recipe, data: Data, frozen: Heads) -> None:
    if "text" in frozen:
        return
    width = min(splits["train"].texts.pooled.shape[1] for splits in data.values())
    if recipe.projector.inner > width:
        raise FitError(
            f"projector.dimensions is {recipe.projector.inner}, and {recipe.projector.kind} fills no more than "
            f"the {width} of the text features"
        )


def _print(rungs: list[_Rung], won: _Rung) -> None:
    if len(rungs) < 2:
        return
    names = list(rungs[0].figures)
    header = "".join(f"{name:>14}" for name in names)
    print(f"{'head':12}{'validation':>12}{header}{'seconds':>10}  best at", file=sys.stderr)
    for rung in rungs:
        columns = "".join(f"{rung.figures.get(name, float('nan')):>14.2f}" for name in names)
        mark = "  ← ships" if rung is won else ""
        print(f"{rung.kind:12}{rung.score:>12.2f}{columns}{rung.seconds:>10.1f}  {rung.note}{mark}", file=sys.stderr)
