"""Measure what one core serves: the scenarios of deploy/load/locustfile.py against a server with a core to itself.

python -m benchmarks.capacity [--seconds 15] [--bundle build/starter] [--only Texts]

The server is pinned to the last core, locust to the others; the cache is off. Prints a table and, as its last line, one
JSON object. On a machine with one core the two share it, and the figures are lower. A GPU is not looked for:
`python -m benchmarks.gpu` measures one.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.commands import finish, parser_of
from benchmarks.servers import BenchmarkError, Server, isthmus

LOCUSTFILE = Path(__file__).parents[1] / "deploy/load/locustfile.py"
_ITEMS, _PAGE = 10_000, 250


@dataclass(frozen=True)
class Scenario:
    name: str
    clients: int
    inputs: int
    """The inputs of one request."""
    what: str


SCENARIOS = (
    Scenario("Texts", 16, 1, "texts of 12 words, embedded"),
    Scenario("Photographs", 16, 1, "photographs (320 × 240 JPEG), embedded"),
    Scenario("Sounds", 16, 1, "sounds of 2 s (WAV), embedded"),
    Scenario("Labels", 16, 1, "photographs, labelled with 8 labels"),
    Scenario("Searches", 16, 1, "searches among 10,000 items, one request in ten a write"),
    Scenario("Overload", 256, 8, "texts, 8 a request, from 256 clients at once"),
)


@dataclass(frozen=True)
class Measured:
    scenario: Scenario
    answered: float
    """Requests in a second."""
    refused: float
    failed: int
    p50_ms: float
    p99_ms: float

    @property
    def inputs(self) -> float:
        return self.answered * self.scenario.inputs


def pinned(command: Sequence[str], cores: Sequence[int]) -> list[str]:
    return ["taskset", "-c", ",".join(map(str, cores)), *command]


def cores() -> tuple[list[int], list[int]]:
    """The server's one, and locust's: the others, or the same where there is no other."""
    *others, last = sorted(os.sched_getaffinity(0))
    return [last], others or [last]


def fill(server: Server) -> None:
    """Items to search among, as vectors of nobody."""
    rng = np.random.default_rng(0)
    with httpx2.Client(base_url=server.address, timeout=60, trust_env=False) as http:
        size = http.get("/models").raise_for_status().json()["models"][0]["dimensions"]
        for start in range(0, _ITEMS, _PAGE):
            vectors = rng.standard_normal((_PAGE, size)).tolist()
            items = [{"id": f"v{start + place}", "vector": vector} for place, vector in enumerate(vectors)]
            http.post("/items", json={"items": items}).raise_for_status()


def load(server: Server, scenario: Scenario, seconds: float, where: Sequence[int]) -> Measured:
    """Runs locust once. Raises BenchmarkError where it says nothing."""
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--json", "--skip-log"]
    command += ["--host", server.address, "-u", str(scenario.clients), "-r", str(scenario.clients)]
    command += ["-t", f"{seconds:g}s", "--reset-stats", "--stop-timeout", "30", scenario.name]
    done = subprocess.run(pinned(command, where), capture_output=True, text=True, check=False)
    start = done.stdout.find("[")
    if start < 0:
        raise BenchmarkError(f"locust ended with {done.returncode}: {done.stderr[-500:]}")
    return summed(json.loads(done.stdout[start:]), scenario)


def summed(rows: Sequence[dict[str, Any]], scenario: Scenario) -> Measured:
    """Locust's rows, one for each name of a request, as one figure."""
    accepted = [row for row in rows if not row["name"].endswith("refused")]
    began = min(row["start_time"] for row in rows)
    lasted = max(row["last_request_timestamp"] for row in rows) - began
    times: Counter[float] = Counter()
    for row in accepted:
        times.update({float(response_ms): count for response_ms, count in row["response_times"].items()})
    taken = np.repeat(list(times), list(times.values()))
    p50, p99 = np.percentile(taken, (50, 99)) if len(taken) else (0.0, 0.0)
    failed = sum(row["num_failures"] for row in rows)
    answered = sum(row["num_requests"] for row in accepted) - failed
    refused = sum(row["num_requests"] for row in rows) - answered - failed
    return Measured(scenario, answered / lasted, refused / lasted, failed, float(p50), float(p99))


def table(measured: Sequence[Measured]) -> str:
    lines = [
        f"{'what':58}{'one core':>12}{'p50':>9}{'p99':>9}{'refused':>10}{'failed':>8}{'one GPU':>10}",
        f"{'':58}{'a second':>12}{'ms':>9}{'ms':>9}{'a second':>10}{'':>8}{'':>10}",
    ]
    for row in measured:
        figures = f"{row.inputs:12.1f}{row.p50_ms:9.0f}{row.p99_ms:9.0f}{row.refused:10.1f}{row.failed:8}"
        lines.append(f"{row.scenario.what:58}{figures}{'not run':>10}")
    return "\n".join(lines)


def measure(bundle: Path, seconds: float, only: Sequence[str]) -> list[Measured]:
    if shutil.which("taskset") is None:
        raise BenchmarkError("taskset is not installed")
    mine, others = cores()
    chosen = [scenario for scenario in SCENARIOS if not only or scenario.name in only]
    before = os.sched_getaffinity(0)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        # The server inherits this process's cores at its start, and keeps them.
        os.sched_setaffinity(0, mine)
        try:
            with isthmus("isthmus", bundle, Path(folder) / "store", cache_bytes=0) as server:
                os.sched_setaffinity(0, before)
                if any(scenario.name == "Searches" for scenario in chosen):
                    fill(server)
                measured = [load(server, scenario, seconds, others) for scenario in chosen]
        finally:
            os.sched_setaffinity(0, before)
    return measured


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("capacity", __doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each scenario")
    parser.add_argument(
        "--only", nargs="*", default=[], choices=[scenario.name for scenario in SCENARIOS], metavar="SCENARIO"
    )
    options = parser.parse_args(arguments)
    measured = measure(options.bundle, options.seconds, options.only)
    print(table(measured))
    figures = {
        row.scenario.name: {
            "inputs_s": round(row.inputs, 1),
            "p50_ms": row.p50_ms,
            "p99_ms": row.p99_ms,
            "refused_s": round(row.refused, 1),
            "failed": row.failed,
        }
        for row in measured
    }
    print(json.dumps({"cores": 1, "gpu": None} | figures))
    return int(any(row.failed for row in measured))


if __name__ == "__main__":
    finish(main)
