"""The app: `create_app(settings)`. Its lifespan opens bundle → towers → batchers → cache → store."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware import Middleware

from service import __version__, errors
from service.cache import Cache, MemoryCache, RedisCache
from service.classify import Classifier
from service.contract.bundle import Bundle, Modality, read_bundle
from service.metrics import Metrics
from service.middleware import BodyLimit, Context, Disconnects
from service.pipeline import Embedder
from service.routes import classify, collections, embed, health, items, label_sets, models, openai, score, search
from service.schemas.models import Problem
from service.search import Searcher
from service.settings import Settings
from service.state import State
from service.store import Store
from service.towers import Tower, open_towers

ROUTERS = (
    embed.router,
    search.router,
    classify.router,
    label_sets.router,
    items.router,
    collections.router,
    score.router,
    models.router,
    openai.router,
    health.router,
)


@dataclass(frozen=True)
class Parts:
    """What is slow to open, and can be wrong: the files on disk."""

    bundle: Bundle
    towers: Mapping[Modality, Tower]
    store: Store


class Lifespan(TypedDict):
    services: State


def open_parts(settings: Settings) -> Parts:
    """Read and open what the settings name. Raises BundleError, TowerError, StoreError. Slow: not for an event loop."""
    bundle = read_bundle(settings.bundle)
    towers = open_towers(bundle, settings.device, settings.threads)
    return Parts(bundle, towers, Store.open(settings.store, bundle.manifest))


def create_app(settings: Settings, parts: Parts | None = None) -> FastAPI:
    """The service. Without `parts`, its start opens them."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Lifespan]:
        opened = parts if parts is not None else await asyncio.to_thread(open_parts, settings)
        bundle, towers, store = opened.bundle, opened.towers, opened.store
        async with AsyncExitStack() as closing:
            closing.push_async_callback(store.close)
            cache = open_cache(settings, bundle, metrics)
            closing.push_async_callback(cache.close)
            embedder = Embedder(bundle, towers, cache, settings, metrics)
            closing.push_async_callback(embedder.close)
            providers = {modality: tower.provider for modality, tower in towers.items()}
            state = State(
                settings=settings,
                bundle=bundle,
                providers=providers,
                embedder=embedder,
                store=store,
                searcher=Searcher(embedder, store),
                classifier=Classifier(embedder, store),
                metrics=metrics,
            )
            yield {"services": state}

    app = FastAPI(
        title="Isthmus",
        version=__version__,
        summary="Images, sounds and texts in one embedding space: embed, search, classify.",
        lifespan=lifespan,
        docs_url=None,  # both pages load their scripts from somebody else's server
        redoc_url=None,
        middleware=[
            Middleware(Context, metrics=metrics),
            Middleware(Disconnects),
            Middleware(BodyLimit, limit=settings.max_body_bytes),
        ],
    )
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    return app


def open_cache(settings: Settings, bundle: Bundle, metrics: Metrics) -> Cache:
    if settings.redis_url is None:
        return MemoryCache(settings.cache_bytes)
    return RedisCache(
        settings.redis_url,
        dimensions=bundle.manifest.dimensions,
        ttl_s=settings.cache_ttl_s,
        timeout_s=settings.redis_timeout_s,
        observer=metrics,
    )


def openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with the request bodies that `inputs.documented` describes and RFC 9457 errors."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Problem"] = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= schemas["Problem"].pop("$defs", {})
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            schemas |= operation.pop("x-definitions", {})
            operation["responses"].pop("422", None)
            if not path.startswith("/v1/"):
                operation["responses"]["default"] = {"description": "A problem (RFC 9457)", "content": problem}
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    return document
