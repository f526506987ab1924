"""Measure how fast projectors of the paper's size train: `python -m benchmarks.projector_throughput [--device cuda]`.

The 11.5 M parameters of arXiv 2409.19425 (token projectors, 1024-d features to 1024 dimensions, both sides) on a
million synthetic pairs: per image a CLS vector and `--tokens` local ones, per text `--tokens` token states. With the
default of one, the features are CLS and mean, as a pooled cache holds them; the paper's own images have 324. Features
lie in memory-mapped float16 files, random by blocks. The last line is JSON; without a GPU, `--device cuda` says so.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from benchmarks.commands import finish, parser_of
from training.fit.losses import clamp_log_scale, contrast
from training.heads.projector import Head
from training.recipe import ObjectiveSpec, ProjectorSpec

WIDTH, DIMENSIONS = 1024, 1024
PAPER_PAIRS = 17_000_000 * 15  # of the paper's training: 17 M pairs, 15 epochs
_BLOCK = 10_000


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("projector_throughput", __doc__, bundle=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--batch-size", type=int, help="default: 1024 on a CPU, 16384 on a GPU")
    parser.add_argument("--steps", type=int, default=20, help="on a CPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="on a GPU")
    parser.add_argument("--chunk", type=int, help="rows of logits at a time (default: all)")
    parser.add_argument("--folder", type=Path, help="where the features lie while it runs (default: a temporary one)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("cuda: not run, torch sees no CUDA device")
        print(json.dumps({"device": "cuda", "run": False}))
        return 0
    options.batch_size = options.batch_size or (16_384 if options.device == "cuda" else 1024)
    if options.pairs < options.batch_size:
        parser.error(f"--pairs {options.pairs} is less than one batch of {options.batch_size}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        features = _features(Path(folder), options.pairs, options.tokens)
        result = measure(options, features)
    rows = [(key, f"{value:,.4g}" if isinstance(value, float) else f"{value}") for key, value in result.items()]
    print("\n".join(f"{key:32}{value:>16}" for key, value in rows))
    print(json.dumps(result))
    return 0


def measure(options: argparse.Namespace, features: dict[str, NDArray[np.float16]]) -> dict[str, Any]:
    """Train on shuffled batches for the asked steps or minutes; rates leave the first three steps out."""
    device, batch = options.device, options.batch_size
    torch.manual_seed(0)
    spec = ProjectorSpec(kind="token", dimensions=DIMENSIONS)
    heads = nn.ModuleDict({"image": Head("image", WIDTH, spec), "text": Head("text", WIDTH, spec)}).to(device)
    log_scale = nn.Parameter(torch.tensor(2.66, device=device))
    optimiser = torch.optim.AdamW([*heads.parameters(), log_scale], lr=1e-4, fused=device == "cuda")
    objective = ObjectiveSpec(chunk=options.chunk)
    order = np.random.default_rng(0).permutation(options.pairs)
    weights = torch.full((batch, options.tokens), 1 / options.tokens, device=device)
    keys = (torch.arange(batch, device=device),)
    ends: list[float] = []
    deadline = time.monotonic() + options.minutes * 60
    loss = torch.zeros(())
    with tqdm(unit="pair", unit_scale=True, desc=f"projectors on {device}") as bar:
        while time.monotonic() < deadline if device == "cuda" else len(ends) < options.steps + 3:
            start = len(ends) * batch % (options.pairs - batch + 1)
            rows = np.sort(order[start : start + batch])
            cls, local, states = (_load(features[name], rows, device) for name in ("cls", "local", "states"))
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                media = heads["image"](cls, local, weights)
                texts = heads["text"](states[:, 0], states, weights)
            loss = contrast(objective, media, texts, log_scale, keys)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([*heads.parameters(), log_scale], 1.0)
            optimiser.step()
            clamp_log_scale(log_scale.data)
            if device == "cuda":
                torch.cuda.synchronize()
            ends.append(time.monotonic())
            bar.update(batch)
    rate = (len(ends) - 3) * batch / (ends[-1] - ends[2])
    achieved, peak = rate * _operations(batch, options.tokens), _matmul_rate(device)
    return {
        "device": device,
        "run": True,
        "parameters": sum(p.numel() for p in heads.parameters()),
        "pairs": options.pairs,
        "tokens": options.tokens,
        "batch_size": batch,
        "precision": "bf16" if device == "cuda" else "fp32",
        "steps": len(ends) - 3,
        "seconds": round(ends[-1] - ends[2], 2),
        "pairs_per_second": round(rate, 1),
        "million_pairs_seconds": round(1e6 / rate, 1),
        "paper_schedule_hours": round(PAPER_PAIRS / rate / 3600, 2),
        "tflops": round(achieved / 1e12, 4),
        "matmul_tflops": round(peak / 1e12, 4),
        "fraction_of_matmul": round(achieved / peak, 4),
        "loss": round(loss.item(), 4),
    }


def _operations(batch: int, tokens: int) -> float:
    """Floating-point operations of one pair's step: two per weight and use, three times for the gradients."""
    one = WIDTH * DIMENSIONS
    heads = 3 * one * (tokens + 1) + 3 * one * tokens + 2 * one  # image: local and CLS; text: tokens, second projection
    return 3 * 2 * (heads + batch * DIMENSIONS)


def _matmul_rate(device: str) -> float:
    """Operations a second of a square matrix product in the precision that was trained in, best of five."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * size**3 / (time.perf_counter() - start))
    return best


def _features(folder: Path, pairs: int, tokens: int) -> dict[str, NDArray[np.float16]]:
    """Random features on disk; every block repeats one set of rows, scaled, so that writing is not the wait."""
    shapes = {"cls": (pairs, WIDTH), "local": (pairs, tokens, WIDTH), "states": (pairs, tokens, WIDTH)}
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[np.float16]] = {}
    for name, shape in shapes.items():
        array = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
        block = rng.standard_normal((min(_BLOCK, pairs), *shape[1:]), np.float32)
        for start in tqdm(range(0, pairs, _BLOCK), desc=f"writing {name}", leave=False):
            rows = slice(start, min(start + _BLOCK, pairs))
            array[rows] = (block * rng.uniform(0.5, 2.0))[: rows.stop - rows.start]
        arrays[name] = array
    return arrays


def _load(array: NDArray[np.float16], rows: NDArray[np.int64], device: str) -> torch.Tensor:
    return torch.from_numpy(array[rows]).to(device, non_blocking=True).float()


if __name__ == "__main__":
    finish(main)
