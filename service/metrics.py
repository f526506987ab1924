"""What /metrics shows. Each app has a registry of its own, so two apps in one process do not mix."""

from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOWER = ("model", "modality")
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Channel(Protocol):
    @property
    def depth(self) -> int: ...
    @property
    def loaded(self) -> bool: ...


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
        self.tower_opened = Counter(
            "isthmus_tower_opened", "Times a tower was opened.", _TOWER, registry=self._registry
        )
        self._tower_loaded = Gauge(
            "isthmus_tower_loaded", "1 while a tower is open, 0 while idle.", _TOWER, registry=self._registry
        )
        self.reloads = Counter(
            "isthmus_reloads", "Reloads (done, refused).", ["model", "result"], registry=self._registry
        )
        self.cache = Counter(
            "isthmus_cache", "Look-ups (hit, miss) and cache failures (error).", ["result"], registry=self._registry
        )
        self.rejections = Counter("isthmus_rejections", "Requests refused.", ["reason"], registry=self._registry)
        self.disconnects = Counter(
            "isthmus_disconnects", "Requests dropped because the client went away.", registry=self._registry
        )
        self._queue_depth = Gauge("isthmus_queue_depth", "Inputs in work or waiting.", _TOWER, registry=self._registry)

    def watch(self, model: str, modality: str, channel: Channel) -> None:
        self._queue_depth.labels(model, modality).set_function(lambda: channel.depth)
        self._tower_loaded.labels(model, modality).set_function(lambda: channel.loaded)

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
        self._items = metrics.batch_items.labels(model, modality)
        self._seconds = metrics.batch_seconds.labels(model, modality)
        self._failures = metrics.inference_failures.labels(model, modality)
        self._restarts = metrics.worker_restarts.labels(model, modality)
        self._opened = metrics.tower_opened.labels(model, modality)

    def batch(self, items: int, seconds: float) -> None:
        self._items.observe(items)
        self._seconds.observe(seconds)

    def failed(self, items: int) -> None:
        self._failures.inc(items)

    def restarted(self) -> None:
        self._restarts.inc()

    def opened(self) -> None:
        self._opened.inc()
