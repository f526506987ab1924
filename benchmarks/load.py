"""A lean load generator: requests prepared as bytes, sent over keep-alive HTTP/1.1, in a process of its own.

It shares the cores with the server that it measures, so it does as little as it can: no HTTP library, no parsing of
bodies, one callback per response. Whatever server is measured, the client is this one.

load = Generator("http://127.0.0.1:8000")
load.closed(requests, clients=16, seconds=5.0)   # every client sends its next request when the last is answered
load.open(requests, rate=400.0, seconds=60.0)    # requests leave at a fixed rate, whatever becomes of them
"""

import asyncio
import multiprocessing
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_WARM_UP = 0.15  # of a closed loop's time, before anything is counted
_PATIENCE_S = 60.0  # for the answers that are still out when the time is up


@dataclass
class Load:
    """Holds what came of it."""

    seconds: float = 0.0
    """The seconds that were counted: as many as were asked for, and on until there are as many answers as clients."""
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    """How long each answer with status 200 took, in seconds."""
    unanswered: int = 0
    """Connections that were closed, or silent until patience ended, with a request under way."""
    sample: bytes = b""
    """Body of the last answer with status 200."""

    @property
    def rate(self) -> float:
        """Requests answered with 200 in a second."""
        return self.statuses[200] / self.seconds

    def latency(self, percentile: float) -> float:
        """The latency in seconds."""
        return float(np.percentile(self.latencies, percentile))

    @property
    def median(self) -> float:
        return statistics.median(self.latencies)


def request(host: str, path: str, body: bytes, content_type: str = "application/json") -> bytes:
    """A POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Generator:
    """Starts its process once; each call is one measurement. `with` ends the process."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None and parts.port is not None
        context = multiprocessing.get_context("spawn")  # a fork would take this process's threads for granted
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, parts.hostname, parts.port), daemon=True)
        self._process.start()

    def __enter__(self) -> "Generator":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join()

    def closed(self, requests: Sequence[bytes], *, clients: int, seconds: float) -> Load:
        return self._call("closed", requests, clients, seconds)

    def open(self, requests: Sequence[bytes], *, rate: float, seconds: float) -> Load:
        return self._call("open", requests, rate, seconds)

    def _call(self, *call: Any) -> Load:
        self._pipe.send(call)
        result = self._pipe.recv()
        if isinstance(result, BaseException):
            raise result
        assert isinstance(result, Load)
        return result


def _serve(pipe: Connection, host: str, port: int) -> None:
    while (call := pipe.recv()) is not None:
        kind, requests, *rest = call
        loop = (_closed if kind == "closed" else _open)(host, port, requests, *rest)
        try:
            pipe.send(uvloop.run(loop))
        except Exception as error:
            pipe.send(error)


class _Client(asyncio.Protocol):
    """One connection. `answered(status, latency, body)` is called for each response; None for one that never came."""

    def __init__(self, answered: Any) -> None:
        self._answered = answered
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._expected = 0
        self._status = 0
        self._sent: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    @property
    def busy(self) -> bool:
        return self._sent is not None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, data: bytes) -> None:
        assert self._transport is not None
        self._sent = time.perf_counter()
        self._transport.write(data)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        if not self._expected:
            end = received.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(received, 0, end)
            if length is None:
                raise ValueError("the server's answer states no length")
            self._status = int(received[9:12])
            self._expected = end + 4 + int(length[1])
        if len(received) < self._expected or self._sent is None:
            return
        latency, self._sent = time.perf_counter() - self._sent, None
        body = received
        self._received, self._expected = bytearray(), 0
        self._answered(self, self._status, latency, body)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._sent is not None:
            self._sent = None
            self._answered(self, None, 0.0, b"")


async def _closed(host: str, port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    loop = asyncio.get_running_loop()
    load, upcoming = Load(), 0
    finished = asyncio.Event()
    live, over = clients, False
    opening = time.perf_counter() + _WARM_UP * seconds

    def answered(client: _Client, status: int | None, latency: float, body: bytes) -> None:
        nonlocal upcoming, live, over
        now = time.perf_counter()
        if status is None:
            load.unanswered += 1
        elif now >= opening and not over:
            load.statuses[status] += 1
            if status == 200:
                load.latencies.append(latency)
                load.sample = body
            if now >= opening + seconds and load.statuses.total() >= clients:
                load.seconds, over = now - opening, True
        if status is None or over or not client.open:
            live -= 1
            client.close()
            if not live:
                finished.set()
            return
        client.send(requests[upcoming % len(requests)])
        upcoming += 1

    for _ in range(clients):
        _, client = await loop.create_connection(lambda: _Client(answered), host, port)
        client.send(requests[upcoming % len(requests)])
        upcoming += 1
    try:
        await asyncio.wait_for(finished.wait(), seconds * (1 + _WARM_UP) + _PATIENCE_S)
    except TimeoutError:
        load.unanswered += live
    load.seconds = load.seconds or time.perf_counter() - opening
    load.sample = bytes(load.sample).partition(b"\r\n\r\n")[2]
    return load


async def _open(host: str, port: int, requests: Sequence[bytes], rate: float, seconds: float) -> Load:
    """Send requests at a rate, each on an idle connection or a new one."""
    loop = asyncio.get_running_loop()
    load = Load()
    idle: list[_Client] = []
    under_way = 0
    drained = asyncio.Event()

    def answered(client: _Client, status: int | None, latency: float, body: bytes) -> None:
        nonlocal under_way
        under_way -= 1
        if status is None:
            load.unanswered += 1
        else:
            load.statuses[status] += 1
            if status == 200:
                load.latencies.append(latency)
                load.sample = body
            if client.open:
                idle.append(client)
        if not under_way:
            drained.set()

    started = time.perf_counter()
    for index in range(int(rate * seconds)):
        ahead = started + index / rate - time.perf_counter()
        if ahead > 0:
            await asyncio.sleep(ahead)
        client = None
        while idle and client is None:
            client = idle.pop()
            client = client if client.open else None
        if client is None:
            _, client = await loop.create_connection(lambda: _Client(answered), host, port)
        under_way += 1
        client.send(requests[index % len(requests)])
    load.seconds = time.perf_counter() - started
    while under_way:
        drained.clear()
        try:
            await asyncio.wait_for(drained.wait(), _PATIENCE_S)
        except TimeoutError:
            load.unanswered += under_way
            break
    load.sample = bytes(load.sample).partition(b"\r\n\r\n")[2]
    return load
