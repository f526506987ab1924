"""`create_app(settings)` makes the app. Its lifespan opens bundle → towers → batchers → cache → store."""

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypedDict

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from service import __version__
from service.api import problems
from service.api.auth import Gate, local_names, scope_of
from service.api.deadline import Deadline
from service.api.direct import Direct
from service.api.keys import Keyring
from service.api.middleware import BodyLimit, Context, Disconnects, Heads, Prefix, SecurityHeaders
from service.api.protocols.protocol import Protocol
from service.api.protocols.registry import PROTOCOLS, READS, protocol_of
from service.api.reading import known_parameters
from service.api.refusals import REFUSALS, refusals_of
from service.api.routes import (
    classify,
    collections,
    embed,
    feedback,
    health,
    items,
    jobs,
    media,
    playground,
    search,
)
from service.api.state import Model, State
from service.engine.cache import MemoryCache, check_redis
from service.engine.fetch import FetchConfig, Fetcher, fetch_config, upstream_config
from service.engine.opening import Opened, open_cache, open_engine
from service.engine.previews import Previewer
from service.jobs.jobs import Jobs, open_jobs
from service.jobs.jobs import Opened as OpenedJobs
from service.jobs.run import EmbeddingContext
from service.retrieval.classify import Classifier
from service.retrieval.projection import Maps
from service.retrieval.search import Searcher
from service.runtime import quotas
from service.runtime.metrics import Metrics
from service.runtime.quotas import Limiter, MemoryLimiter, RedisLimiter
from service.runtime.tracing import Tracing, open_tracing
from service.schemas.models import Problem
from service.settings import Settings, SettingsError
from service.store import Store
from service.store.opening import open_store

ROUTERS = (
    embed.router,
    search.router,
    feedback.router,
    classify.router,
    items.router,
    media.router,
    jobs.router,
    collections.router,
)
OPEN_ROUTERS = (health.router, playground.router)


@dataclass(frozen=True)
class Parts:
    """Holds the files on disk, opened: opening takes long, and may fail."""

    models: Sequence[Opened]
    """The default first."""
    store: Store
    home: str
    """The name of the model whose space the store has."""
    keys: Keyring | None = None
    fetching: FetchConfig | None = None
    jobs: OpenedJobs | None = None
    upstream: FetchConfig | None = None


class Lifespan(TypedDict):
    services: State


def open_parts(settings: Settings) -> Parts:
    """Read and open what the settings name. Slow: not for an event loop.

    Raises BundleError, TowerError, StoreError, KeysError, and SettingsError where two bundles have one name, an alias
    names none, a folder of media is none, or Redis refuses what its URL says.
    """
    if settings.redis_url is not None:
        check_redis(settings.redis_url)
    for folder in settings.media:
        if not folder.is_dir():
            raise SettingsError(f"ISTHMUS_MEDIA: {folder} is no folder: name one that holds the files of your items")
    keys = None if settings.keys is None else Keyring.open(settings.keys)
    for protocol, identity in settings.key_ids.items():
        if keys is None or identity not in keys.ids:
            why = "ISTHMUS_KEYS is not set" if keys is None else f"{keys.path} has no such key"
            raise SettingsError(f"ISTHMUS_PROTOCOL_KEYS: {protocol}={identity}: {why}")
    if "mcp" in settings.protocols and find_spec("mcp") is None:
        raise SettingsError("ISTHMUS_PROTOCOLS: mcp needs a package: pip install 'isthmus[mcp]'")
    fetching, upstream = fetch_config(settings), upstream_config(settings)
    models: dict[str, Opened] = {}
    for path in (settings.bundle, *settings.more_bundles):
        bundle = settings.read_bundle(path)
        name = bundle.manifest.name
        if name in models:
            raise SettingsError(f"ISTHMUS_MORE_BUNDLES: {models[name].bundle.path} and {path} are both called {name!r}")
        models[name] = open_engine(settings, bundle)
    for alias, name in settings.aliases.items():
        if name not in models or alias in models:
            problem = f"{alias!r} is a model" if alias in models else f"{name!r} is none of {', '.join(models)}"
            raise SettingsError(f"ISTHMUS_MODEL_ALIASES: {alias}={name}: {problem}")
    store, home = open_store(settings, [model.bundle.manifest for model in models.values()])
    bulk = None if settings.jobs_folder is None else open_jobs(settings.jobs_folder)
    return Parts(list(models.values()), store, home, keys, fetching, bulk, upstream)


