"""The training loop by itself: rates, early stops, checkpoints of a few numbers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.errors import TrainingError
from training.fit.loop import Plan, Run, Task, begin, run, warm_cosine


class Line(Task):
    """Learns w towards 1; `scores` are what its judge says, one after another."""

    def __init__(self, scores: list[float]) -> None:
        self.model, self.scores, self.rates = nn.Linear(1, 1, bias=False), iter(scores), list[float]()
        self.state_of: Run | None = None

    def loss(self, step: int) -> Tensor:
        assert self.state_of is not None
        self.rates.append(self.state_of.optimiser.param_groups[0]["lr"])
        return (self.model.weight - 1).square().sum() * torch.rand(())

    def judge(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        score = next(self.scores)
        return score, {"x": score}


def line(path: Path, scores: list[float], signature: str = "a") -> tuple[Line, Run]:
    torch.manual_seed(0)
    task = Line(scores)
    task.state_of = begin(path, task.model, 0.0, signature)
    return task, task.state_of


def test_a_run_that_stops_early_ends_at_a_low_rate(tmp_path: Path) -> None:
    task, state = line(tmp_path / "c.pt", [1.0, 2.0] + [0.0] * 50)
    run(state, task, Plan(1000, lambda step: 0.1, validate_every=10, patience=3), "line")
    assert state.cooled_from == 50
    assert state.step == 60
    assert task.rates[:50] == [0.1] * 50
    assert task.rates[50:] == sorted(task.rates[50:], reverse=True)
    assert task.rates[-1] < 0.02
    assert state.best_step == 20


@pytest.mark.parametrize("average", [False, True])
def test_a_run_that_diverges_says_so_and_keeps_nothing_of_it(tmp_path: Path, average: bool) -> None:
    """Be it the loss of a step, the weights after the last one, or what the judge says."""
    for steps, rate, scores, what in (
        (20, 1e30, [1.0] * 9, "the loss or its gradient is not finite at step 11; the best so far is step 10"),
        (11, math.inf, [1.0] * 9, "a score or a weight is not finite at step 11; the best so far is step 10"),
        (10, 0.1, [math.nan] * 9, r"a score or a weight is not finite at step 10\. Lower the learning rate"),
    ):
        torch.manual_seed(0)
        task = Line(scores)
        task.state_of = state = begin(tmp_path / "c.pt", task.model, 0.0, average=average)
        plan = Plan(steps, lambda step, rate=rate: 0.1 if step < 10 else rate, 10, decay=lambda step: 0.5)  # type: ignore[misc]
        with pytest.raises(TrainingError, match=what):
            run(state, task, plan, "line")
        assert all(torch.isfinite(value).all() for value in state.best.values())


def test_without_patience_a_run_goes_on_to_its_last_step(tmp_path: Path) -> None:
    task, state = line(tmp_path / "c.pt", [1.0] + [0.0] * 50)
    run(state, task, Plan(200, lambda step: 0.1, validate_every=10), "line")
    assert state.step == 200
    assert state.cooled_from is None


def test_a_stop_while_the_rate_falls_changes_nothing(tmp_path: Path) -> None:
    scores, plan = [1.0] + [0.0] * 50, Plan(1000, lambda step: 0.1, validate_every=5, patience=2)
    task, whole = line(tmp_path / "whole.pt", scores)
    run(whole, task, plan, "line")
    task, cut = line(tmp_path / "cut.pt", scores[:3])
    with pytest.raises(StopIteration):  # its fourth validation
        run(cut, task, plan, "line")
    assert cut.cooled_from == 15
    torch.manual_seed(9)
    task, again = line(tmp_path / "cut.pt", scores[3:])
    again.resume(task)
    run(again, task, plan, "line")
    assert again.step == whole.step == 20
    assert torch.equal(again.model.state_dict()["weight"], whole.model.state_dict()["weight"])


def test_a_checkpoint_of_another_signature_is_left_alone(tmp_path: Path) -> None:
    task, state = line(tmp_path / "c.pt", [1.0] * 9)
    run(state, task, Plan(20, lambda step: 0.1, validate_every=10), "line")
    for signature, step in (("a", 20), ("b", 0)):
        task, other = line(tmp_path / "c.pt", [1.0], signature)
        other.resume(task)
        assert other.step == step


def test_random_state_of_gpus_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint on a machine with GPUs holds their random state, and takes it back."""
    given: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.tensor([1, 2], dtype=torch.uint8)])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.append)
    task, state = line(tmp_path / "c.pt", [1.0])
    state.save(task)
    state.resume(task)
    assert [tensor.tolist() for tensor in given[0]] == [[1, 2]]


def test_a_cosine_falls_to_where_it_is_told_and_can_move_by_epochs() -> None:
    rates = [warm_cosine(step, 100, 10, 1.0, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.1)
    held = [warm_cosine(step, 100, 10, 1.0, 0.1, hold=20) for step in range(100)]
    assert len({round(rate, 12) for rate in held[20:40]}) == 1
    assert held[20] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 0.2)).item()))
