"""Does anything that a client can send hurt the service? Sends it what is made to hurt, one by one, and looks.

python -m benchmarks.hostile [--bundle build/starter] [--seed 0] [--only GROUP]

Each attack goes over a socket to a live server. It is to be answered as `attacks` says, within 2 s, with no more than
300 MB of memory beyond what the server had when it was ready; and after it the server has to be ready. What was stored
before has to be there at the end. A job is waited for, and what it says of itself and its items is what is looked at;
nothing may have been written outside. A sound that is honest, and only long, may take a hundredth of the length of its
channels, for it is decoding and the model's work; its memory may not grow. Then come floods of one client
(`hostile_floods`): what another asks for meanwhile is looked at in the same way. Prints what was not so and, as its
last line, one JSON object.
"""

import json
import re
import select
import socket
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks import hostile_floods as floods
from benchmarks.attacks import Attack, everything
from benchmarks.commands import finish, parser_of
from benchmarks.hostile_jobs import TRACE
from benchmarks.hostile_media import OK
from benchmarks.servers import Server, isthmus
from service.contract.bundle import read_bundle

ANSWER_S, MEMORY_BYTES = 2.0, 300_000_000
_OF_A_SOUND = 0.01
_PATIENCE_S = 30.0
_JOB_S = 30.0
"""The seconds that a job may take to come to its end."""
_KEPT = 50
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass
class Group:
    tried: int = 0
    longest_s: float = 0.0
    slowest: str = ""
    most_mb: float = 0.0
    greediest: str = ""

    def take(self, attack: Attack, seconds: float, mb: float) -> None:
        self.tried += 1
        if seconds > self.longest_s:
            self.longest_s, self.slowest = seconds, attack.name
        if mb > self.most_mb:
            self.most_mb, self.greediest = mb, attack.name


@dataclass
class Findings:
    tried: int = 0
    refused_as_documented: int = 0
    answered_as_valid: int = 0
    otherwise: int = 0
    """Answered, but not as it should have been."""
    slow: int = 0
    greedy: int = 0
    crashed: int = 0
    lost: int = 0
    unanswered: int = 0
    unready: int = 0
    escaped: int = 0
    """Files that a job wrote where it should not."""
    longest_s: float = 0.0
    most_mb: float = 0.0
    groups: dict[str, Group] = field(default_factory=dict)

    @property
    def bad(self) -> int:
        return self.otherwise + self.crashed + self.lost + self.unanswered + self.unready + self.escaped


@dataclass(frozen=True)
class Answer:
    status: int
    code: str
    seconds: float
    job: str = ""
    """The id of the job that it made."""


def send(address: str, attack: Attack) -> Answer | None:
    """Sends an attack; returns the answer, None where none came."""
    parts = urlsplit(address)
    assert parts.hostname is not None and parts.port is not None
    started = time.perf_counter()
    with socket.create_connection((parts.hostname, parts.port), timeout=_PATIENCE_S) as connection:

        def write() -> None:
            with suppress(OSError):  # it may be refused before it is sent
                connection.sendall(attack.wire)
                if attack.ends:
                    connection.shutdown(socket.SHUT_WR)

        writing = threading.Thread(target=write, daemon=True)
        writing.start()
        received = bytearray()
        with suppress(OSError):
            while not _whole(received) and (data := connection.recv(65_536)):
                received += data
        seconds = time.perf_counter() - started
        if attack.goes_on:
            writing.join(_PATIENCE_S)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        writing.join()
    if not _whole(received):
        return None
    status = int(received[9:12])
    body = bytes(received).partition(b"\r\n\r\n")[2]
    job = json.loads(body)["id"] if status == 202 else ""
    return Answer(status, OK if status < 300 else _code(body), seconds, job)


@contextmanager
def crowd(address: str, attack: Attack) -> Iterator[None]:
    """The attack's other connections, which that are answered, and do not read."""
    parts = urlsplit(address)
    answered = select.poll()
    with ExitStack() as open_ones:
        for _ in range(attack.crowd):
            connection = open_ones.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            connection.connect((parts.hostname, parts.port))
            connection.sendall(attack.wire)
            answered.register(connection, select.POLLIN)
        waiting, until = attack.crowd, time.monotonic() + _PATIENCE_S
        while waiting and time.monotonic() < until:
            for descriptor, _ in answered.poll(1_000):
                answered.unregister(descriptor)
                waiting -= 1
        yield


