"""Three kills of a real server; `make crash` does fifty."""

import json
from pathlib import Path

import pytest

from benchmarks.crash import Client, Findings, _judge, main


@pytest.mark.full
def test_nothing_acknowledged_is_lost(bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(bundle_dir), "--kills", "3"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.pop("acknowledged") > 0
    assert found == {"kills": 3, "lost": 0, "duplicates": 0, "half_written": 0, "strayed": 0}


@pytest.mark.parametrize(
    ("rows", "lost", "half_written"),
    [
        ({"a": 1, "b": 1}, 0, 0),
        ({"a": 2, "c": 2}, 0, 0),  # the batch was written, though nobody was told
        ({"a": 2, "b": 1}, 0, 1),
        ({"a": 1}, 0, 1),  # b is gone, as the batch would have it, and the rest is not done
        ({"a": 0, "b": 1}, 1, 0),
        ({"b": 1}, 1, 0),
    ],
)
def test_what_is_found_is_judged(rows: dict[str, int], lost: int, half_written: int) -> None:
    client = Client("x", acknowledged={"a": 1, "b": 1}, under_way={"a": 2, "b": None, "c": 2})
    findings = Findings()
    _judge(client, rows, findings)
    assert findings.half_written == half_written and (half_written or findings.lost == lost)
