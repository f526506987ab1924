"""`overload` and `soak`: what becomes of the server when more is asked than it can do, and after a long time."""

import random
import statistics
import threading
from typing import Any

from benchmarks import real
from benchmarks.load import Generator, Load
from benchmarks.paired import say
from benchmarks.plan import Plan
from benchmarks.servers import Server, isthmus
from service.contract.bundle import read_bundle
from service.settings import Settings

_TEXTS = 8  # of a request
_CAPACITY_S = 15.0
_FACTOR = 4.0
_SAMPLE_S = 1.0
_SOAK_CLIENTS = 8
_BAD = 0.01


def overload(plan: Plan) -> dict[str, float | None]:
    """Overloads the service: at capacity as many requests are under way as the queue admits; then four times the
    rate of those answers comes in, whatever is answered.
    """
    name = read_bundle(plan.bundle).manifest.name
    with isthmus("isthmus", plan.bundle, plan.fresh(), cache_bytes=0) as server, Generator(server.address) as load:
        alone = real.text_requests(server, "/v1/embeddings", name, 1)
        requests = real.text_requests(server, "/v1/embeddings", name, _TEXTS)
        load.closed(alone, clients=4, seconds=plan.seconds)
        before = load.closed(alone, clients=1, seconds=plan.seconds)
        admitted = Settings.model_fields["queue_inputs"].default // _TEXTS
        at_capacity = load.closed(requests, clients=admitted, seconds=_CAPACITY_S)
        rss = server.rss
        over = load.open(requests, rate=_FACTOR * at_capacity.rate, seconds=plan.overload_s)
        grown = server.rss
        after = load.closed(alone, clients=1, seconds=plan.seconds)
    others = sum(count for status, count in at_capacity.statuses.items() if status != 200)
    errors = sum(count for status, count in over.statuses.items() if status not in (200, 429))
    say("at capacity", requests_per_second=at_capacity.rate, p99_ms=1_000 * at_capacity.latency(99), refused=others)
    say("4 x capacity", offered_per_second=sum(over.statuses.values()) / over.seconds, answered=dict(over.statuses))
    say("4 x capacity, the accepted", p99_ms=1_000 * over.latency(99), p50_ms=1_000 * over.median)
    say("alone, before and after", p50_ms=1_000 * before.median, after_ms=1_000 * after.median)
    return {
        "overload.errors": errors + over.unanswered + at_capacity.unanswered,
        "overload.p99_ratio": over.latency(99) / at_capacity.latency(99),
        "overload.rss_growth": grown / rss - 1,
    }


def soak(plan: Plan) -> dict[str, float | None]:
    """Texts, images, sounds, searches and labels, one in a hundred bad. Memory is compared with what it was after the
    first sixth: five minutes of thirty."""
    name = read_bundle(plan.bundle).manifest.name
    with isthmus("isthmus", plan.bundle, plan.fresh(), cache_bytes=8_000_000) as server:
        requests = _mixed(server, name)
        memory: list[int] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_SAMPLE_S):
                memory.append(server.rss)

        watching = threading.Thread(target=watch)
        with Generator(server.address) as load:
            _store(load, server)
            watching.start()
            try:
                given = load.closed(requests, clients=_SOAK_CLIENTS, seconds=plan.soak_s)
            finally:
                ended.set()
                watching.join()
    sixth = len(memory) // 6
    settled, last = (
        statistics.median(part) for part in (memory[sixth : sixth + sixth // 2 + 1], memory[-sixth // 2 - 1 :])
    )
    say("answers", **{str(status): count for status, count in sorted(given.statuses.items())})
    say("memory, after a sixth and at the end", mb=settled / 1e6, end_mb=last / 1e6)
    failed = sum(count for status, count in given.statuses.items() if status >= 500)
    if failed:
        raise RuntimeError(f"{failed} requests failed with a status of 500 or more")
    return {"soak.rss_growth": last / settled - 1, "soak.unanswered": given.unanswered}


def _store(load: Generator, server: Server) -> None:
    items = [{"id": str(index), "text": text} for index, text in enumerate(real.captions()[:500])]
    stored: Load = load.closed(
        [real.post(server, "/items", {"items": group}) for group in real.groups(items, 100)], clients=1, seconds=2.0
    )
    if set(stored.statuses) != {200}:
        raise RuntimeError(f"items could not be stored: {dict(stored.statuses)}")


def _mixed(server: Server, model: str) -> list[bytes]:
    """Some thousands of requests in no order, all different."""
    rng = random.Random(0)
    texts = iter(real.captions())
    images = [{"image": real.in_base64(jpeg)} for jpeg in real.jpegs(300)]
    sounds = [{"audio": real.in_base64(sound)} for sound in real.sounds(100)]
    labels = ["a dog", "people", "a car", "the sea", "a bird"]

    def some(kind: str) -> tuple[str, dict[str, Any]]:
        match kind:
            case "text":
                return "/v1/embeddings", {"model": model, "input": next(texts)}
            case "texts":
                return "/embed", {"inputs": [next(texts) for _ in range(16)], "encoding": "base64"}
            case "image":
                return "/embed", {"inputs": [rng.choice(images)]}
            case "sound":
                return "/embed", {"inputs": [rng.choice(sounds)]}
            case "search":
                return "/search", {"query": next(texts), "top_k": 10}
            case _:
                return "/classify", {"inputs": [rng.choice(images)], "labels": labels}

    kinds = {"text": 40, "texts": 5, "image": 25, "sound": 5, "search": 20, "classify": 5}
    half = real.jpegs(300)[0][:2_000]
    bad: list[tuple[str, dict[str, Any]]] = [
        ("/embed", {"inputs": [{"image": real.in_base64(half)}]}),
        ("/embed", {"inputs": [{"audio": real.in_base64(b"hello, I am a text")}]}),
        ("/embed", {"inputs": [""]}),
        ("/embed", {"inputs": [{"image": "!!!"}]}),
        ("/search", {"query": {"vector": [1.0]}}),
        ("/v1/embeddings", {"model": "no such", "input": "red"}),
    ]
    drawn = rng.choices(list(kinds), list(kinds.values()), k=5_000)
    return [real.post(server, *(rng.choice(bad) if rng.random() < _BAD else some(kind))) for kind in drawn]