def outcome(address: str, job: str) -> str | None:
    """Return what a job says of itself: its code, or those of its items, `ok` where some were stored; None: no end."""
    ended = time.monotonic() + _JOB_S
    while time.monotonic() < ended:
        with urllib.request.urlopen(f"{address}/jobs/{job}", timeout=_PATIENCE_S) as answer:
            told = json.load(answer)
        if told["state"] == "failed":
            return str(told["error"]["code"])
        if told["state"] == "done":
            with urllib.request.urlopen(f"{address}/jobs/{job}/errors", timeout=_PATIENCE_S) as answer:
                codes = {json.loads(line)["code"] for line in answer}
            return "+".join(sorted(codes | ({OK} if told["done"] or not codes else set())))
        time.sleep(0.005)
    return None


def _whole(received: bytes | bytearray) -> bool:
    end = received.find(b"\r\n\r\n")
    length = _LENGTH.search(received, 0, end) if end >= 0 else None
    return length is not None and len(received) >= end + 4 + int(length[1])


def _code(body: bytes) -> str:
    try:
        told = json.loads(body)
        return str(told["error"]["code"] if "error" in told else told["code"])
    except (ValueError, KeyError, TypeError):
        return "no problem of ours"


def _memory(server: Server) -> int:
    """The most that it held since `_forget`, in bytes."""
    text = Path(f"/proc/{server.pid}/status").read_text()
    return 1024 * int(text.partition("VmHWM:")[2].split()[0])


def _forget(server: Server) -> None:
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")


def flood_all(bundle: Path, folder: Path, findings: Findings) -> None:
    """Send each flood, and in the middle of some SIGTERM. What the other client asks for counts as an attack does."""
    with floods.serving(bundle, folder) as (server, keys, dimensions):
        for one in floods.FLOODS:
            told = floods.flood(server, keys, one, dimensions)
            wrong = []
            for code, seconds in told.answers:
                findings.tried += 1
                findings.unanswered += not code and not one.leaves
                findings.answered_as_valid += code == OK
                findings.refused_as_documented += code in one.right - {OK}
                if code and code not in one.right:
                    findings.otherwise += 1
                    wrong.append(f"{code}, not {' or '.join(sorted(one.right))}")
                if seconds > floods.DEADLINE_S + ANSWER_S:
                    findings.slow += 1
                    wrong.append(f"answered after {seconds:.1f} s")
            for name, code, seconds in told.neighbour:
                findings.tried += 1
                findings.longest_s = max(findings.longest_s, seconds)
                findings.answered_as_valid += code == OK
                findings.otherwise += code not in (OK, "")
                findings.unanswered += not code
                findings.slow += seconds > ANSWER_S
                if code != OK or seconds > ANSWER_S:
                    wrong.append(f"another client's {name}: {code or 'no answer'} after {seconds:.1f} s")
            findings.most_mb = max(findings.most_mb, told.extra_bytes / 1e6)
            findings.greedy += told.extra_bytes > floods.MEMORY_BYTES
            what, _, slowest = told.slowest
            print(
                f"flood: {one.name}: {len(told.answers)} requests; another client's {len(told.neighbour)}, the slowest "
                f"{what} {slowest:.2f} s; {told.extra_bytes / 1e6:.0f} MB",
                flush=True,
            )
            for reason in sorted(set(wrong)):
                print(f"flood: {one.name}: {reason}", flush=True)
        took = floods.ended_in(server, keys, dimensions, [floods.FLOODS[0], floods.FLOODS[3]])
        findings.slow += took > floods.ENDED_S
        print(f"SIGTERM in the middle of floods: ended after {took:.1f} s", flush=True)


def _ready(server: Server) -> bool:
    try:
        with urllib.request.urlopen(f"{server.address}/readyz", timeout=_PATIENCE_S) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _keep(server: Server) -> None:
    items = [{"id": f"kept {number}", "text": f"a text of number {number}"} for number in range(_KEPT)]
    request = urllib.request.Request(
        f"{server.address}/items", json.dumps({"items": items}).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=_PATIENCE_S).close()


def _kept(server: Server) -> int:
    there = 0
    for number in range(_KEPT):
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(f"{server.address}/items/kept%20{number}", timeout=_PATIENCE_S).close()
            there += 1
    return there


