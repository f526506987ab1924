"""Break what the service stands on, under load, and look what becomes of it and of its clients.

python -m benchmarks.chaos [--bundle build/starter] [--seconds 4] [--only FAULT] [--times 1]

Clients embed, search, and store items, all the time. A fault is made, stays for a while, and is taken away. Counted are
the answers that clients get meanwhile, how long it then takes until the server is ready and stores again, and whether
every item that was acknowledged is there. Prints a table and, as its last line, one JSON object.

The faults want Linux. A full disk is a tmpfs of its own where one may be mounted, or else files that may not grow; one
that a client fills is the former. The clock wants libfaketime (Debian's package faketime), and Redis a redis-server.
What cannot be made here is left out.
"""

import base64
import itertools
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import httpx2
import redis

from benchmarks import hostile_media as media
from benchmarks.commands import finish, parser_of
from benchmarks.sabotage import HANG_S
from benchmarks.servers import Restarted, at_once, free_port, stored_items, variables

_CLIENTS = 6
_PATIENCE_S = 20.0
_RECOVERY_S = 30.0
_DEADLINE_S = 2.0
"""The server's request deadline: shorter than its default, as HANG_S is."""
_LOG_CHARACTERS = 6_000
_UPLOADS = 4
_TMPFS_BYTES = 96_000_000  # the log of writes alone grows to 33 MB before it is folded in
_FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"  # for programs of many threads
DOCUMENTED = frozenset({200, 408, 429, 503, 504})
"""What may be answered while something is broken: done, or refused so that a client knows to come again."""


class LeftOut(Exception):
    """This fault cannot be made here: the message says why."""


@dataclass
class Load:
    """Holds what clients did and got. `cut` are requests whose connection was closed before they were answered."""

    answers: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    refused: int = 0
    """Connections that nobody took."""
    unanswered: int = 0
    acknowledged: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Outcome:
    fault: str
    load: Load
    lost: int
    recovered_s: float | None
    said: str
    """What readiness said while it was broken."""
    log: str
    """The end of the server's log."""
    cuts: bool = False
    """Whether the fault itself closes connections."""
    refuses: bool = False
    """Whether the fault itself lets nobody in."""
    unnoticed: bool = False
    """Whether it is to keep nothing from working for others."""
    overdrawn: int = 0
    """Bytes that jobs took of what is to stay free of the disk."""

    @property
    def otherwise(self) -> int:
        right = DOCUMENTED - {503} if self.unnoticed else DOCUMENTED
        return sum(count for status, count in self.load.answers.items() if status not in right) + (self.overdrawn > 0)

    @property
    def crashed(self) -> int:
        return int(self.recovered_s is None) + self.load.cut * (not self.cuts) + self.load.refused * (not self.refuses)


