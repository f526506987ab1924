"""One scenario of a second against a tiny bundle, by a real locust; the arithmetic on rows of its kind."""

import json
from pathlib import Path

import pytest

from benchmarks.capacity import SCENARIOS, main, summed, table


@pytest.mark.full
def test_a_scenario_is_measured(bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(bundle_dir), "--seconds", "2", "--only", "Searches"]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures["gpu"] is None and figures["Searches"]["failed"] == 0
    assert figures["Searches"]["inputs_s"] > 1 and 0 < figures["Searches"]["p50_ms"] <= figures["Searches"]["p99_ms"]
    assert lines[-2].endswith("not run")


def row(name: str, requests: int, failures: int = 0, times: dict[str, int] | None = None) -> dict[str, object]:
    stamps = {"start_time": 10.0, "last_request_timestamp": 20.0}
    return {"name": name, "num_requests": requests, "num_failures": failures, "response_times": times or {}} | stamps


def test_what_was_refused_is_no_answer() -> None:
    overload = SCENARIOS[-1]
    found = summed([row("/embed", 100, 5, {"10": 90, "200": 10}), row("/embed refused", 50, 0, {"1": 50})], overload)
    assert (found.answered, found.inputs, found.refused, found.failed) == (9.5, 76.0, 5.0, 5)
    assert (found.p50_ms, found.p99_ms) == (10.0, 200.0), "of what was accepted"
    assert "76.0" in table([found])


def test_every_scenario_is_one_of_the_load_file() -> None:
    text = (Path(__file__).parents[2] / "deploy/load/locustfile.py").read_text()
    assert all(f"class {each.name}(_User)" in text for each in SCENARIOS)
