"""Send what one client with one read key may send at once, to take the service from all others.

A server of its own, with keys. While the flood of one key is under way another key asks for little things, one after
the other: each is to be answered with 200 within the time that any attack has. Every request of the flood is to be
answered as it says, or its client has left; memory stays within bounds; and in the middle of the last flood SIGTERM is
to end the server.
"""

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from benchmarks.servers import Server, isthmus
from service.api.keys import create_key
from service.contract.bundle import read_bundle

OK, BUSY, LATE, INVALID = "ok", "overloaded", "deadline_exceeded", "invalid_request"
DEADLINE_S, GRACE_S = 10, 3
PATIENCE_S = 120.0
MEMORY_BYTES = 600_000_000
"""What the server may take beyond what it had before, whatever one client sends at once: twice what one request may
take."""
ITEMS, WIDE = 6_000, 512
_LITTLE = 12
"""Requests of the other client, at least."""
_METADATA_BYTES = 15_000
ENDED_S = GRACE_S + 8.0
"""The seconds from SIGTERM to the end: the grace, five seconds for answers, and what else there is to do."""


@dataclass(frozen=True)
class Flood:
    name: str
    wires: Callable[[int], Iterator[bytes]]
    """The requests, which are sent all at once, without their key; given the space's dimensions."""
    right: frozenset[str]
    """What each may be answered with."""
    leaves: bool = False
    """Whether their clients leave as soon as they have asked."""


@dataclass
class Told:
    """Holds what came of a flood."""

    answers: list[tuple[str, float]] = field(default_factory=list)
    """Codes and seconds."""
    neighbour: list[tuple[str, str, float]] = field(default_factory=list)
    """What another client asked for meanwhile: what, the code of its answer, seconds."""
    extra_bytes: int = 0

    @property
    def slowest(self) -> tuple[str, str, float]:
        return max(self.neighbour, key=lambda request: request[2], default=("", OK, 0.0))


def _request(method: str, path: str, body: object = None) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    kind = "" if body is None else f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer KEY\r\n{kind}\r\n".encode() + data


def maps(dimensions: int) -> Iterator[bytes]:
    for limit in range(1_000, 5_000, 100):
        yield _request("GET", f"/collections/default/map?limit={limit}")


def many_labels(dimensions: int) -> Iterator[bytes]:
    templates = [f"this is number {number} of {{}}" for number in range(5)]
    for which in range(8):
        labels = [f"label {number} of set {which}" for number in range(10_000)]
        yield _request("POST", "/classify", {"inputs": ["a dog"], "labels": labels, "templates": templates})


def long_labels(dimensions: int) -> Iterator[bytes]:
    """8 MB whose prompts would be 1.6 GB."""
    labels = [f"{number} ".ljust(800, "l") for number in range(10_000)]
    templates = [f"{number} {{}}".ljust(800, "t") for number in range(100)]
    yield _request("POST", "/classify", {"inputs": ["a dog"], "labels": labels, "templates": templates})


def searches(dimensions: int) -> Iterator[bytes]:
    """Yield 128 queries, of which none is near anything, and all of whose likeness is looked through at length."""
    random = np.random.default_rng(0)
    for _ in range(64):
        vectors = random.standard_normal((128, dimensions)).astype("<f4")
        queries = [{"vector": base64.b64encode(vector.tobytes()).decode()} for vector in vectors]
        body = {"queries": queries, "top_k": 20, "deduplicate": 0.01, "effort": {"exact": True}, "include": []}
        yield _request("POST", "/search/batch", body)


def wide_answers(dimensions: int) -> Iterator[bytes]:
    """Asks for answers of 50 queries × 500 results × 15 kB."""
    random = np.random.default_rng(1)
    for _ in range(6):
        vectors = random.standard_normal((50, dimensions)).astype("<f4")
        queries = [{"vector": base64.b64encode(vector.tobytes()).decode()} for vector in vectors]
        yield _request("POST", "/search/batch", {"queries": queries, "top_k": 500, "collection": "wide"})


@cache
def _picture(number: int) -> str:
    """39 megapixels of next to nothing: quick to send, slow to decode."""
    file = io.BytesIO()
    Image.new("RGB", (6_500, 6_000), (number, 80, 160)).save(file, "JPEG", quality=30, comment=f"{number}")
    return base64.b64encode(file.getvalue()).decode()


def pictures(dimensions: int) -> Iterator[bytes]:
    for which in range(24):
        inputs = [{"image": _picture(which)}] + [{"image": _unlike(_picture(which), n)} for n in range(7)]
        yield _request("POST", "/embed", {"inputs": inputs})


def _unlike(picture: str, number: int) -> str:
    """Returns the same picture in another file, which no cache knows."""
    return base64.b64encode(base64.b64decode(picture) + bytes([number])).decode()


def numbers(dimensions: int) -> Iterator[bytes]:
    """Bodies of 12 MB with nearly as many numbers as a body may hold: slow to read, quick to refuse."""
    many = b"0," * 6_000_000
    for number in range(16):
        body = b'{"inputs": ["%d"], "many": [%b0]}' % (number, many)
        kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        yield b"POST /embed HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer KEY\r\n" + kind + b"\r\n" + body