def create_app(settings: Settings, parts: Parts | None = None, tracing: Tracing | None = None) -> FastAPI:
    """Return the service. Without `parts` its start opens them; without `tracing` traces go where the settings say."""
    metrics = Metrics()
    tracing = tracing or open_tracing()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[Lifespan]:
        opened_parts = parts if parts is not None else await asyncio.to_thread(open_parts, settings)
        async with AsyncExitStack() as closing:
            if tracing is not None:
                closing.push_async_callback(asyncio.to_thread, tracing.close)
            yield {"services": await _open_state(settings, opened_parts, metrics, closing)}

    app = FastAPI(
        title="Isthmus",
        version=__version__,
        summary="Images, sounds and texts in one embedding space: embed, search, classify.",
        lifespan=lifespan,
        docs_url=None,  # both of FastAPI's pages load their scripts from another server; routes.playground has one
        redoc_url=None,
        servers=[{"url": settings.root_path or "/"}],
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        openapi_tags=[
            {"name": name, "description": description}
            for name, description in _TAGS.items()
            if name not in PROTOCOLS or name in settings.protocols
        ],
        generate_unique_id_function=_operation_id,
        middleware=_middleware(settings, metrics, tracing),
    )
    problems.install(app)
    protocols = [PROTOCOLS[name].router for name in settings.protocols]
    app.router.routes.insert(0, Direct([*ROUTERS, *OPEN_ROUTERS, *protocols]))
    for router in ROUTERS:
        app.include_router(router, dependencies=[Depends(known_parameters)])
    # Probes, browsers and other services' clients may add parameters of their own.
    for router in (*OPEN_ROUTERS, *protocols):
        app.include_router(router)
    app.mount("/playground", playground.Files())
    app.openapi = functools.cache(lambda: openapi(app))  # type: ignore[method-assign]
    return app


async def _open_state(settings: Settings, parts: Parts, metrics: Metrics, closing: AsyncExitStack) -> State:
    """Open the services over the parts and start the jobs; `closing` closes all of it, the store last."""
    store = parts.store
    closing.push_async_callback(store.close)
    models: dict[str, Model] = {}
    limits = settings.limits.of_images
    for opened in parts.models:
        manifest = opened.bundle.manifest
        cache = open_cache(settings, manifest, metrics, models=len(parts.models))
        closing.push_async_callback(cache.close)
        if isinstance(cache, MemoryCache):
            metrics.cache_bytes.labels(manifest.name).set_function(cache.size)
        embedder = opened.embedder(cache, settings, metrics)
        models[manifest.name] = Model(embedder, Classifier(embedder, store, limits))
    home = models[parts.home]
    metrics.info.info({"version": __version__, "model": parts.home, "space": home.manifest.space})
    metrics.watch_store(settings.store)
    limiter: Limiter = MemoryLimiter()
    if settings.redis_url is not None:
        limiter = RedisLimiter(settings.redis_url, timeout_s=quotas.REDIS_TIMEOUT_S, failed=metrics.limiter_errors.inc)
    closing.push_async_callback(limiter.close)
    previewer = Previewer(home.embedder, settings.limits) if settings.keeps_previews else None
    fetching = parts.fetching
    fetcher = None if fetching is None else Fetcher(fetching, settings, metrics.fetched)
    upstream = None
    if parts.upstream is not None:
        upstream = Fetcher(parts.upstream, settings, metrics.fetched, timeout_s=settings.request_deadline_s)
    bulk = None
    if parts.jobs is not None:
        # In the background: requests have most of the places.
        slower = None if fetching is None else Fetcher(fetching, settings, metrics.fetched, background=True)
        context = EmbeddingContext(home.embedder, store, previewer, limiter, slower)
        bulk = Jobs(parts.jobs, settings, context, metrics)
    state = State(
        settings,
        models,
        home,
        store,
        Searcher(home.embedder, store),
        previewer,
        Maps(store, 0.9 * settings.request_deadline_s),  # before the request's own is over
        metrics,
        limiter,
        parts.keys,
        fetcher,
        upstream,
        bulk,
    )
    closing.push_async_callback(state.close)
    if bulk is not None:
        closing.push_async_callback(bulk.close)
        await bulk.start()
    return state