def ask(port: int, method: str, path: str, body: bytes = b"", patience_s: float = _PATIENCE_S) -> tuple[int, bytes]:
    """Asks once. Raises OSError or HTTPException where nothing comes back."""
    connection = HTTPConnection("127.0.0.1", port, timeout=patience_s)
    try:
        connection.request(method, path, body or None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _requests(number: int, rng: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """(id to be stored or nothing, path, body), without end."""
    pictures = [base64.b64encode(media.picture(size=(40, 30 + pixels))).decode() for pixels in range(4)]
    for turn in itertools.count():
        match rng.choice(("text", "picture", "search", "store", "store")):
            case "text":
                yield "", "/embed", json.dumps({"inputs": [f"a text {number} {turn}"]}).encode()
            case "picture":
                yield "", "/embed", json.dumps({"inputs": [{"image": rng.choice(pictures)}]}).encode()
            case "search":
                yield "", "/search", json.dumps({"query": f"a query {turn}", "top_k": 3}).encode()
            case _:
                id = f"client {number}, item {turn}"
                item = {"id": id, "text": f"an item {number} {turn}", "metadata": {"padding": "x" * 2_000}}
                yield id, "/items", json.dumps({"items": [item]}).encode()


@contextmanager
def loaded(port: int) -> Iterator[Load]:
    """Clients that go on asking, whatever they get, until the block ends."""
    load, run = Load(), random.randrange(10**9)

    def client(number: int, ended: threading.Event) -> None:
        for id, path, body in _requests(run + number, random.Random(number)):
            if ended.is_set():
                return
            try:
                status, _ = ask(port, "POST", path, body)
            except TimeoutError:
                with load.lock:
                    load.unanswered += 1
            except ConnectionRefusedError:
                with load.lock:
                    load.refused += 1
                ended.wait(0.02)
            except (OSError, HTTPException):
                with load.lock:
                    load.cut += 1
                ended.wait(0.02)
            else:
                with load.lock:
                    load.answers[status] += 1
                    if id and status == 200:
                        load.acknowledged.add(id)
                if status != 200:
                    ended.wait(0.02)

    with at_once(*(partial(client, number) for number in range(_CLIENTS))):
        yield load


def _stored(address: str) -> set[str]:
    with httpx2.Client(base_url=address, timeout=_PATIENCE_S, trust_env=False) as http:
        return {item["id"] for item in stored_items(http)}


def _recovered(port: int) -> float | None:
    """Seconds until the server is ready and stores an item; None where it does neither in the end."""
    started = time.monotonic()
    body = json.dumps({"items": [{"id": "after the fault", "text": "an item"}]}).encode()
    while time.monotonic() - started < _RECOVERY_S:
        with suppress(OSError, HTTPException):
            ready, told = ask(port, "GET", "/readyz", patience_s=6)
            if ready == 200 and not json.loads(told)["failing"] and ask(port, "POST", "/items", body)[0] == 200:
                return time.monotonic() - started
        time.sleep(0.02)
    return None


def _readiness(port: int) -> str:
    try:
        status, body = ask(port, "GET", "/readyz", patience_s=8)
    except (OSError, HTTPException):
        return "no answer"
    failing = json.loads(body).get("failing", [])
    return f"{status} {' '.join(failing)}".strip()


# Faults: each is given the server, and is a context in which something is broken.


@dataclass
class Site:
    """Says where a fault is made."""

    folder: Path
    server: Restarted
    redis_port: int
    redis: "subprocess.Popen[bytes] | None"
    overdrawn: int = 0
    """See Outcome."""


Fault = Callable[[Site], AbstractContextManager[None]]


@contextmanager
def workers(site: Site) -> Iterator[None]:
    """End every thread of the models and decoders, four times. What one had in hand is tried once more, and only once:
    it is answered by the next time."""
    for _ in range(4):
        site.server.signal(signal.SIGUSR1)
        time.sleep(_DEADLINE_S)
    yield


@contextmanager
def process_killed(site: Site) -> Iterator[None]:
    site.server.kill()
    yield
    site.server.start()
    site.server.wait()


@contextmanager
def process_ended(site: Site) -> Iterator[None]:
    """SIGTERM, as a rolling restart sends it."""
    site.server.end()
    yield
    site.server.start()
    site.server.wait()


@contextmanager
def model_hangs(site: Site) -> Iterator[None]:
    site.server.signal(signal.SIGUSR2)
    time.sleep(_DEADLINE_S + HANG_S)
    yield
    site.server.signal(signal.SIGUSR2)


@contextmanager
def redis_stopped(site: Site) -> Iterator[None]:
    """Redis takes connections, and says nothing."""
    assert site.redis is not None
    site.redis.send_signal(signal.SIGSTOP)
    yield
    site.redis.send_signal(signal.SIGCONT)


@contextmanager
def redis_slow(site: Site) -> Iterator[None]:
    """Redis answers nobody for 80 ms out of every 90."""

    def sleep(done: threading.Event) -> None:
        with redis.Redis(port=site.redis_port) as connection:
            while not done.wait(0.01):
                connection.execute_command("DEBUG", "SLEEP", "0.08")

    with at_once(sleep):
        yield


@contextmanager
def redis_corrupt(site: Site) -> Iterator[None]:
    """Fill it with noise of the right length, of the wrong length, or of another type."""

    def spoil(connection: "redis.Redis", key: bytes, rng: random.Random) -> None:
        length = connection.strlen(key) if connection.type(key) == b"string" else 0
        match rng.randrange(3):
            case 0:
                connection.set(key, rng.randbytes(int(length)))
            case 1:
                connection.set(key, b"")
            case _:
                connection.delete(key)
                connection.lpush(key, "x")

    def corrupt(done: threading.Event) -> None:
        rng = random.Random(0)
        with redis.Redis(port=site.redis_port) as connection:
            while not done.wait(0.01):
                for key in connection.scan_iter("isthmus:*", count=1_000):
                    with suppress(redis.exceptions.ResponseError):  # the server writes the same keys
                        spoil(connection, key, rng)

    with at_once(corrupt):
        yield


@contextmanager
def disk_full(site: Site) -> Iterator[None]:
    store = site.folder / "disk"
    if os.path.ismount(store):
        filling = store / "filling"
        with suppress(OSError), filling.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65_536))
        yield
        filling.unlink()
        return
    # Files may be no larger than the store's are now: a write past that fails, as one on a full disk does.
    largest = max(path.stat().st_size for path in store.rglob("*") if path.is_file())
    before = resource.prlimit(site.server.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(site.server.pid, resource.RLIMIT_FSIZE, (largest, before[1]))
    yield
    resource.prlimit(site.server.pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def uploads_without_end(site: Site) -> Iterator[None]:
    """One client sends jobs that do not say how long they are, and do not end, several at once: the others must not
    notice, and what is to stay free of the disk is not for jobs."""
    disk = site.folder / "disk"
    if not os.path.ismount(disk):
        raise LeftOut("no disk of its own can be mounted")
    size, least = _ROOMS["uploads without end"]
    refused = threading.Event()
    block = json.dumps({"id": "a", "text": "x" * 1_000_000}).encode() + b"\n"
    chunk = b"%x\r\n%b\r\n" % (len(block), block)
    kind = b"Content-Type: application/jsonl\r\nTransfer-Encoding: chunked\r\n"
    head = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\n" + kind + b"\r\n"

    def upload(done: threading.Event) -> None:
        while not done.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", site.server.port), timeout=5) as connection:
                connection.sendall(head)
                while not done.is_set() and not select.select([connection], [], [], 0)[0]:
                    connection.sendall(chunk)
            refused.set()

    def watch(done: threading.Event) -> None:
        while not done.wait(0.002):
            taken = 0
            for file in (disk / "store" / "jobs").rglob("input"):
                with suppress(OSError):  # it is gone
                    taken += file.stat().st_size
            site.overdrawn = max(site.overdrawn, taken - (size - least))

    with at_once(watch, *[upload] * _UPLOADS):
        refused.wait(_PATIENCE_S)
        yield


@contextmanager
def descriptors_used_up(site: Site) -> Iterator[None]:
    """There is room for three more, and clients that only connect take them."""
    pid = site.server.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 3, before[1]))
    idle = [socket.create_connection(("127.0.0.1", site.server.port)) for _ in range(20)]
    yield
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    for connection in idle:
        connection.close()