FLOODS: Sequence[Flood] = (
    Flood("forty maps of forty sizes", maps, frozenset({OK, BUSY, LATE})),
    Flood("8 sets of 10,000 labels x 5 templates", many_labels, frozenset({OK, BUSY, LATE})),
    Flood("prompts that are 200 times the request", long_labels, frozenset({OK, BUSY, LATE})),
    Flood("64 searches of 128 queries that look at everything", searches, frozenset({OK, BUSY, LATE})),
    Flood("the same, of clients that leave at once", searches, frozenset(), leaves=True),
    Flood("answers of 375 MB", wide_answers, frozenset({INVALID})),
    Flood("192 pictures that are slow to decode", pictures, frozenset({OK, BUSY, LATE})),
    Flood("16 bodies that are slow to read", numbers, frozenset({INVALID, BUSY, LATE})),
)


async def _ask(address: str, wire: bytes, leaves: bool = False) -> tuple[str, float]:
    """Code of the answer, `ok`, or `` where none came; seconds."""
    started, code = time.perf_counter(), ""
    with contextlib.suppress(OSError, EOFError, TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            code = await _answered(address, wire, leaves)
    return code, time.perf_counter() - started


async def _answered(address: str, wire: bytes, leaves: bool) -> str:
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.transport.set_write_buffer_limits(high=0)
        writer.write(wire)
        await writer.drain()
        if leaves:
            await asyncio.sleep(0.05)  # the server begins
            return ""
        head = await reader.readuntil(b"\r\n\r\n")
        status, kept = int(head[9:12]), bytearray()
        left = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        while left:
            data = await reader.read(2**20)
            if not data:
                return ""
            kept += data if status >= 300 else b""
            left -= len(data)
        try:
            return OK if status < 300 else str(json.loads(kept)["code"])
        except (ValueError, KeyError):
            return f"no problem of ours ({status})"
    finally:
        writer.transport.abort()


def _little(dimensions: int, number: int) -> Iterator[tuple[str, bytes]]:
    """Yield what the other client asks for, again and again."""
    vector = base64.b64encode(np.full(dimensions, 1.0, "<f4").tobytes()).decode()
    yield "GET /models", _request("GET", "/models")
    yield "GET /items/kept", _request("GET", "/items/kept")
    yield "POST /embed", _request("POST", "/embed", {"inputs": [f"a text of number {number}"]})
    yield "POST /search", _request("POST", "/search", {"query": {"vector": vector}, "top_k": 3})


async def _flood(server: Server, keys: Sequence[str], one: Flood, dimensions: int, number: int = 0) -> Told:
    told = Told()
    bad, good = (key.encode() for key in keys)
    wires = [wire.replace(b"KEY", bad, 1) for wire in one.wires(dimensions)]
    answers = asyncio.gather(*(_ask(server.address, wire, one.leaves) for wire in wires))
    while not answers.done() or len(told.neighbour) < _LITTLE:
        number += 1
        for name, wire in _little(dimensions, number):
            code, seconds = await _ask(server.address, wire.replace(b"KEY", good, 1))
            told.neighbour.append((name, code, seconds))
    told.answers = await answers
    return told


def flood(server: Server, keys: Sequence[str], one: Flood, dimensions: int) -> Told:
    """Send it with the first key, and little things with the second until all of it is answered."""
    before = server.rss
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    told = asyncio.run(_flood(server, keys, one, dimensions))
    status = Path(f"/proc/{server.pid}/status").read_text()
    told.extra_bytes = 1024 * int(status.partition("VmHWM:")[2].split()[0]) - before
    return told


def ended_in(server: Server, keys: Sequence[str], dimensions: int, floods: Sequence[Flood]) -> float:
    """Seconds from SIGTERM, which comes while all of the floods are under way, to the end of the server."""
    bad, good = (key.encode() for key in keys)

    async def main() -> float:
        wires = [wire.replace(b"KEY", bad, 1) for one in floods for wire in one.wires(dimensions)]
        asking = [asyncio.create_task(_ask(server.address, wire)) for wire in wires]
        await _ask(server.address, _request("GET", "/models").replace(b"KEY", good, 1))  # by then they have come
        started = time.perf_counter()
        os.kill(server.pid, signal.SIGTERM)
        await asyncio.to_thread(_wait_for_the_end, server)
        took = time.perf_counter() - started
        await asyncio.gather(*asking)
        return took

    return asyncio.run(main())


def _wait_for_the_end(server: Server) -> None:
    """Waits for the end of a child of this process, which is not waited for before."""
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)


@contextlib.contextmanager
def serving(
    bundle: Path, folder: Path, count: int = ITEMS, wide: int = WIDE
) -> Iterator[tuple[Server, list[str], int]]:
    """A server that holds so many items, and some with much metadata; the keys of two readers, and the space's
    dimensions."""
    file = folder / "keys.json"
    readers = [create_key(file, name, ["read"])[1] for name in ("flood", "neighbour")]
    writer = create_key(file, "writer", ["read", "write"])[1]
    settings = {"keys": file, "request_deadline_s": DEADLINE_S, "shutdown_grace_s": GRACE_S}
    dimensions = read_bundle(bundle).manifest.dimensions
    with isthmus("isthmus", bundle, folder / "store", **settings) as server:
        random = np.random.default_rng(2)
        items: list[dict[str, object]] = [{"id": "kept", "text": "a text that is kept"}]
        items += [{"id": f"item {number}"} for number in range(count)]
        items += [
            {"id": f"{number}", "collection": "wide", "metadata": {"t": "x" * _METADATA_BYTES}}
            for number in range(wide)
        ]
        for item in items[1:]:
            item["vector"] = base64.b64encode(random.standard_normal(dimensions).astype("<f4").tobytes()).decode()
        for start in range(0, len(items), 256):
            body = json.dumps({"items": items[start : start + 256]}).encode()
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {writer}"}
            urllib.request.urlopen(urllib.request.Request(f"{server.address}/items", body, headers)).close()
        yield server, readers, dimensions
