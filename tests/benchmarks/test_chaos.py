"""A short form of `make chaos`: every fault, for a moment."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos


@pytest.mark.full
@pytest.mark.parametrize("fault", chaos.FAULTS)
def test_what_breaks_is_refused_or_answered_and_nothing_acknowledged_is_lost(bundle_dir: Path, fault: str) -> None:
    try:
        outcome = chaos.suffer(fault, bundle_dir, seconds=0.6)
    except chaos.LeftOut as reason:
        pytest.skip(str(reason))
    load = outcome.load
    wrong = [outcome.otherwise, load.unanswered, outcome.lost, outcome.crashed]
    assert wrong == [0] * 4, chaos.row(outcome) + outcome.log
    assert load.acknowledged and load.answers[200] > 0


def test_outcomes_are_judged() -> None:
    def outcome(recovered_s: float | None = 0.1, unnoticed: bool = False, overdrawn: int = 0, **given: Any) -> Any:
        fault = {name: given.pop(name, False) for name in ("cuts", "refuses")}
        load = chaos.Load(**{"answers": Counter({200: 5, 503: 2})} | given)
        return chaos.Outcome("x", load, 0, recovered_s, "", "", unnoticed=unnoticed, overdrawn=overdrawn, **fault)

    assert (outcome().otherwise, outcome().crashed) == (0, 0)
    assert outcome(answers=Counter({500: 3, 404: 1, 429: 2})).otherwise == 4
    assert outcome(unnoticed=True).otherwise == 2
    assert outcome(overdrawn=1).otherwise == 1 and "overdrawn" in chaos.row(outcome(overdrawn=1))
    assert outcome(recovered_s=None).crashed == 1
    assert outcome(cut=2, refused=1).crashed == 3
    assert outcome(cut=2, refused=1, refuses=True).crashed == 2
    assert outcome(cut=2, refused=1, cuts=True, refuses=True).crashed == 0
    assert "never" in chaos.row(outcome(recovered_s=None))
