"""Which session options make a bundle's towers fast? Each option against what the service uses, in turns.

python -m benchmarks.sessions [--bundle build/starter] [--rounds 7] [--only VARIED ...]

Alone: one tower's calls, one after the other. Shared: every tower has a thread of its own that calls it without a
pause, as in a service that is asked for everything at once; the figure is the geometric mean of the towers' rates.
A ratio above 1 says that the option is faster than `service/engine/towers.py`. Prints a table and, as its last line,
one JSON object: medians of the rounds' ratios, and the instructions of this processor that matter to int8.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from service.contract.bundle import OUTPUT, Bundle, BundleError, Modality, Precision, read_bundle
from service.engine.handling import handling
from service.engine.towers import session_options
from service.settings import read_settings

_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16", "avx512_bf16")
_SHARED_S = 1.0
_ROWS = {"image": (1, 8), "audio": (1, 4), "text": (1, 16)}

Change = Callable[[onnxruntime.SessionOptions], None]
Feeds = Mapping[str, Any]


def _entry(key: str, value: str) -> Change:
    return lambda options: options.add_session_config_entry(key, value)


def _set(name: str, value: Any) -> Change:
    return lambda options: setattr(options, name, value)


CHANGES: Mapping[str, Change] = {
    "as it is": lambda options: None,
    "spinning": _entry("session.intra_op.allow_spinning", "1"),
    "one thread": _set("intra_op_num_threads", 1),
    "two threads": _set("intra_op_num_threads", 2),
    "no arena": _set("enable_cpu_mem_arena", False),
    "no memory pattern": _set("enable_mem_pattern", False),
    "parallel": _set("execution_mode", onnxruntime.ExecutionMode.ORT_PARALLEL),
    "extended only": _set("graph_optimization_level", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED),
    "flush denormals": _entry("session.set_denormal_as_zero", "1"),
}


def instructions() -> list[str]:
    """Those of this processor that int8 and fp16 products use, as Linux names them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return [name for name in _INSTRUCTIONS if name in flags]


def opened(bundle: Bundle, modality: Modality, precision: Precision, change: Change) -> onnxruntime.InferenceSession:
    options = session_options(0)
    change(options)
    path = bundle.tower_path(modality, precision)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(bundle: Bundle, modality: Modality, rows: int) -> Feeds:
    """The canary, so many times: what a call takes does not depend on what is in the arrays, but on their shapes."""
    how = handling(bundle, modality, read_settings())
    return how.collate([how.canary.value] * rows)


def seconds(session: onnxruntime.InferenceSession, given: Feeds, calls: int) -> float:
    """Median of one call."""
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        session.run([OUTPUT], dict(given))
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def shared(sessions: Mapping[Modality, onnxruntime.InferenceSession], given: Mapping[Modality, Feeds]) -> float:
    """Calls per second with every tower at work at once: the geometric mean over the towers."""
    counts = dict.fromkeys(sessions, 0)
    ends = time.perf_counter() + _SHARED_S

    def work(modality: Modality) -> None:
        while not counts[modality] or time.perf_counter() < ends:
            sessions[modality].run([OUTPUT], dict(given[modality]))
            counts[modality] += 1

    threads = [threading.Thread(target=work, args=(modality,)) for modality in sessions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return float(np.exp(np.mean([np.log(count / _SHARED_S) for count in counts.values()])))


def measure(bundle: Bundle, names: list[str], rounds: int) -> dict[str, float]:
    """Medians over the rounds of `case.option`: how many times as fast as the service's own options."""
    towers = bundle.manifest.towers
    ratios: dict[str, list[float]] = {}
    precisions = {modality: tower.default("cpu") for modality, tower in towers.items()}
    few = {modality: feeds(bundle, modality, _ROWS[modality][0]) for modality in towers}
    many = {modality: feeds(bundle, modality, _ROWS[modality][1]) for modality in towers}
    sessions = {
        name: {modality: opened(bundle, modality, precisions[modality], CHANGES[name]) for modality in towers}
        for name in dict.fromkeys(["as it is", *names])
    }
    for each in sessions.values():
        for modality, session in each.items():
            seconds(session, many[modality], 1)
    for _ in range(rounds):
        got: dict[str, dict[str, float]] = {}
        for name, each in sessions.items():
            for modality, session in each.items():
                got.setdefault(f"{modality}.one", {})[name] = 1 / seconds(session, few[modality], 5)
                got.setdefault(f"{modality}.many", {})[name] = 1 / seconds(session, many[modality], 3)
            if len(each) > 1:
                got.setdefault("shared", {})[name] = shared(each, many)
        for case, rates in got.items():
            for name, rate in rates.items():
                ratios.setdefault(f"{case}.{name.replace(' ', '_')}", []).append(rate / rates["as it is"])
    return {key: round(float(np.median(values)), 3) for key, values in ratios.items()}


def precisions(bundle: Bundle, rounds: int) -> dict[str, float]:
    """How many times as fast as fp32 each tower's other precisions are, by rows of a call."""
    figures: dict[str, float] = {}
    for modality, tower in bundle.manifest.towers.items():
        sessions = {p: opened(bundle, modality, p, CHANGES["as it is"]) for p in tower.precisions}
        for rows in _ROWS[modality]:
            given = feeds(bundle, modality, rows)
            turns = [{p: seconds(session, given, 5) for p, session in sessions.items()} for _ in range(rounds)]
            own = tower.precision
            figures[f"{modality}.{own}.rows_{rows}.ms"] = round(1e3 * float(np.median([t[own] for t in turns])), 3)
            for precision in tower.variants:
                ratio = float(np.median([turn[own] / turn[precision] for turn in turns]))
                figures[f"{modality}.{precision}.rows_{rows}.speedup"] = round(ratio, 3)
    return figures


def table(figures: Mapping[str, float]) -> str:
    cases = list(dict.fromkeys(key.rpartition(".")[0] for key in figures))
    names = list(dict.fromkeys(key.rpartition(".")[2] for key in figures))
    lines = [f"{'option':20}" + "".join(f"{case:>13}" for case in cases)]
    for name in names:
        lines.append(f"{name:20}" + "".join(f"{figures.get(f'{case}.{name}', float('nan')):>13.3f}" for case in cases))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sessions", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="*", choices=[name for name in CHANGES if name != "as it is"])
    options = parser.parse_args(arguments)
    try:
        bundle = read_bundle(options.bundle)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    smaller = precisions(bundle, options.rounds)
    for key, value in smaller.items():
        print(f"{key:32}{value:>10.3f}")
    wanted = [name for name in CHANGES if name != "as it is"] if options.only is None else options.only
    ratios = measure(bundle, wanted, options.rounds)
    print(table(ratios))
    machine = {"cores": len(os.sched_getaffinity(0)), "instructions": instructions()}
    print(json.dumps(machine | {"onnxruntime": onnxruntime.__version__} | smaller | ratios))
    return 0


if __name__ == "__main__":
    sys.exit(main())
