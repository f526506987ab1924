"""`http_over_raw` and `added_latency_ms`: what HTTP, queue and batching cost over a bare loop around ONNX Runtime.

The loop does what an embedding takes and nothing else: bytes in, tokens or pixels, one call for each batch, vectors of
length 1. It reads with the service's own contract. Of the lanes × threads × batch that `isthmus tune` tries each is run
once, and the fastest takes turns with the service.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks import real
from benchmarks.load import Generator
from benchmarks.paired import ratio, say, take_turns
from benchmarks.plan import Plan
from benchmarks.servers import Server, isthmus
from service.contract.bundle import OUTPUT, Bundle, Modality, Precision, read_bundle
from service.contract.images import ImagePreprocessing, read_image
from service.contract.tokens import TextPreprocessing, TextTokenizer, pad_tokens
from service.contract.vectors import l2_normalise

_CORES = len(os.sched_getaffinity(0))
_BATCH = {"text": 32, "image": 8}
_CLIENTS = 4
_SWEPT_S = 1.0
"""Seconds of each way that is tried once."""
_PHOTOGRAPHS = 400

Prepare = Callable[[Sequence[Any]], dict[str, NDArray[Any]]]


def http_over_raw(plan: Plan) -> dict[str, float | None]:
    bundle = read_bundle(plan.bundle)
    results: dict[str, float | None] = {}
    with isthmus("isthmus", plan.bundle, plan.fresh(), cache_bytes=0, precision="fp32") as server:
        for modality in ("text", "image"):
            results[f"http_over_raw.{modality}"] = _saturated(plan, server, bundle, modality)
    return results


def added_latency(plan: Plan) -> dict[str, float | None]:
    """Measures in the precision that is served by default, and in fp32."""
    bundle = read_bundle(plan.bundle)
    default = bundle.manifest.towers["text"].default("cpu")
    return {
        f"added_latency_ms.text{'.fp32' if precision == 'fp32' != default else ''}": _added(plan, bundle, precision)
        for precision in dict.fromkeys((default, "fp32"))
    }


def _added(plan: Plan, bundle: Bundle, precision: Precision) -> float:
    texts = real.captions()[:2_000]
    upcoming = cycle(texts)
    with (
        # Texts alone: another tower may not come in this precision.
        isthmus(
            f"isthmus {precision}",
            plan.bundle,
            plan.fresh(),
            cache_bytes=0,
            precision=precision,
            modalities="text",
        ) as server,
        Generator(server.address) as load,
    ):
        requests = real.text_requests(server, "/v1/embeddings", bundle.manifest.name, 1)
        served = {"HTTP": lambda: load.closed(requests, clients=1, seconds=plan.seconds).median}
        bare = {
            f"{threads} threads": _alone(_embedding(bundle, "text", precision, threads), upcoming, plan.seconds)
            for threads in dict.fromkeys((_CORES, 1))
        }
        taken = take_turns(served | bare, plan.rounds)
    for name, medians in taken.items():
        say(f"{name}, {precision}", p50_ms=1_000 * statistics.median(medians))
    fastest = min(bare, key=lambda name: statistics.median(taken[name]))
    return 1_000 * statistics.median(one - other for one, other in zip(taken["HTTP"], taken[fastest], strict=True))


def _saturated(plan: Plan, server: Server, bundle: Bundle, modality: Modality) -> float:
    size = _BATCH[modality]
    inputs: Sequence[Any] = real.captions() if modality == "text" else real.jpegs(_PHOTOGRAPHS)
    batches = real.groups(inputs, size)
    written = batches if modality == "text" else [[{"image": real.in_base64(jpeg)} for jpeg in one] for one in batches]
    model = bundle.manifest.name
    requests = [real.post(server, "/v1/embeddings", {"model": model, "input": asked}) for asked in written]
    with Generator(server.address) as load:

        def over_http() -> float:
            return load.closed(requests, clients=_CLIENTS, seconds=plan.seconds).rate * size

        swept: dict[tuple[int, int, int], float] = {}
        for lanes in (lanes for lanes in range(1, _CORES + 1) if _CORES % lanes == 0):
            embed = _embedding(bundle, modality, "fp32", _CORES // lanes)
            for batch in (size // 2, size, 2 * size):
                way = (lanes, _CORES // lanes, batch)
                swept[way] = _rate(embed, cycle(real.groups(inputs, batch)), lanes, _SWEPT_S)
        lanes, threads, batch = max(swept, key=lambda way: swept[way])
        embed, upcoming = _embedding(bundle, modality, "fp32", threads), cycle(real.groups(inputs, batch))
        bare = f"bare: {lanes} lanes × {threads} threads, batch {batch}"
        taken = take_turns(
            {"over HTTP": over_http, bare: lambda: _rate(embed, upcoming, lanes, plan.seconds)}, plan.rounds
        )
    for name, rates in taken.items():
        say(f"{modality}, {name}", per_second=statistics.median(rates))
    return ratio(taken["over HTTP"], taken[bare])


def _embedding(
    bundle: Bundle, modality: Modality, precision: Precision, threads: int
) -> Callable[[Sequence[Any]], object]:
    """A function from a batch of inputs to its vectors."""
    prepare, options = _preparing(bundle, modality), onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    path = bundle.tower_path(modality, precision)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda batch: l2_normalise(session.run([OUTPUT], prepare(batch))[0])


def _preparing(bundle: Bundle, modality: Modality) -> Prepare:
    spec = bundle.manifest.towers[modality].preprocessing
    if isinstance(spec, TextPreprocessing):
        tokenizer = TextTokenizer(bundle.path / spec.tokenizer, spec)
        pad = spec.pad_id
        return lambda texts: dict(
            zip(spec.inputs, pad_tokens([tokenizer.encode(text) for text in texts], pad), strict=True)
        )
    assert isinstance(spec, ImagePreprocessing)
    return lambda files: {spec.inputs[0]: np.stack([read_image(file, spec) for file in files])}


def _rate(
    embed: Callable[[Sequence[Any]], object], batches: Iterator[Sequence[Any]], threads: int, seconds: float
) -> float:
    """Inputs per second in that many threads."""
    lock = threading.Lock()
    done = 0
    stop = time.perf_counter() + seconds

    def loop() -> None:
        nonlocal done
        while time.perf_counter() < stop:
            with lock:
                batch = next(batches)
            embed(batch)
            with lock:
                done += len(batch)

    started = time.perf_counter()
    running = [threading.Thread(target=loop) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return done / (time.perf_counter() - started)


def _alone(embed: Callable[[Sequence[Any]], object], texts: Iterator[str], seconds: float) -> Callable[[], float]:
    """Median time of one text, in seconds."""

    def measure() -> float:
        taken = []
        stop = time.perf_counter() + seconds
        while (started := time.perf_counter()) < stop:
            embed([next(texts)])
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    return measure
