"""Each app has a registry of its own for /metrics, so two apps in one process do not mix.

No label holds what a client wrote: methods, routes, codes, models and modalities are all of a known few.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from math import nan
from pathlib import Path

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


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        counter = functools.partial(Counter, registry=self._registry)
        gauge = functools.partial(Gauge, registry=self._registry)
        histogram = functools.partial(Histogram, registry=self._registry)
        self.info = Info("isthmus_build", "The version, model and space that are served.", registry=self._registry)
        self.check = gauge("isthmus_check", "1 where the check of /readyz passed when it was last asked.", ["check"])
        self.in_flight = gauge("isthmus_requests_in_flight", "Requests begun, not answered.")
        self.requests = counter("isthmus_requests", "Requests answered.", ["method", "route", "status"])
        self.request_seconds = histogram("isthmus_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS)
        self.stage_seconds = histogram(
            "isthmus_stage_seconds", "A request's longest input.", ["stage"], buckets=_SECONDS
        )
        self.decode_seconds = histogram(
            "isthmus_decode_seconds", "Reading and preparing one medium, or some texts.", _TOWER, buckets=_SECONDS
        )
        self.queue_seconds = histogram(
            "isthmus_queue_seconds", "Wait of one input for the model.", _TOWER, buckets=_SECONDS
        )
        self.batch_items = histogram("isthmus_batch_items", "Inputs in one model call.", _TOWER, buckets=_ITEMS)
        self.batch_seconds = histogram("isthmus_batch_seconds", "One model call.", _TOWER, buckets=_SECONDS)
        self.inference_failures = counter("isthmus_inference_failures", "Inputs the model failed on.", _TOWER)
        self.worker_restarts = counter(
            "isthmus_worker_restarts", "Tasks and threads that died and were replaced.", _TOWER
        )
        self.cache = counter("isthmus_cache", "Look-ups (hit, miss) and cache failures (error).", ["result"])
        self.cache_bytes = gauge("isthmus_cache_bytes", "Bytes of the cache in the process.", ["model"])
        self.slow_requests = counter("isthmus_slow_requests", "Requests that took longer than 10 s.", ["route"])
        self._store_bytes = gauge("isthmus_store_bytes", "Bytes of the store's files.")
        self._store_free_bytes = gauge("isthmus_store_free_bytes", "Bytes free on the store's disk.")
        self.job_items = counter("isthmus_job_items", "Items of bulk jobs (done, failed).", ["result"])
        self._jobs = gauge("isthmus_jobs", "Bulk jobs that are remembered.", ["state"])
        self._jobs_running = gauge("isthmus_jobs_running", "Bulk jobs that are worked on.")
        self._job_chunks = gauge("isthmus_job_chunks", "Parts of jobs that are embedded or wait to be written.")
        self._job_items_left = gauge("isthmus_job_items_left", "Items of the jobs that are worked on, as yet undone.")
        self.rejections = counter("isthmus_rejections", "Requests refused.", ["reason"])
        self.fetches = counter("isthmus_fetches", "URLs (fetched, refused, too_large, failed).", ["result"])
        self.fetched_bytes = counter("isthmus_fetched_bytes", "Bytes fetched from URLs.")
        self.limiter_errors = counter(
            "isthmus_limiter_errors", "Times that Redis did not count for the limits of keys."
        )
        self.disconnects = counter("isthmus_disconnects", "Requests dropped because the client went away.")
        self._queue_depth = gauge("isthmus_queue_depth", "Inputs in work or waiting.", _TOWER)
        self._queue_capacity = gauge("isthmus_queue_capacity", "Inputs that may be in work or waiting.", _TOWER)

        # Series that alerts count must exist from the start: an alert does not see a series' first value.
        for result in ("hit", "miss", "error"):
            self.cache.labels(result)
        self.rejections.labels("overloaded")
        for result in ("done", "failed"):
            self.job_items.labels(result)

    def watch(self, model: str, modality: str, depth: Callable[[], int], capacity: int) -> None:
        self._queue_capacity.labels(model, modality).set(capacity)
        self._queue_depth.labels(model, modality).set_function(depth)

    def watch_store(self, path: Path) -> None:
        """Measure the directory of a store that is kept in files."""
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

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


class TowerMetrics:
    """Counts what a channel and its batchers report, labelled with their model and modality."""

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
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    except OSError:  # a file went away meanwhile
        return nan
