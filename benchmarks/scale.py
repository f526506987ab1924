"""Measures what training on millions of pairs takes: `python -m benchmarks.scale --pairs 2000000` (or `--tokens`).

Synthetic features of the paper's widths in the feature store, as float16: pictures (N, 2048), CLS and mean of DINOv2-L
side by side, and captions (N, 1024); with `--tokens`, 324 and about 16 local vectors of 1,024 too. Heads learn on them
as `python -m training train` does, in one process and in two, and once more after a kill -9. Measured are the peak of
the proportional set size of all processes, without the page cache of mapped files, against the bytes of the pictures'
side; seconds of a step; the share of them that a step waited for its batch; bytes on disk; and whether the resumed run
has the weights of the one that was never stopped. The last line is one JSON object.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.commands import finish, parser_of
from training.distributed import joined, leave
from training.encode.store import Keys, Store
from training.features import Features
from training.fit.ladder import train
from training.heads.trained import save_projectors
from training.measure.prepared import Prepared
from training.pairs import Pairs
from training.recipe import Recipe

WIDTHS = {"media": 2048, "texts": 1024}
TOKENS = {"media": 324, "texts": 16}
WIDTH_OF_TOKENS = 1024
_BLOCK = 8192  # rows that are written at a time
_HELD_OUT = 100
_WATCH_S = 0.2
_PAPER = 20_000_000  # pairs


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("scale", __doc__, bundle=False)
    parser.add_argument("--pairs", type=int, default=2_000_000)
    parser.add_argument("--tokens", action="store_true", help="token projectors on local vectors too")
    parser.add_argument("--ladder", action="store_true", help="ridge, CCA and the linear baseline too")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=1800, help="pairs of a step in each process")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="how many processes train together")
    parser.add_argument("--work", type=Path, default=Path("build/scale"), help="features and checkpoints go there")
    parser.add_argument("--keep", action="store_true", help="leave the features where they are")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child is not None:
        _learn(options)
        leave(0)
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(options)
    finally:
        if not options.keep:
            shutil.rmtree(options.work)
    print(json.dumps(result))
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Write the features, train, kill, resume; the figures."""
    began = time.perf_counter()
    write_features(options.work, options.pairs, options.tokens)
    size = sum(path.stat().st_size for side in WIDTHS for path in (options.work / side).iterdir())
    side = sum(path.stat().st_size for path in (options.work / "media").iterdir())
    print(f"{options.pairs:,} pairs: {size / 1e9:.1f} GB of features in {time.perf_counter() - began:.0f} s")
    rows: dict[int, dict[str, float]] = {}
    for count in options.ranks:
        folder = options.work / f"ranks{count}"
        peak = watched(start(options, folder, count))
        rows[count] = json.loads((folder / "timing.json").read_text()) | {"peak": peak}
    cut = options.work / "cut"
    killed(start(options, cut, 1), cut / "checkpoint.pt")
    watched(start(options, cut, 1))
    equal = same(options.work / f"ranks{options.ranks[0]}", cut) if options.ranks[0] == 1 else None
    print(f"\n{'processes':>10}{'peak MB':>10}{'of a side':>11}{'s a step':>10}{'host':>7}")
    for count, row in rows.items():
        share = f"{row['peak'] / side:>11.2f}{row['step_s']:>10.2f}{row['host_share']:>7.1%}"
        print(f"{count:>10}{row['peak'] / 1e6:>10,.0f}{share}")
    first = rows[options.ranks[0]]
    if not options.tokens:
        # What is fixed, the libraries and the heads, is taken from a run on a thousandth of the pairs.
        small = argparse.Namespace(**vars(options) | {"pairs": max(4000, options.pairs // 1000)})
        small.work = options.work / "small"
        small.work.mkdir()
        write_features(small.work, small.pairs, False)
        fixed = watched(start(small, small.work / "run", 1))
        pair_bytes = max(0.0, first["peak"] - fixed) / (options.pairs - small.pairs)
        at_20m, of_side = fixed + pair_bytes * _PAPER, 2 * WIDTHS["media"] * _PAPER
        print(f"fixed {fixed / 1e6:,.0f} MB and {pair_bytes:.0f} bytes a pair:")
        in_memory = f"{at_20m / 1e9:.1f} GB in one process, {at_20m / of_side:.2f} of a side of {of_side / 1e9:.0f} GB"
        print(f"at {_PAPER:,} pairs {in_memory}; ", end="")
        print(f"{size / options.pairs * _PAPER / 1e9:.0f} GB on disk")
    return {
        "pairs": options.pairs,
        "peak_rss_ratio": round(max(row["peak"] for row in rows.values()) / side, 3),
        "host_share": round(first["host_share"], 4),
        "step_s": round(first["step_s"], 4),
        "disk_gb": round(size / 1e9, 3),
        "resume_equal": equal,
        "ranks": {str(count): row for count, row in rows.items()},
    }


def write_features(work: Path, pairs: int, tokens: bool) -> None:
    """Random features; every block of rows is the first one with its signs and its order changed."""
    rng, signs = np.random.default_rng(0), np.array([0, 0x8000], np.uint16)
    for side in WIDTHS:
        most = TOKENS[side] if tokens else 0
        width = WIDTH_OF_TOKENS if tokens else WIDTHS[side]
        size = max(1, _BLOCK // max(1, most))
        block = rng.standard_normal((size, max(1, most), width), np.float32).astype(np.float16).view(np.uint16)
        keys = _keys(pairs)
        with _store(work, side, tokens).writer() as writer:
            for start in range(0, pairs, size):
                rows = (block[rng.permutation(size)[: pairs - start]] ^ rng.choice(signs, width)).view(np.float16)
                written: dict[str, Any] = {"pooled": rows[:, 0]}
                if tokens:
                    varied = side == "texts"  # captions differ in length
                    counts = rng.integers(most // 2, most * 3 // 2, len(rows)) if varied else [most] * len(rows)
                    lengths = zip(rows, counts, strict=True)
                    written["tokens"] = [np.resize(row, (count, width)) for row, count in lengths]
                    written["weights"] = [np.full(count, 1 / count, np.float32) for count in counts]
                writer.add(keys[start : start + size], written)


def _keys(pairs: int) -> Keys:
    """Keys of all items, spread as hashes are."""
    return np.random.default_rng(1).integers(2**63, size=(pairs, 2)).astype(np.uint64)


def _store(work: Path, side: str, tokens: bool) -> Store:
    return Store(work / side, WIDTH_OF_TOKENS if tokens else WIDTHS[side], np.float16, tokens)


def start(options: argparse.Namespace, folder: Path, count: int) -> list[subprocess.Popen[bytes]]:
    """`count` processes that train together, with the variables that torchrun sets."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [flag for flag in ("tokens", "ladder") if getattr(options, flag)]
    command = [sys.executable, "-m", "benchmarks.scale", "--child", str(folder), "--work", str(options.work)]
    command += ["--pairs", str(options.pairs), "--steps", str(options.steps), "--batch-size", str(options.batch_size)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [*command, *(f"--{flag}" for flag in flags)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]


def watched(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for the processes; the peak of what they hold together, in bytes, mapped files apart."""
    peak = 0
    while any(process.poll() is None for process in processes):
        peak = max(peak, sum(held(process.pid) for process in processes))
        time.sleep(_WATCH_S)
    if any(process.returncode for process in processes):
        raise SystemExit(f"training ended with {[process.returncode for process in processes]}")
    return peak


def held(pid: int) -> int:
    """Proportional set size of a process without the page cache of mapped files; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (OSError, ProcessLookupError):
        return 0
    sizes = {name: int(value.split()[0]) for name, value in (line.split(":", 1) for line in lines)}
    return 1024 * (sizes["Pss"] - sizes["Pss_File"])


def killed(processes: Sequence[subprocess.Popen[bytes]], checkpoint: Path) -> None:
    """kill -9 once the first checkpoint is there, in the midst of the steps after it."""
    while not checkpoint.is_file():
        if any(process.poll() is not None for process in processes):
            raise SystemExit("the run ended before it could be killed")
        time.sleep(_WATCH_S)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()


def same(first: Path, second: Path) -> bool:
    one, two = (load_file(folder / "projectors.safetensors") for folder in (first, second))
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


def _learn(options: argparse.Namespace) -> None:
    """Run one process."""
    recipe = _recipe(options)
    held_out = slice(options.pairs - _HELD_OUT, options.pairs)
    parts = {"train": slice(0, options.pairs - _HELD_OUT), "validation": held_out, "test": slice(0, 0)}
    data = {"pairs": {split: _prepared(options, rows) for split, rows in parts.items()}}
    trained = train(recipe, data, options.child)  # type: ignore[arg-type]
    if joined().index == 0:
        save_projectors(options.child / "projectors.safetensors", trained)
        if trained.timing:
            (options.child / "timing.json").write_text(json.dumps(dict(trained.timing)))


def _recipe(options: argparse.Namespace) -> Recipe:
    kind = "token" if options.tokens else "mlp"
    source: Mapping[str, Any] = {"modality": "image", "table": "t.csv", "folder": ".", "text": "text"}
    return Recipe.model_validate(
        {
            "name": "scale",
            "encoders": {"image": {"folder": "x"}, "text": {"folder": "x"}},
            "pairs": {"pairs": source},
            "projector": {"kind": kind, "dimensions": 1024, "hidden": 1024},
            "train": {
                "steps": options.steps,
                "batch_size": options.batch_size,
                "validate_every": max(1, options.steps // 3),
                "warmup_steps": 2,
                "patience": None,
                "baseline": options.ladder,
                "baseline_steps": 4,
            },
        }
    )


def _prepared(options: argparse.Namespace, rows: slice) -> Prepared:
    count = rows.stop - rows.start
    links = np.repeat(np.arange(count), 2).reshape(-1, 2)
    media, texts = [Path(f"{row}.jpg") for row in range(count)], [f"caption {row}" for row in range(count)]
    pairs = Pairs("pairs", "image", media, texts, links, None, [], 1.0)
    keys = _keys(options.pairs)[rows]
    sides = (
        Features(*_store(options.work, side, options.tokens).read(keys), key=f"{side}:{count}:{options.pairs}")
        for side in WIDTHS
    )
    return Prepared(pairs, *sides)


if __name__ == "__main__":
    finish(main)