@contextmanager
def clock_jumps(site: Site) -> Iterator[None]:
    """Ten years on, ten years back, and a minute back."""
    clock = site.folder / "clock"
    for jump in ("+3650d", "-3650d", "-60s"):
        clock.write_text(jump)
        time.sleep(1.2)
    yield
    clock.write_text("+0")


@contextmanager
def clients_vanish(site: Site) -> Iterator[None]:
    """Clients go away beside those that stay: within the head, within the body, before the answer, by a reset."""
    body = json.dumps({"inputs": [{"image": base64.b64encode(media.picture(size=(300, 300))).decode()}] * 4}).encode()
    kind = "Content-Type: application/json\r\n"
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{kind}Content-Length: {len(body)}\r\n\r\n"
    wire = head.encode() + body

    def vanish(seed: int, done: threading.Event) -> None:
        rng = random.Random(seed)
        while not done.wait(0.005):
            with suppress(OSError), socket.create_connection(("127.0.0.1", site.server.port), timeout=5) as connection:
                connection.sendall(wire[: rng.choice((20, len(wire) // 2, len(wire)))])
                if rng.random() < 0.5:
                    linger = b"\1\0\0\0\0\0\0\0"  # on, 0 s: a reset
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with at_once(*(partial(vanish, seed) for seed in range(3))):
        yield


FAULTS: Mapping[str, Fault] = {
    "workers killed": workers,
    "process killed": process_killed,
    "process ended": process_ended,
    "model hangs": model_hangs,
    "redis stopped": redis_stopped,
    "redis slow": redis_slow,
    "redis corrupt": redis_corrupt,
    "disk full": disk_full,
    "uploads without end": uploads_without_end,
    "descriptors used up": descriptors_used_up,
    "clock jumps": clock_jumps,
    "clients vanish": clients_vanish,
}
_CUTTING = frozenset({"process killed", "descriptors used up"})
"""What has no descriptor for a connection can only close it, and does so at once, before anything was read."""
_UNNOTICED = frozenset({"uploads without end"})
"""What keeps nothing from working for others."""
_ROOMS = {"disk full": (_TMPFS_BYTES, 1_000_000), "uploads without end": (2 * _TMPFS_BYTES, 120_000_000)}
"""Bytes of a disk of its own, and those that are to be left of it."""
_REFUSING = _CUTTING | {"process ended"}
"""A server that is told to end lets nobody in, and answers whoever is in."""


@contextmanager
def _site(fault: str, bundle: Path) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="isthmus-chaos-") as name:
        folder = Path(name)
        settings: dict[str, object] = {"queue_inputs": 256, "request_deadline_s": _DEADLINE_S, "cache_bytes": 0}
        (folder / "disk").mkdir()
        size, least = _ROOMS.get(fault, (0, 0))
        mounted = bool(size) and _mounted(folder / "disk", size)
        settings["min_free_bytes"] = least or 1_000_000
        started: subprocess.Popen[bytes] | None = None
        port = 0
        try:
            if fault.startswith("redis"):
                started, port = _redis(folder)
                settings["redis_url"] = f"redis://127.0.0.1:{port}/0"
            env = variables(**settings) | (_faketime(folder) if fault == "clock jumps" else {})
            log = folder / "server.log"
            server = Restarted(bundle, folder / "disk" / "store", env, log, module="benchmarks.sabotage")
            try:
                server.start()
                server.wait()
                yield Site(folder, server, port, started)
            finally:
                server.kill()
        finally:
            if started is not None:
                started.kill()
                started.wait()
            if mounted:
                subprocess.run(["umount", str(folder / "disk")], check=True)


def _mounted(folder: Path, size: int) -> bool:
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return os.geteuid() == 0 and not subprocess.run(["mount", *options], capture_output=True, check=False).returncode


def _redis(folder: Path) -> tuple["subprocess.Popen[bytes]", int]:
    program = shutil.which("redis-server")
    if program is None:
        raise LeftOut("there is no redis-server")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    options += ["--enable-debug-command", "yes"]
    process = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    with redis.Redis(port=port) as connection:
        while process.poll() is None:
            with suppress(redis.exceptions.ConnectionError, redis.exceptions.BusyLoadingError):
                connection.ping()
                return process, port
            time.sleep(0.02)
    raise LeftOut("redis-server does not start")


def _faketime(folder: Path) -> dict[str, str]:
    library = next(iter(sorted(Path("/").glob(_FAKETIME[1:]))), None)
    if library is None:
        raise LeftOut("there is no libfaketime (Debian's package faketime)")
    (folder / "clock").write_text("+0")
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
        "FAKETIME_CACHE_DURATION": "1",  # seconds until the file is read again
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # which no clock that is set, or goes wrong, changes
    }


def suffer(fault: str, bundle: Path, seconds: float) -> Outcome:
    """Looks at the server under load: as it should be, broken for so many seconds, and repaired. Raises LeftOut."""
    with _site(fault, bundle) as site:
        with loaded(site.server.port) as load:
            time.sleep(min(1.0, seconds / 2))
            with FAULTS[fault](site):
                said = _readiness(site.server.port)
                time.sleep(seconds)
            recovered = _recovered(site.server.port)
            time.sleep(min(1.0, seconds / 2))
        lost = len(load.acknowledged - _stored(site.server.address))
        log = site.server.log.read_text(errors="replace")[-_LOG_CHARACTERS:]
    return Outcome(
        fault,
        load,
        lost,
        recovered,
        said,
        log,
        cuts=fault in _CUTTING,
        refuses=fault in _REFUSING,
        unnoticed=fault in _UNNOTICED,
        overdrawn=site.overdrawn,
    )


def row(outcome: Outcome) -> str:
    load = outcome.load
    answers = " ".join(f"{status}×{count}" for status, count in sorted(load.answers.items()))
    recovered = "never" if outcome.recovered_s is None else f"{outcome.recovered_s:.1f} s"
    overdrawn = f" {outcome.overdrawn:,} bytes of the disk overdrawn" if outcome.overdrawn else ""
    return (
        f"{outcome.fault:20} {answers:44} {load.cut:>5} {load.refused:>8} {load.unanswered:>10} "
        f"{len(load.acknowledged):>8} {outcome.lost:>5} {recovered:>9}  {outcome.said}{overdrawn}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("chaos", __doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for which something is broken")
    parser.add_argument("--only", choices=FAULTS, action="append", help="one fault; may be given again")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="that each fault is made")
    options = parser.parse_args(arguments)
    print(
        f"{'fault':20} {'answers':44} {'cut':>5} {'no entry':>8} {'unanswered':>10} {'stored':>8} {'lost':>5} "
        f"{'recovered':>9}  readiness meanwhile"
    )
    totals: Counter[str] = Counter(tried=0, refused_as_documented=0, otherwise=0, crashed=0, lost=0, unanswered=0)
    left_out = []
    for fault in [fault for fault in options.only or FAULTS for _ in range(options.times)]:
        try:
            outcome = suffer(fault, options.bundle, options.seconds)
        except LeftOut as reason:
            print(f"{fault:20} left out: {reason}")
            left_out.append(fault)
            continue
        print(row(outcome), flush=True)
        if outcome.otherwise or outcome.crashed:
            print(outcome.log)
        load = outcome.load
        totals["tried"] += load.answers.total() + load.cut + load.refused + load.unanswered
        totals["refused_as_documented"] += sum(load.answers[status] for status in DOCUMENTED - {200})
        totals["otherwise"] += outcome.otherwise
        totals["crashed"] += outcome.crashed
        totals["lost"] += outcome.lost
        totals["unanswered"] += load.unanswered
    made = options.times * len(options.only or FAULTS) - len(left_out)
    told: dict[str, Any] = {"faults": made, "left_out": left_out} | totals
    print(json.dumps(told))
    return int(bool(totals["otherwise"] or totals["crashed"] or totals["lost"] or totals["unanswered"]))


if __name__ == "__main__":
    finish(main)
