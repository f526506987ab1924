"""`vs_infinity`: the same requests to infinity-emb (github.com/michaelfeil/infinity) and to this service.

infinity has a virtual environment of its own under build/bench, made here from PyPI (infinity.txt), with the torch that
this project has. Texts: all-MiniLM-L6-v2 from the same package, in a local folder, by its torch engine and by its ONNX
engine (optimum), which optimises the graph that models.py exports; ours is `full` as `isthmus tune --full` found it
fastest, `fp32` and `int8` as they are without it. Images: a CLIP with random weights and the
shape of ViT-B/32, by its torch engine, the only one it has for images; `vs_infinity.image` is in the precision that
the bundle's gates made the default, `vs_infinity.image.fp32` without that. A figure is the ratio to the faster of its
engines, scenario by scenario.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import models, real
from benchmarks.load import Generator, Load
from benchmarks.paired import ratio, say, take_turns
from benchmarks.plan import Plan
from benchmarks.servers import BenchmarkError, Server, environment, isthmus, other, tuned
from service.contract.bundle import Modality, read_bundle

_PORT = 7_990  # and those after it
_TORCH = "torch==2.13.0"
SCENARIOS = {"c1": (1, 1), "c16": (16, 1), "c64": (64, 1), "b32": (4, 32)}
"""Clients, and texts in a request."""
_IMAGE_CLIENTS, _IMAGES = 4, 4
_PHOTOGRAPHS = 400

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class Contender:
    server: Server
    model: str
    path: str


def texts(plan: Plan) -> dict[str, float | None]:
    results: dict[str, float | None] = {}
    minilm = models.minilm(plan.folder / "minilm")
    with_graph = models.minilm_onnx(plan.folder / "minilm-onnx", minilm)
    with ExitStack() as running:
        cache = tuned(plan.bundle, plan.folder, real.captions()[:256])
        ours = {
            precision: running.enter_context(_ours(plan, plan.bundle, "text", precision, cache))
            for precision in ["full", *_precisions(plan.bundle, "text")]
        }
        theirs = {
            engine: running.enter_context(_infinity(plan, model, engine, _PORT + index))
            for index, (engine, model) in enumerate({"torch": minilm, "optimum": with_graph}.items())
        }
        loads = {
            name: (server, running.enter_context(Generator(server.server.address)))
            for name, server in {**ours, **theirs}.items()
        }
        alone: dict[str, list[float]] = {}
        for scenario, (clients, size) in SCENARIOS.items():
            measured = take_turns(
                {
                    name: partial(
                        _measure,
                        load,
                        real.text_requests(server.server, server.path, server.model, size),
                        clients,
                        plan,
                    )
                    for name, (server, load) in loads.items()
                },
                plan.rounds,
            )
            rates = {name: [run.rate * size for run in runs] for name, runs in measured.items()}
            for name, runs in measured.items():
                p50 = 1_000 * statistics.median(run.median for run in runs)
                say(f"{scenario}, {name}", per_second=statistics.median(rates[name]), p50_ms=p50)
            for precision in ours:
                ratios = [ratio(rates[precision], rates[engine]) for engine in theirs]
                results[f"vs_infinity.text.{precision}.{scenario}"] = min(ratios)
            if scenario == "c1":
                alone = {name: [run.median for run in runs] for name, runs in measured.items()}
    served = next(reversed(ours))  # int8 where the bundle has it
    results["vs_infinity.text.p50_c1"] = max(ratio(alone[served], alone[engine]) for engine in theirs)
    return results


def images(plan: Plan) -> dict[str, float | None]:
    model, bundle = models.clip(plan.folder / "clip")
    photographs = real.groups([real.in_base64(jpeg) for jpeg in real.jpegs(_PHOTOGRAPHS)], _IMAGES)
    with ExitStack() as running:
        ours = {
            f"isthmus {precision}": running.enter_context(_ours(plan, bundle, "image", precision))
            for precision in _precisions(bundle, "image")
        }
        theirs = running.enter_context(_infinity(plan, model, "torch", _PORT))
        bodies: dict[str, list[dict[str, Any]]] = {
            name: [{"model": server.model, "input": [{"image": image} for image in group]} for group in photographs]
            for name, server in ours.items()
        }
        bodies["infinity"] = [
            {"model": theirs.model, "modality": "image", "input": [f"data:image/jpeg;base64,{jpeg}" for jpeg in group]}
            for group in photographs
        ]
        contenders: dict[str, Callable[[], Load]] = {}
        for name, server in {**ours, "infinity": theirs}.items():
            load = running.enter_context(Generator(server.server.address))
            requests = [real.post(server.server, server.path, body) for body in bodies[name]]
            contenders[name] = partial(_measure, load, requests, _IMAGE_CLIENTS, plan)
        measured = take_turns(contenders, plan.rounds)
    rates = {name: [run.rate * _IMAGES for run in runs] for name, runs in measured.items()}
    for name, runs in measured.items():
        p50 = 1_000 * statistics.median(run.median for run in runs)
        say(f"images, {name}", per_second=statistics.median(rates[name]), p50_ms=p50)
    return {
        "vs_infinity.image": ratio(rates[list(ours)[-1]], rates["infinity"]),
        "vs_infinity.image.fp32": ratio(rates["isthmus fp32"], rates["infinity"]),
    }


def _measure(load: Generator, requests: list[bytes], clients: int, plan: Plan) -> Load:
    given = load.closed(requests, clients=clients, seconds=plan.seconds)
    if set(given.statuses) - {200} or given.unanswered or not given.latencies:
        raise BenchmarkError(
            f"not every request was answered with 200: {dict(given.statuses)}, {given.unanswered} lost"
        )
    return given


def _precisions(bundle: Path, modality: Modality) -> list[str]:
    """fp32, and int8 where the bundle has that tower in it."""
    if "int8" in read_bundle(bundle).manifest.towers[modality].variants:
        return ["fp32", "int8"]
    why = f"the bundle has no such {modality} tower: export one with data, export.precisions=[fp32,int8]"
    say("int8", not_measured=why)
    return ["fp32"]


@contextmanager
def _ours(
    plan: Plan, bundle: Path, modality: Modality, precision: str, cache: Path | None = None
) -> Iterator[Contender]:
    """Serves that tower alone, as the peer has it: another may not come in this precision. full: as it was tuned."""
    name = read_bundle(bundle).manifest.name
    settings = {"precision": "auto" if precision == "full" else precision, "modalities": modality}
    with isthmus(f"isthmus {precision}", bundle, plan.fresh(), cache=cache, cache_bytes=0, **settings) as server:
        yield Contender(server, name, "/v1/embeddings")


@contextmanager
def _infinity(plan: Plan, model: Path, engine: str, port: int) -> Iterator[Contender]:
    python = environment(plan.folder / "infinity", Path(__file__).with_name("infinity.txt"), _TORCH)
    command = [str(python.parent / "infinity_emb"), "v2", "--model-id", str(model), "--served-model-name", "peer"]
    command += ["--engine", engine, "--device", "cpu", "--pooling-method", "mean", "--no-trust-remote-code"]
    command += ["--no-model-warmup", "--host", "127.0.0.1", "--port", str(port)]
    env = os.environ | _OFFLINE | {"HF_HOME": str(plan.folder / "huggingface")}
    log = plan.folder / f"infinity-{engine}.log"
    with other(f"infinity {engine}", command, env, f"http://127.0.0.1:{port}", log) as server:
        yield Contender(server, "peer", "/embeddings")
