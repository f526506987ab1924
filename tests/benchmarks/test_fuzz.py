"""A short form of `make fuzz`."""

import json
from pathlib import Path

import pytest

from benchmarks import fuzz


@pytest.mark.full
def test_the_service_does_what_its_specification_says(bundle_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--bundle", str(bundle_dir), "--examples", "3", "--files", "1000"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["tried"] > 2_000 and found["refused_as_documented"] > 300
    assert found["drifts"] == found["crashed"] == found["lost"] == found["unanswered"] == 0


def test_what_a_wrapper_should_not_let_through_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(data: bytes) -> None:
        raise IndexError

    monkeypatch.setattr(fuzz, "_read", broken)
    findings = fuzz.Findings()
    fuzz.files(7, 0, findings)
    assert findings.crashed == findings.bad == 7