def attack_all(bundle: Path, store: Path, attacks: Iterable[Attack]) -> Findings:
    """A server of its own; another one, on the same store, where an attack ends it."""
    findings = Findings()
    upcoming = iter(attacks)
    left: Attack | None = next(upcoming, None)
    kept = 0
    while left is not None:
        with isthmus("isthmus", bundle, store) as server:
            if not kept:
                _keep(server)
                kept = _KEPT
            for path in ("/healthz", "/readyz"):
                urllib.request.urlopen(server.address + path, timeout=_PATIENCE_S).close()
            before = server.rss
            while left is not None:
                alive = _one(server, left, before, findings)
                left = next(upcoming, None)
                if not alive:
                    break
            else:
                findings.lost = kept - _kept(server)
    findings.escaped = _escaped(store)
    return findings


def _escaped(store: Path) -> int:
    """Files with a name from a job's input: none may have one, wherever it is."""
    written = [*Path("/tmp").glob(f"*{TRACE}*"), *Path("/").glob(f"*{TRACE}*"), *Path.cwd().glob(f"*{TRACE}*")]
    written += store.parent.rglob(f"*{TRACE}*")
    for path in written:
        print(f"ESCAPED: {path}", flush=True)
    return len(written)


def _one(server: Server, attack: Attack, before: int, findings: Findings) -> bool:
    """Return whether the server lives."""
    findings.tried += 1
    _forget(server)
    with crowd(server.address, attack):
        answer = send(server.address, attack)
    if answer is not None and answer.job:
        with suppress(OSError):  # it is gone: told below
            told = outcome(server.address, answer.job)
            answer = None if told is None else replace(answer, code=told)
    ready = _ready(server)
    try:
        extra = _memory(server) - before
    except (OSError, IndexError):  # the process is gone
        findings.crashed += 1
        print(f"CRASHED by {attack.group}: {attack.name}", flush=True)
        return False
    wrong = []
    if answer is None:
        findings.unanswered += 1
        wrong.append("unanswered")
    else:
        findings.longest_s = max(findings.longest_s, answer.seconds)
        if answer.code not in attack.right or answer.status >= 500:
            findings.otherwise += 1
            wrong.append(f"{answer.status} {answer.code}, not {' or '.join(sorted(attack.right))}")
        elif answer.code == OK:
            findings.answered_as_valid += 1
        else:
            findings.refused_as_documented += 1
        if answer.seconds > max(ANSWER_S, _OF_A_SOUND * attack.sound_s):
            findings.slow += 1
            wrong.append(f"{answer.seconds:.1f} s")
    if not ready:
        findings.unready += 1
        wrong.append("not ready afterwards")
    findings.most_mb = max(findings.most_mb, extra / 1e6)
    group = findings.groups.setdefault(attack.group, Group())
    group.take(attack, 0.0 if answer is None else answer.seconds, extra / 1e6)
    if extra > MEMORY_BYTES:
        findings.greedy += 1
        wrong.append(f"{extra / 1e6:.0f} MB")
    if wrong:
        print(f"{attack.group}: {attack.name}: {', '.join(wrong)}", flush=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("hostile", __doc__)
    parser.add_argument("--seed", type=int, default=0, help="of what is damaged, and how")
    parser.add_argument(
        "--only",
        metavar="GROUP",
        help="images, large images, sounds, strangers, damaged, json, forms, http, crowds, jobs, floods",
    )
    options = parser.parse_args(arguments)
    manifest = read_bundle(options.bundle).manifest
    attacks = () if options.only == "floods" else everything(options.seed, manifest.name, manifest.dimensions)
    chosen = (attack for attack in attacks if options.only in (None, attack.group))
    with tempfile.TemporaryDirectory() as folder:
        findings = attack_all(options.bundle, Path(folder) / "store", chosen)
        if options.only in (None, "floods"):
            flood_all(options.bundle, Path(folder), findings)
    print(f"{'group':14}{'tried':>6}{'slowest':>9}{'most MB':>9}   which those were")
    for name, group in findings.groups.items():
        which = f"{group.slowest}; {group.greediest}"
        print(f"{name:14}{group.tried:6}{group.longest_s:8.2f}s{group.most_mb:9.0f}   {which}")
    print(json.dumps({name: round(value, 3) for name, value in vars(findings).items() if name != "groups"}))
    return int(bool(findings.bad or findings.slow or findings.greedy))


if __name__ == "__main__":
    finish(main)
