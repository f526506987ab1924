"""What /metrics shows. Each app has a registry of its own, so two apps in one process do not mix.

No label holds what a client wrote: methods, routes, codes, models and modalities are all of a known few.
"""

from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from service.runtime.disk import free_bytes

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOWER = ("model", "modality")
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Channel(Protocol):
    @property
    def depth(self) -> int: ...


class Sized(Protocol):
    @property
    def bytes(self) -> int: ...


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self.info = Info("isthmus_build", "What is served.", registry=self._registry)
        self.check = Gauge(
            "isthmus_check",
            "1 where the check of /readyz passed when it was last asked.",
            ["check"],
            registry=self._registry,
        )
        self.in_flight = Gauge("isthmus_requests_in_flight", "Requests begun, not answered.", registry=self._registry)
        self.requests = Counter(
            "isthmus_requests", "Requests answered.", ["method", "route", "status"], registry=self._registry
        )
        self.request_seconds = Histogram(
            "isthmus_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self.stage_seconds = Histogram(
            "isthmus_stage_seconds", "A request's longest input.", ["stage"], buckets=_SECONDS, registry=self._registry
        )
        self.decode_seconds = Histogram(
            "isthmus_decode_seconds",
            "Reading and preparing one medium, or some texts.",
            _TOWER,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.queue_seconds = Histogram(
            "isthmus_queue_seconds",
            "Wait of one input for the model.",
            _TOWER,
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch_items = Histogram(
            "isthmus_batch_items", "Inputs in one model call.", _TOWER, buckets=_ITEMS, registry=self._registry
        )
        self.batch_seconds = Histogram(
            "isthmus_batch_seconds", "One model call.", _TOWER, buckets=_SECONDS, registry=self._registry
        )
        self.inference_failures = Counter(
            "isthmus_inference_failures", "Inputs the model failed on.", _TOWER, registry=self._registry
        )
        self.worker_restarts = Counter(
            "isthmus_worker_restarts", "Tasks and threads that died and were replaced.", _TOWER, registry=self._registry
        )
        self.cache = Counter(
            "isthmus_cache", "Look-ups (hit, miss) and cache failures (error).", ["result"], registry=self._registry
        )
        self._cache_bytes = Gauge(
            "isthmus_cache_bytes", "Held by the cache in the process.", ["model"], registry=self._registry
        )
        self.slow_requests = Counter(
            "isthmus_slow_requests", "Requests that took longer than 10 s.", ["route"], registry=self._registry
        )
        self._store_bytes = Gauge("isthmus_store_bytes", "Of the store's files.", registry=self._registry)
        self._store_free_bytes = Gauge("isthmus_store_free_bytes", "Free on the store's disk.", registry=self._registry)
        self.job_items = Counter(
            "isthmus_job_items", "Items of bulk jobs (done, failed).", ["result"], registry=self._registry
        )
        self._jobs = Gauge("isthmus_jobs", "Bulk jobs that are remembered.", ["state"], registry=self._registry)
        self._jobs_running = Gauge("isthmus_jobs_running", "Bulk jobs that are worked on.", registry=self._registry)
        self._job_chunks = Gauge(
            "isthmus_job_chunks",
            "Parts of jobs that are embedded or wait to be written.",
            registry=self._registry,
        )
        self._job_items_left = Gauge(
            "isthmus_job_items_left", "Items of the jobs that are worked on, as yet undone.", registry=self._registry
        )
        self.rejections = Counter("isthmus_rejections", "Requests refused.", ["reason"], registry=self._registry)
        self.fetches = Counter(
            "isthmus_fetches", "URLs (fetched, refused, too_large, failed).", ["result"], registry=self._registry
        )
        self.fetched_bytes = Counter("isthmus_fetched_bytes", "From URLs.", registry=self._registry)
        self.limiter_errors = Counter(
            "isthmus_limiter_errors", "Times that Redis did not count for the limits of keys.", registry=self._registry
        )
        self.disconnects = Counter(
            "isthmus_disconnects", "Requests dropped because the client went away.", registry=self._registry
        )
        self._queue_depth = Gauge("isthmus_queue_depth", "Inputs in work or waiting.", _TOWER, registry=self._registry)
        self._queue_capacity = Gauge(
            "isthmus_queue_capacity", "Inputs that may be in work or waiting.", _TOWER, registry=self._registry
        )

        # What alerts count has to be there before it does: they do not see what a series begins with.
        for result in ("hit", "miss", "error"):
            self.cache.labels(result)
        self.rejections.labels("overloaded")
        for result in ("done", "failed"):
            self.job_items.labels(result)

    def watch(self, model: str, modality: str, channel: Channel, capacity: int) -> None:
        self._queue_capacity.labels(model, modality).set(capacity)
        self._queue_depth.labels(model, modality).set_function(lambda: channel.depth)

    def watch_cache(self, model: str, cache: Sized) -> None:
        self._cache_bytes.labels(model).set_function(lambda: cache.bytes)

    def watch_store(self, path: Path) -> None:
        """The directory of a store that is kept in files."""
        self._store_bytes.set_function(lambda: _bytes_in(path))
        self._store_free_bytes.set_function(lambda: free_bytes(path) or nan)

    def checked(self, checks: Mapping[str, bool]) -> None:
        for name, passed in checks.items():
            self.check.labels(name).set(passed)

    def watch_jobs(self, running: Callable[[], int], chunks: Callable[[], int], items_left: Callable[[], int]) -> None:
        self._jobs_running.set_function(running)
        self._job_chunks.set_function(chunks)
        self._job_items_left.set_function(items_left)

    def count_jobs(self, by_state: Mapping[str, int]) -> None:
        for state, count in by_state.items():
            self._jobs.labels(state).set(count)

    def fetched(self, result: str, size: int) -> None:
        self.fetches.labels(result).inc()
        self.fetched_bytes.inc(size)

    def limiter_error(self) -> None:
        self.limiter_errors.inc()

    def cache_error(self) -> None:
        self.cache.labels("error").inc()

    def of_tower(self, model: str, modality: str) -> "TowerMetrics":
        return TowerMetrics(self, model, modality)

    def render(self) -> bytes:
        """In Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


class TowerMetrics:
    """What a channel and its batchers report, under its model and modality."""

    def __init__(self, metrics: Metrics, model: str, modality: str) -> None:
        self._decode = metrics.decode_seconds.labels(model, modality)
        self._queue = metrics.queue_seconds.labels(model, modality)
        self._items = metrics.batch_items.labels(model, modality)
        self._seconds = metrics.batch_seconds.labels(model, modality)
        self._failures = metrics.inference_failures.labels(model, modality)
        self._restarts = metrics.worker_restarts.labels(model, modality)

    def decoded(self, seconds: float) -> None:
        self._decode.observe(seconds)

    def batch(self, waits: Sequence[float], seconds: float) -> None:
        self._items.observe(len(waits))
        self._seconds.observe(seconds)
        for wait in waits:
            self._queue.observe(wait)

    def failed(self, items: int) -> None:
        self._failures.inc(items)

    def restarted(self) -> None:
        self._restarts.inc()


def _bytes_in(path: Path) -> float:
    try:
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    except OSError:  # a file went away meanwhile
        return nan
