"""Does each protocol answer the programs that speak it, as they are?

python -m benchmarks.protocols

Runs the tests that are marked with a client (tests/protocols), each against a live server with the real client, and
prints for each protocol and client its version, the cases tried and those passed. `golden` are request and answer
shapes from the source of a program that is not a package. The last line is one JSON object; `skipped` counts the
clients that could not be installed beside the others.
"""

import json
import sys
from collections import Counter
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[1] / "tests/protocols"


class Cases:
    """A plugin of pytest: runs the cases of clients alone, and counts how each ends."""

    def __init__(self) -> None:
        self.versions: dict[tuple[str, str], str] = {}
        """Cases by protocol and client."""
        self.passed: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[tuple[str, str]] = Counter()
        self.skipped: dict[tuple[str, str], str] = {}
        """Why a client was not tried."""
        self._of: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for item in items:
            mark = item.get_closest_marker("client")
            if mark is not None:
                case = (item.path.stem.split("_")[1], str(mark.args[0]))
                self._of[item.nodeid] = case
                self.versions[case] = mark.kwargs.get("version") or _version(case[1])
        items[:] = [item for item in items if item.nodeid in self._of]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case = self._of[report.nodeid]
        if report.failed:
            self.failed[case] += 1
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[case] = why.removeprefix("Skipped: ")
        elif report.when == "call":
            self.passed[case] += 1


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "—"


def main() -> int:
    """Print the table, what was skipped and why, and the figures; 1 where a case failed."""
    cases = Cases()
    with redirect_stdout(sys.stderr):
        code = pytest.main(["-q", "-p", "no:cacheprovider", str(_FOLDER)], plugins=[cases])
    print("| protocol | client | version | cases | passed |\n|---|---|---|---:|---:|")
    for case in sorted(cases.versions):
        tried = cases.passed[case] + cases.failed[case]
        if tried:
            print(f"| {case[0]} | {case[1]} | {cases.versions[case]} | {tried} | {cases.passed[case]} |")
    absent = {case: why for case, why in cases.skipped.items() if not cases.passed[case] + cases.failed[case]}
    for (protocol, client), why in sorted(absent.items()):
        print(f"not tried: {client} ({protocol}): {' '.join(why.split())}")
    failed = cases.failed.total()
    figures = {
        "protocols": len({protocol for protocol, _ in cases.versions}),
        "cases": cases.passed.total() + failed,
        "failed": failed,
        "skipped": len(absent),
    }
    print(json.dumps(figures))
    return 1 if failed or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else 0


if __name__ == "__main__":
    sys.exit(main())
