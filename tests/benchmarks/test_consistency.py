"""A few searches of each kind; `make consistency` does 20,000."""

import json
from pathlib import Path

import pytest

from benchmarks.consistency import KINDS, Operation, judge, main


@pytest.mark.full
def test_every_search_has_its_place_among_the_writes(bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(bundle_dir), "--searches", "15"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.pop("operations") > 0 and found.pop("writes_per_s") > 0
    assert found == {"searches": 15 * len(KINDS), "missing": 0, "stale": 0, "resurrected": 0, "phantom": 0}


def history(*operations: tuple[str, int | None, float, float]) -> list[Operation]:
    return [Operation("a", kind == "write", value, begun, ended) for kind, value, begun, ended in operations]


@pytest.mark.parametrize(
    ("operations", "wrong"),
    [
        ([("write", 1, 0, 1), ("read", 1, 2, 3)], {}),
        ([("write", 1, 0, 3), ("read", None, 1, 2), ("read", 1, 2.5, 4)], {}),
        ([("write", 1, 0, 9), ("write", 2, 0, 9), ("read", 2, 1, 2), ("read", 1, 3, 4), ("read", 1, 5, 6)], {}),
        ([("write", 1, 0, 1), ("read", None, 2, 3)], {"missing": 1}),
        ([("write", 1, 0, 1), ("write", 2, 2, 3), ("read", 1, 4, 5), ("read", 2, 4, 5)], {"stale": 1}),
        # Both writes are under way, and yet what one search found, no later one has back.
        (
            [("write", 1, 0, 9), ("write", 2, 0, 9), ("read", 1, 1, 2), ("read", 2, 3, 4), ("read", 1, 5, 6)],
            {"stale": 1},
        ),
        ([("write", 1, 0, 1), ("write", None, 2, 3), ("read", 1, 4, 5)], {"resurrected": 1}),
        ([("write", 1, 0, 1), ("write", None, 2, 5), ("read", 1, 3, 4), ("read", None, 3, 6)], {}),
        ([("read", 7, 0, 1)], {"phantom": 1}),
        ([("read", 1, 0, 1), ("write", 1, 2, 3)], {"phantom": 1}),
    ],
)
def test_a_history_is_judged(operations: list[tuple[str, int | None, float, float]], wrong: dict[str, int]) -> None:
    assert judge(history(*operations)) == wrong
