"""A bundle and its towers as the settings want them: the only place that opens them to embed with."""

from dataclasses import dataclass

from service.contract.bundle import Bundle, Manifest, Modality
from service.engine import profile
from service.engine.cache import Cache, MemoryCache, RedisCache
from service.engine.embedder import Embedder
from service.engine.endpoint import EndpointTower
from service.engine.towers import Tower, open_towers
from service.runtime import quotas
from service.runtime.metrics import Metrics
from service.settings import Settings

_REDIS_KEEPS_S = 7 * 86_400
"""Seconds for which Redis keeps a vector."""


@dataclass(frozen=True)
class Opened:
    """Holds a bundle whose towers are open."""

    bundle: Bundle
    towers: dict[Modality, Tower]

    def embedder(self, cache: Cache, settings: Settings, metrics: Metrics) -> Embedder:
        """Return a new embedder for the running event loop. Call it once."""
        return Embedder(self.bundle, self.towers, cache, settings, metrics)


def open_engine(settings: Settings, bundle: Bundle | None = None) -> Opened:
    """Open the towers of the bundle, else of the one that the settings name. Slow: not for an event loop.

    Raises SettingsError, BundleError, TowerError.
    """
    bundle = bundle or settings.read_bundle()
    towers = open_towers(
        bundle,
        settings.device,
        settings.call_threads,
        settings.modalities,
        settings.precision,
        settings.towers_on_gpus,
        profile.fitting(bundle, settings),
        endpoint=lambda: EndpointTower(bundle, settings),
    )
    return Opened(bundle, towers)


def open_cache(settings: Settings, manifest: Manifest, metrics: Metrics, *, models: int = 1) -> Cache:
    """Open the cache of one model; the models of a process share the memory equally."""
    if settings.redis_url is None:
        return MemoryCache(settings.cache_bytes // models)
    return RedisCache(
        settings.redis_url,
        dimensions=manifest.dimensions,
        ttl_s=_REDIS_KEEPS_S,
        timeout_s=quotas.REDIS_TIMEOUT_S,
        failed=metrics.cache.labels("error").inc,
    )
