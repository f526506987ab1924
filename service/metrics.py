"""What /metrics shows. Each app has a registry of its own, so two apps in one process do not mix."""

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Queue(Protocol):
    @property
    def depth(self) -> int: ...


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "isthmus_requests", "Requests answered.", ["method", "route", "status"], registry=self._registry
        )
        self.request_seconds = Histogram(
            "isthmus_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self.stage_seconds = Histogram(
            "isthmus_stage_seconds", "A request's longest input.", ["stage"], buckets=_SECONDS, registry=self._registry
        )
        self.batch_items = Histogram(
            "isthmus_batch_items", "Inputs in one model call.", ["modality"], buckets=_ITEMS, registry=self._registry
        )
        self.batch_seconds = Histogram(
            "isthmus_batch_seconds", "One model call.", ["modality"], buckets=_SECONDS, registry=self._registry
        )
        self.inference_failures = Counter(
            "isthmus_inference_failures", "Inputs the model failed on.", ["modality"], registry=self._registry
        )
        self.cache = Counter(
            "isthmus_cache", "Look-ups (hit, miss) and cache failures (error).", ["result"], registry=self._registry
        )
        self.rejections = Counter("isthmus_rejections", "Requests refused.", ["reason"], registry=self._registry)
        self.disconnects = Counter(
            "isthmus_disconnects", "Requests dropped because the client went away.", registry=self._registry
        )
        self._queue_depth = Gauge(
            "isthmus_queue_depth", "Inputs in work or waiting.", ["modality"], registry=self._registry
        )

    def watch_queue(self, modality: str, queue: Queue) -> None:
        self._queue_depth.labels(modality).set_function(lambda: queue.depth)

    def cache_error(self) -> None:
        self.cache.labels("error").inc()

    def of_tower(self, modality: str) -> "TowerMetrics":
        return TowerMetrics(self, modality)

    def render(self) -> bytes:
        """In Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)


class TowerMetrics:
    """What a batcher reports, under its modality."""

    def __init__(self, metrics: Metrics, modality: str) -> None:
        self._items = metrics.batch_items.labels(modality)
        self._seconds = metrics.batch_seconds.labels(modality)
        self._failures = metrics.inference_failures.labels(modality)

    def batch(self, items: int, seconds: float) -> None:
        self._items.observe(items)
        self._seconds.observe(seconds)

    def failed(self, items: int) -> None:
        self._failures.inc(items)
