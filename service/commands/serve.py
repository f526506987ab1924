"""`serve` answers requests until it is told to stop, then finishes what is under way."""

import argparse
import asyncio
import ctypes
import errno
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from service.api.app import create_app, open_parts
from service.api.auth import local_names
from service.api.protocol import MAX_CONNECTIONS, MAX_UNSENT_BYTES, Connections, Protocol, Unsent
from service.api.state import State
from service.commands import starters
from service.contract.licences import weights_line
from service.retrieval.reembedding import naming_the_way_out
from service.runtime import logs
from service.settings import Settings, SettingsError, read_settings

log = logging.getLogger("service")

HELP = "serve a bundle; each flag overrides its ISTHMUS_ variable"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEEP_ALIVE_S = 75
"""Seconds an idle connection is kept open, longer than clients and proxies keep it (5 to 60 s): were the server the
first to close one, a request sent at that moment would be lost."""
_FILES = 4 * MAX_CONNECTIONS
_TRIM_S = 30
"""Seconds between two times that free memory is given back; the first is at the start."""
_ANSWERING_S = 5
"""Seconds after the grace period for the answers (503) to reach their clients."""

FLAGS = (
    "bundle",
    "more-bundles",
    "modalities",
    "store",
    "milvus-uri",
    "previews",
    "host",
    "port",
    "device",
    "precision",
    "redis-url",
    "log-level",
    "keys",
)
"""Settings that `serve` takes as flags."""


def configure(parser: argparse.ArgumentParser) -> None:
    for name in FLAGS:
        described = Settings.model_fields[name.replace("-", "_")].description or ""
        help = " ".join(described.split()).replace("%", "%%")
        if name == "previews":
            parser.add_argument("--previews", action=argparse.BooleanOptionalAction, help=help)
        else:
            parser.add_argument(f"--{name}", metavar=name.upper(), help=help)
    parser.add_argument(
        "--media",
        metavar="FOLDER",
        action="append",
        help="a folder whose files the page may show as they are; repeatable",
    )
    parser.add_argument("--starter", metavar="NAME", help="an installed starter other than the default, such as free")


def run(bundle: str | None, starter: str | None, **flags: str | bool | list[str] | None) -> int:
    serve(read_settings(bundle=starters.chosen(bundle, starter), **flags))
    return 0


class Server(uvicorn.Server):
    """Prints where it listens, once it does, and the licence terms of its weights. At its end every waiting client is
    answered.

    SIGTERM lets it drain first: for `drain_s` it goes on as before, but says in /readyz and by `Connection: close` that
    it is about to end, so that proxies turn to other replicas. Another signal, or Ctrl-C, cuts that short. Then no
    connection is accepted any more, and those that are made are answered, also where the request is yet to come.
    """

    def __init__(self, config: uvicorn.Config, grace_s: float, drain_s: float = 0.0) -> None:
        super().__init__(config)
        self.grace_s, self.drain_s = grace_s, drain_s
        self._hurried = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is not None and (sig == signal.SIGINT or self.should_exit):
            self._loop.call_soon_threadsafe(self._hurried.set)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}")
            for name, model in self.state.models.items():
                print(f"serving {name}, {weights_line(model.manifest.parts)}")
            sys.stdout.flush()

    @property
    def state(self) -> State:
        state: State = self.lifespan.state["services"]
        return state

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.state.draining.set()
        if self.drain_s:
            log.info("draining for %s s", self.drain_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(self.drain_s):
                    await self._hurried.wait()
        await self._stop_listening(sockets or [])
        # Uvicorn alone would let requests finish for so long, and cut off the others without an answer.
        grace = asyncio.create_task(self._end_grace())
        await super().shutdown(sockets)
        grace.cancel()

    async def _end_grace(self) -> None:
        await asyncio.sleep(self.grace_s)
        await self.state.close()

    async def _stop_listening(self, sockets: Sequence[socket.socket]) -> None:
        """Accept the connections that wait, and close the sockets in the same step of the event loop: closing resets
        whatever still waits in them, requests and all, which a proxy must not send again to another replica."""
        connections: list[socket.socket] = []
        for listening in sockets:
            with suppress(OSError):  # BlockingIOError: none is left
                while True:
                    connections.append(listening.accept()[0])
        for server in self.servers:
            server.close()

        def protocol() -> asyncio.Protocol:
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        loop = asyncio.get_running_loop()
        for connection in connections:
            await loop.connect_accepted_socket(protocol, connection)
        await asyncio.sleep(0)  # what the event loop has accepted itself is a connection now: each is told of the end


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket that does not listen yet. A bad address so stops the start before the models are opened, and until
    they are a client is refused at once and asks another replica, instead of waiting for this one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((host, port))
    except BaseException:
        listener.close()
        raise
    return listener


def _cannot_listen(settings: Settings, error: OSError) -> str:
    where = f"ISTHMUS_HOST {settings.host!r}, ISTHMUS_PORT {settings.port}: cannot listen there: {error.strerror}"
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"{where}. Another program listens there, perhaps a server of this kind (isthmus doctor says): end it, "
                "or choose another port by --port or ISTHMUS_PORT (0: a free one)"
            )
        case errno.EACCES:
            return f"{where}. Ports below 1024 are the system's: choose another by --port or ISTHMUS_PORT"
        case _:
            return f"{where}. Choose an address of this machine by --host or ISTHMUS_HOST, such as 127.0.0.1"


def serve(settings: Settings) -> None:
    """Serve until told to stop, then finish what is under way."""
    give_large_blocks_back()
    open_more_files()
    logs.configure(settings.log_level)
    if os.getpid() == 1:
        # The first process of a container gets no signal that it has no handler for: not while models are opened.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        listener = bind(settings.host, settings.port)
    except OSError as error:
        raise SettingsError(_cannot_listen(settings, error)) from None
    if settings.keys is None and local_names((), settings.host, keyed=False) is None:
        log.warning("there are no keys (ISTHMUS_KEYS): whoever reaches %s may read, write and delete", settings.host)
    with naming_the_way_out(settings):
        parts = open_parts(settings)
    app = create_app(settings, parts)
    server = Server(uvicorn_config(app, settings), settings.shutdown_grace_s, settings.drain_s)
    server.run(sockets=[listener])


def give_large_blocks_back() -> None:
    """Make glibc return freed blocks of 4 MB and more to the system at once: by itself it learns to keep up to 32 MB
    at a time, for each thread, which after some large bodies and pictures is hundreds of megabytes. Of smaller blocks
    each thread keeps as much: the next picture would ask the system for all of its pages again."""
    with suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 4 * 2**20)
        library.mallopt(_M_TRIM_THRESHOLD, 4 * 2**20)


def open_more_files() -> None:
    """Let the process open as many files as the system allows it, up to `_FILES`; connections count among them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with suppress(ValueError, OSError):  # a sandbox that allows no change
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def _most_connections() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, soft // 3)


async def _give_free_blocks_back() -> None:
    """Return the memory between blocks that are in use to the system: 50 MB once the models are opened, and as much
    again after bodies and answers of many MB. It takes a few milliseconds, in a thread."""
    with suppress(AttributeError, OSError):  # another C library
        await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)


def uvicorn_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    protocol = partial(Protocol, unsent=Unsent(MAX_UNSENT_BYTES), others=Connections(_most_connections()))
    return uvicorn.Config(
        app,
        http=cast("type[Protocol]", protocol),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=settings.shutdown_grace_s + _ANSWERING_S,
        callback_notify=_give_free_blocks_back,
        timeout_notify=_TRIM_S,
    )
