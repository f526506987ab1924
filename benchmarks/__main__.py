"""Measure how fast and how steady the service is. Each part starts what it measures, and prints a table.

python -m benchmarks [--only NAME] [--resume] [--bundle build/starter] [--seconds 3] [--rounds 3] [--starts 5]
                     [--overload-minutes 1] [--soak-minutes 5]

The client is on the same machine and takes its share of the cores. What is compared takes turns, and a figure is the
median of the turns' ratios. The last line is one JSON object; what was not measured in this run is null. Each part's
figures are kept in build/bench/results.json: --resume takes them from there instead of measuring again.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from benchmarks.plan import Plan
from benchmarks.servers import BenchmarkError

Part = Callable[[Plan], dict[str, float | None]]

SCENARIOS = ("c1", "c16", "c64", "b32")
KEYS = (
    "http_over_raw.text",
    "http_over_raw.image",
    *(f"vs_infinity.text.{precision}.{scenario}" for precision in ("full", "fp32", "int8") for scenario in SCENARIOS),
    "vs_infinity.text.p50_c1",
    "vs_infinity.image",
    "vs_infinity.image.fp32",
    "added_latency_ms.text",
    "added_latency_ms.text.fp32",
    "overload.errors",
    "overload.p99_ratio",
    "overload.rss_growth",
    "soak.rss_growth",
    "soak.unanswered",
    "startup_s",
    "env_mb",
    "rss_mb",
    "index_over_bare_decode",
)
TARGETS: Mapping[str, tuple[str, float]] = {
    "http_over_raw.text": ("≥", 1.5),
    "http_over_raw.image": ("≥", 0.98),
    **{f"vs_infinity.text.full.{scenario}": ("≥", 2.0) for scenario in SCENARIOS},
    **{f"vs_infinity.text.fp32.{scenario}": ("≥", 1.5) for scenario in SCENARIOS},
    **{f"vs_infinity.text.int8.{scenario}": ("≥", 3.0) for scenario in SCENARIOS},
    "vs_infinity.text.p50_c1": ("≤", 0.25),
    "vs_infinity.image": ("≥", 7.0),
    "vs_infinity.image.fp32": ("≥", 3.0),
    "added_latency_ms.text": ("≤", 0.8),
    "added_latency_ms.text.fp32": ("≤", 1.0),
    "overload.errors": ("≤", 0),
    "overload.p99_ratio": ("≤", 2.0),
    "overload.rss_growth": ("≤", 0.02),
    "soak.rss_growth": ("≤", 0.02),
    "soak.unanswered": ("≤", 0),
    "startup_s": ("≤", 3.0),
    "env_mb": ("≤", 400),
    "rss_mb": ("≤", 300),
    "index_over_bare_decode": ("≥", 0.9),
}


# Where each is; imported when it is run, since one wants torch and another the tests' packages.
PARTS: Mapping[str, str] = {
    "startup": "footprint.startup",
    "env": "footprint.environment",
    "memory": "footprint.memory",
    "index": "first_run.index",
    "added_latency": "raw.added_latency",
    "http_over_raw": "raw.http_over_raw",
    "vs_infinity_text": "peers.texts",
    "vs_infinity_image": "peers.images",
    "overload": "stress.overload",
    "soak": "stress.soak",
}


def find(name: str) -> Part:
    module, _, function = PARTS[name].partition(".")
    part: Part = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    return part


def measure(
    plan: Plan,
    parts: Iterable[str],
    known: dict[str, dict[str, float | None]],
    find: Callable[[str], Part] = find,
) -> dict[str, float | None]:
    """Return all of KEYS; a part that cannot be measured says why, and leaves null. `known` takes what was measured."""
    figures: dict[str, float | None] = dict.fromkeys(KEYS)
    for name in parts:
        print(f"{name} …", flush=True)
        started = time.perf_counter()
        if name not in known:
            try:
                known[name] = find(name)(plan)
            except BenchmarkError as error:
                print(f"  not measured: {error}", flush=True)
                continue
            except Exception:  # the other parts take minutes each, and are not to blame
                traceback.print_exc()
                print("  not measured", flush=True)
                continue
        figures |= {key: value if value is None else round(value, 4) for key, value in known[name].items()}
        print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return figures


def table(figures: Mapping[str, float | None]) -> str:
    lines = [f"{'figure':34}{'measured':>12}  target"]
    for key, value in figures.items():
        sign, target = TARGETS[key]
        shown = "–" if value is None else f"{value:,.3f}"
        met = "" if value is None or (value >= target if sign == "≥" else value <= target) else "  not reached"
        lines.append(f"{key:34}{shown:>12}  {sign} {target:g}{met}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, help="one part")
    parser.add_argument("--resume", action="store_true", help="take from results.json the parts that are there")
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for what is made once, and results")
    parser.add_argument("--seconds", type=_positive, default=3.0, help="of each run of each contender")
    parser.add_argument("--rounds", type=_count, default=3, help="of turns")
    parser.add_argument("--starts", type=_count, default=5, help="of the server, for startup_s")
    parser.add_argument("--overload-minutes", type=_positive, default=1.0)
    parser.add_argument("--soak-minutes", type=_positive, default=5.0)
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    kept = json.loads(results.read_text()) if results.exists() else {}
    parts = [options.only] if options.only else list(PARTS)
    known = {name: kept[name] for name in parts if options.resume and name in kept}
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as scratch:
        plan = Plan(
            options.bundle.resolve(),
            folder,
            Path(scratch),
            seconds=options.seconds,
            rounds=options.rounds,
            overload_s=60 * options.overload_minutes,
            soak_s=60 * options.soak_minutes,
            starts=options.starts,
        )
        try:
            figures = measure(plan, parts, known)
        finally:
            results.write_text(json.dumps(kept | known, indent=1) + "\n")
    print(table(figures))
    print(json.dumps(figures))
    return 0


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise ValueError(text)
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
