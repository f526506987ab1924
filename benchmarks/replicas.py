"""How soon does one replica find what another has stored? Two service processes over one Milvus Lite and one Redis.

python -m benchmarks.replicas [--items 200] [--bundle build/starter]

Each item is stored and deleted through one process and searched for through the other, the two taking turns. Prints a
table and, as its last line, one JSON object.
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import numpy as np

from benchmarks.servers import BenchmarkError, isthmus

_LONGEST_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__.split("\n")[0])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shared = {
            "milvus_uri": stack.enter_context(_milvus(folder / "milvus")),
            "redis_url": stack.enter_context(_redis()),
        }
        clients = [
            stack.enter_context(httpx2.Client(base_url=server.address, timeout=60, trust_env=False))
            for name in ("one", "other")
            for server in [stack.enter_context(isthmus(name, options.bundle, Path("milvus"), **shared))]
        ]
        found, gone, at_once = [], [], 0
        for number in range(options.items):
            writer, reader = clients[number % 2], clients[1 - number % 2]
            item = {"id": f"{number}", "text": f"item {number}"}
            writer.post("/items", json={"items": [item]}).raise_for_status()
            looks, took = _until(reader, item, present=True)
            found.append(took)
            writer.delete(f"/items/{number}").raise_for_status()
            more, took = _until(reader, item, present=False)
            gone.append(took)
            at_once += looks == more == 1
    print(f"{'':24}{'p50':>10}{'p99':>10}{'slowest':>10}   ms after the answer")
    for name, times in (("stored, then found", found), ("deleted, then gone", gone)):
        print(
            f"{name:24}" + "".join(f"{1e3 * value:10.1f}" for value in (*np.quantile(times, (0.5, 0.99)), max(times)))
        )
    print(f"{at_once} of {options.items} by the first request, both times")
    slowest = max(*found, *gone)
    print(json.dumps({"items": options.items, "at_once": at_once, "slowest_ms": round(1e3 * slowest, 1)}))


def _until(reader: httpx2.Client, item: dict[str, str], *, present: bool) -> tuple[int, float]:
    """Requests, and seconds, until the item is found first, or not at all."""
    began, looks = time.perf_counter(), 0
    while time.perf_counter() - began < _LONGEST_S:
        looks += 1
        answer = reader.post("/search", json={"query": item["text"], "top_k": 1}).raise_for_status().json()
        if (item["id"] in [each["id"] for each in answer["results"]]) == present:
            return looks, time.perf_counter() - began
    raise BenchmarkError(f"after {_LONGEST_S} s the other replica does not know about item {item['id']}")


@contextmanager
def _milvus(folder: Path) -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-u", "-m", "milvus_lite", "server", "--data-dir", str(folder), "--host", "127.0.0.1"]
    with _started([*command, "--port", str(port)], "listening"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def _redis() -> Iterator[str]:
    program, port = shutil.which("redis-server"), _free_port()
    if program is None:
        raise BenchmarkError("redis-server is not installed")
    with _started([program, "--port", str(port), "--save", "", "--bind", "127.0.0.1"], "Ready to accept"):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def _started(command: list[str], said: str) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        if not any(said in line for line in process.stdout):
            raise BenchmarkError(f"{command[0]} did not start")
        yield
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
