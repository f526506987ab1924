"""A short form of `make chaos`: every fault, for a moment."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks import chaos


@pytest.mark.full
@pytest.mark.parametrize("fault", chaos.FAULTS)
def test_what_breaks_is_refused_or_answered_and_nothing_acknowledged_is_lost(bundle_dir: Path, fault: str) -> None:
    try:
        outcome = chaos.suffer(fault, bundle_dir, seconds=0.6)
    except chaos.LeftOut as reason:
        pytest.skip(str(reason))
    assert outcome.otherwise == outcome.unanswered == outcome.lost == outcome.crashed == 0, (
        chaos.row(outcome) + outcome.log
    )
    assert outcome.acknowledged > 0 and outcome.answers[200] > 0


def test_outcomes_are_judged() -> None:
    def outcome(fault: str = "x", cuts: bool = False, refuses: bool = False, **given: object) -> chaos.Outcome:
        known = {"answers": Counter({200: 5, 503: 2}), "cut": 0, "refused": 0, "unanswered": 0, "acknowledged": 1}
        known |= {"lost": 0, "recovered_s": 0.1, "said": "", "log": "", "cuts": cuts, "refuses": refuses}
        return chaos.Outcome(fault, **known | given)  # type: ignore[arg-type]

    assert (outcome().otherwise, outcome().crashed) == (0, 0)
    assert outcome(answers=Counter({500: 3, 404: 1, 429: 2})).otherwise == 4
    assert outcome(unnoticed=True).otherwise == 2
    assert outcome(overdrawn=1).otherwise == 1 and "overdrawn" in chaos.row(outcome(overdrawn=1))
    assert outcome(recovered_s=None).crashed == 1
    assert outcome(cut=2, refused=1).crashed == 3
    assert outcome(cut=2, refused=1, refuses=True).crashed == 2
    assert outcome(cut=2, refused=1, cuts=True, refuses=True).crashed == 0
    assert "never" in chaos.row(outcome(recovered_s=None))
