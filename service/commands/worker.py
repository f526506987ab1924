"""`python -m service worker`: embeds the chunks of jobs that servers hand out through Redis. As many as you like.

A worker needs the bundle and Redis, and no store: what it makes goes back through Redis to the server whose job it is.
URLs it fetches where both the server's ISTHMUS_FETCH and its own say so, by its own lists of what is allowed.
SIGTERM and Ctrl-C let it finish what it has in hand; what it cannot finish in time, or when it is killed, others take.
"""

import asyncio
import logging
import os
import signal
import socket
from uuid import uuid4

from service.api.app import open_limiter
from service.engine.cache import check_redis
from service.engine.caller import PROCESS
from service.engine.fetch import Fetcher, ways
from service.engine.opening import open_cache, open_engine
from service.engine.previews import Previewer
from service.engine.token_vectors import TokenEmbedder
from service.jobs.embedding import Means, embed
from service.jobs.pieces import Outcome, Work
from service.jobs.stream import Worker, connect
from service.runtime.metrics import Metrics
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_TASKS = 2
"""Chunks at once: one is read and decoded while the other is in the model."""
_ENDLESS_S = 30 * 86_400.0


async def work(settings: Settings) -> None:
    """Work until told to stop. Raises SettingsError, BundleError, TowerError."""
    url = settings.redis_url
    if url is None:
        raise SettingsError("ISTHMUS_REDIS_URL is not set: workers get their work from Redis")
    await asyncio.to_thread(check_redis, url)
    # Nobody waits for an answer here as a request does.
    settings = settings.model_copy(update={"request_deadline_s": _ENDLESS_S})
    opened, metrics = open_engine(settings), Metrics()
    manifest = opened.bundle.manifest
    cache = open_cache(settings, manifest, metrics)
    embedder = opened.embedder(cache, settings, metrics)
    tokens, previewer = TokenEmbedder(embedder), Previewer(embedder, settings.limits)
    limiter = open_limiter(settings, metrics)
    fetching = ways(settings)
    fetcher = None if fetching is None else Fetcher(fetching, settings, metrics)
    means = Means(embedder, tokens, previewer, settings.limits, limiter, fetcher, PROCESS)
    connection = connect(url)

    async def make(work: Work) -> list[Outcome]:
        return await embed(means, work)

    name = f"{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
    worker = Worker(connection, manifest.space, name, make, settings.job_deliveries, settings.worker_silence_s)
    try:
        print(f"working on jobs of space {manifest.space}", flush=True)
        await _until_stopped(worker, settings.shutdown_grace_s)
        log.info("%d chunks done", worker.done)
    finally:
        await connection.aclose()
        await limiter.close()
        await tokens.close()
        await embedder.close()
        await cache.close()


async def _until_stopped(worker: Worker, grace_s: float) -> None:
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, worker.stopping.set)
    running = asyncio.create_task(worker.run(_TASKS))
    stopping = asyncio.create_task(worker.stopping.wait())
    await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.wait({running}, timeout=grace_s)
    stopping.cancel()
    if running.cancel():
        log.warning("what is in hand is left to others")
    await asyncio.gather(running, stopping, return_exceptions=True)
    if not running.cancelled() and (failure := running.exception()):
        raise failure