def _middleware(settings: Settings, metrics: Metrics, tracing: Tracing | None) -> list[Middleware]:
    """Return the middleware of every request, outermost first."""
    return [
        Middleware(Prefix, root_path=settings.root_path or ""),
        Middleware(SecurityHeaders),
        Middleware(Context, metrics=metrics, tracing=tracing),
        *cors(settings),
        Middleware(
            Gate,
            origins=settings.origins,
            hosts=local_names(settings.hosts, settings.host, settings.keys is not None and not settings.protocol_keys),
        ),
        Middleware(Disconnects),
        Middleware(
            BodyLimit,
            limit=settings.max_body_bytes,
            together=settings.max_bodies_bytes,
            streamed={"/jobs": settings.max_job_bytes},
            embedding={"/embed", "/classify", *READS},
        ),
        Middleware(Heads),
        Middleware(Deadline, seconds=settings.request_deadline_s),
    ]


def cors(settings: Settings) -> list[Middleware]:
    """Return the CORS middleware where sites may call the service from their pages; they send a key, never a cookie."""
    if not settings.origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-Request-ID"],
            expose_headers=["RateLimit", "RateLimit-Policy", "Retry-After", "Server-Timing", "X-Request-ID"],
        )
    ]


_TAGS = {
    "embed": "Vectors of images, sounds, videos and texts, and how alike two of them are.",
    "search": "The stored items nearest to a query of any kind.",
    "classify": "Which of the labels that you name fits best, without training.",
    "items": "What is stored, and its collections and previews.",
    "jobs": "Items by the thousand, stored in the background.",
    "openai": "The shapes of OpenAI's clients.",
    "jina": "The shape of Jina's rerankers.",
    "cohere": "The shapes of Cohere's clients.",
    "tei": "The shapes of text-embeddings-inference.",
    "ollama": "The shapes of Ollama's clients.",
    "mcp": "The Model Context Protocol.",
    "weaviate": "The shapes of Weaviate's inference modules.",
    "immich": "The shapes of Immich's machine learning.",
    "service": "The models, the server's health and its page.",
}


def _operation_id(route: APIRoute) -> str:
    """Return the name of a route's function in camelCase, by which generated clients call it."""
    first, *words = route.name.split("_")
    return first + "".join(word.capitalize() for word in words)


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's document, with the request bodies that `inputs.documented` describes and RFC 9457 errors."""
    document = FastAPI.openapi(app)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    protocols = {name: protocol_of(name) for name in document["paths"]}
    errors: dict[str, type[BaseModel]] = {"": Problem}
    errors |= {_prefix(protocol): protocol.schema for protocol in protocols.values() if protocol}
    for model in errors.values():
        schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schemas[model.__name__].pop("$defs", {})
    contents = {
        prefix: _content("application/json" if prefix else "application/problem+json", model)
        for prefix, model in errors.items()
    }
    for path, operations in document["paths"].items():
        prefix = _prefix(protocols[path])
        for method, operation in operations.items():
            schemas |= operation.pop("x-definitions", {})
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = {
                "description": f"As {prefix} says it" if prefix else "A problem (RFC 9457)",
                "content": contents[prefix],
            }
            key_scope = scope_of(method.upper(), path)
            operation["security"] = [{"key": [key_scope]}] if key_scope else []
            for status in refusals_of(method.upper(), path, operation, schemas, key_scope):
                operation["responses"][str(status)] = {"$ref": f"#/components/responses/{prefix}{status}"}
    components = document["components"]
    components["schemas"] = dict(sorted(schemas.items()))
    components["responses"] = {
        f"{prefix}{status}": described | {"content": content}
        for prefix, content in contents.items()
        for status, described in REFUSALS.items()
    }
    components["securitySchemes"] = {
        "key": {
            "type": "http",
            "scheme": "bearer",
            "description": "A key of `python -m service keys create`, with the scope that the operation names. A "
            "server that has no keys (ISTHMUS_KEYS) asks for none.",
        }
    }
    return document


def _prefix(protocol: Protocol | None) -> str:
    """Return the first word of the names of a protocol's responses: OpenAI of OpenAIError; empty for native routes."""
    return protocol.schema.__name__.removesuffix("Error") if protocol else ""


def _content(media_type: str, model: type[BaseModel]) -> dict[str, Any]:
    return {media_type: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
