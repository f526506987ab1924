"""Does a restart cost a request? Two replicas behind nginx are restarted in turn under load; every answer is counted.

python -m benchmarks.rolling [--restarts 20] [--clients 8] [--bundle build/starter]

nginx (Debian's nginx-light) runs deploy/nginx/nginx.conf with local addresses. A restart is what an orchestrator does:
SIGTERM, wait for the end, start again, wait for /readyz. Clients embed texts and photographs, search, label and write,
one request after the other, and never try again. Each replica has a store of its own, so a written item must be in one
of the two. Prints a line per restart and, as its last line, one JSON object: `tried` requests; `refused`, those that
were answered with anything but 200; `crashed`, replicas that ended otherwise than by the signal or did not come back;
`lost`, items that were acknowledged and are nowhere; `unanswered`, requests without an answer. All but the first must
be 0.
"""

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image

from benchmarks.commands import finish, parser_of
from benchmarks.servers import BenchmarkError, Restarted, at_once, free_port, stored_items, variables, wait_until

NGINX_CONF = Path(__file__).parents[1] / "deploy/nginx/nginx.conf"
_DRAIN_S = 3.0
_END_S = 60.0
_WORDS = ("dog", "snow", "beach", "rain", "siren", "harbour", "red", "a", "of", "two", "running", "church")


@dataclass
class Findings:
    restarts: int = 0
    tried: int = 0
    refused: int = 0
    crashed: int = 0
    lost: int = 0
    unanswered: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    written: set[str] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answered(self, status: int, seconds: float, written: str | None) -> None:
        with self._lock:
            self.tried += 1
            self.statuses[status] += 1
            self.refused += status != 200
            self.seconds.append(seconds)
            if written is not None and status == 200:
                self.written.add(written)

    def failed(self, error: httpx2.TransportError) -> None:
        with self._lock:
            self.tried += 1
            self.unanswered += 1
            self.failures[type(error).__name__] += 1

    @property
    def good(self) -> bool:
        return not (self.refused or self.crashed or self.lost or self.unanswered)

    def summary(self) -> dict[str, float]:
        counted = {name: getattr(self, name) for name in ("restarts", "tried", "refused", "crashed", "lost")}
        p50, p99, most = np.percentile(self.seconds or [0.0], (50, 99, 100)) * 1_000
        times = {"p50_ms": round(p50, 1), "p99_ms": round(p99, 1), "max_ms": round(most, 1)}
        return counted | {"unanswered": self.unanswered, "written": len(self.written)} | times


def nginx_conf(text: str, replicas: list[int], port: int, folder: Path) -> str:
    """The deployed configuration, with local addresses and files in a folder."""
    for number, replica in enumerate(replicas, start=1):
        text = text.replace(f"isthmus-{number}:8000", f"127.0.0.1:{replica}")
    text = text.replace("listen 8000;", f"listen 127.0.0.1:{port};")
    text = text.replace(" /tmp/", f" {folder}/")  # first: the folder itself may be in /tmp
    # To a file: a connection that is refused is no news here.
    text = text.replace("error_log /dev/stderr", f"error_log {folder}/error.log")
    as_root = "user root;\n" if os.geteuid() == 0 else ""  # else its workers could not read the folder
    return f"{as_root}daemon off;\n{text}"


@contextmanager
def nginx(replicas: list[int], folder: Path) -> Iterator[str]:
    """nginx before the replicas' ports; gives its address."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        raise BenchmarkError("nginx is not installed: apt-get install nginx-light")
    port = free_port()
    conf = folder / "nginx.conf"
    conf.write_text(nginx_conf(NGINX_CONF.read_text(), replicas, port, folder))
    with subprocess.Popen([program, "-p", str(folder), "-c", str(conf)]) as process:
        try:
            wait_until(f"http://127.0.0.1:{port}/healthz", process)  # type: ignore[arg-type]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGQUIT)


def _photograph(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).resize((320, 240)).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def client(address: str, number: int, findings: Findings, stopped: threading.Event) -> None:
    """Requests of each kind in turn, until told to stop."""
    photographs = [_photograph(100 * number + seed) for seed in range(4)]
    with httpx2.Client(base_url=address, timeout=120, trust_env=False) as http:
        for count in itertools.count():
            if stopped.is_set():
                return
            text = " ".join(_WORDS[(count * step + number) % len(_WORDS)] for step in (1, 5, 7)) + f" {count}"
            item = f"client {number} item {count}"
            path, body, written = (
                ("/embed", {"inputs": [text]}, None),
                ("/search", {"query": text, "top_k": 3}, None),
                ("/items", {"items": [{"id": item, "text": text}]}, item),
                ("/embed", {"inputs": [{"image": photographs[count % len(photographs)]}]}, None),
                ("/classify", {"inputs": [text], "labels": list(_WORDS[:6])}, None),
            )[count % 5]
            started = time.perf_counter()
            try:
                answer = http.post(path, json=body)
            except httpx2.TransportError as error:
                findings.failed(error)
            else:
                findings.answered(answer.status_code, time.perf_counter() - started, written)


def roll(
    bundle: Path,
    folder: Path,
    restarts: int,
    clients: int = 8,
    drain_s: float = _DRAIN_S,
    say: Callable[[str], None] = print,
) -> Findings:
    findings = Findings()
    env = variables(drain_s=drain_s, cache_bytes=0, device="cpu")
    replicas = [Restarted(bundle, folder / f"store-{number}", env) for number in range(2)]
    with ExitStack() as closing:
        for replica in replicas:
            closing.callback(replica.kill)
            replica.start()
        for replica in replicas:
            replica.wait()
            httpx2.put(f"{replica.address}/collections/default", json={}, trust_env=False).raise_for_status()
        address = closing.enter_context(nginx([replica.port for replica in replicas], folder))
        with at_once(*(partial(client, address, number, findings) for number in range(clients))):
            for number in range(restarts):
                replica = replicas[number % len(replicas)]
                ended = replica.end()
                try:
                    replica.start()
                    replica.wait()
                except BenchmarkError:
                    ended = False
                findings.crashed += not ended
                findings.restarts += 1
                told = f"{findings.tried} requests, {dict(findings.statuses)}, {dict(findings.failures)}"
                say(f"restart {number + 1}: {told}")
        there: set[str] = set()
        for replica in replicas:
            with httpx2.Client(base_url=replica.address, timeout=60, trust_env=False) as http:
                there |= {item["id"] for item in stored_items(http)}
    findings.lost = len(findings.written - there)
    return findings


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("rolling", __doc__)
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--drain", type=float, default=_DRAIN_S, metavar="SECONDS", help="ISTHMUS_DRAIN_S")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        findings = roll(options.bundle, Path(folder), options.restarts, options.clients, options.drain)
    print(json.dumps(findings.summary()))
    return int(not findings.good)


if __name__ == "__main__":
    finish(main)
