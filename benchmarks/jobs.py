"""What a bulk job costs whoever asks meanwhile, and how fast it is: `python -m benchmarks.jobs --bundle build/starter`.

Requests for one text or one image, so many a second, are timed three times: alone; while the same images are sent by
POST /items in requests like any other; and while a job indexes them. Then jobs alone, of images and of ready vectors.
"""

import argparse
import base64
import itertools
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from benchmarks.inputs import Inputs
from benchmarks.load import Generator, Load, request
from benchmarks.servers import isthmus
from service.contract.bundle import read_bundle

_RATE = 8.0
_CLIENTS, _TOGETHER = 2, 32
_DIFFERENT = 300
_VECTORS = 50_000


def measure(bundle: Path, seconds: float) -> dict[str, float]:
    inputs = Inputs()
    images = [base64.b64encode(inputs.image()).decode() for _ in range(_DIFFERENT)]
    figures: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        # Nothing is answered from the cache, so that a few images do for many.
        isthmus("isthmus", bundle, Path(folder) / "store", cache_bytes=0) as server,
        Generator(server.address) as generator,
        httpx2.Client(base_url=server.address, timeout=120, trust_env=False) as client,
    ):
        asked = _requests(urlsplit(server.address).netloc, inputs, images)
        generator.open(asked, rate=_RATE, seconds=3)
        figures |= _told("alone", generator.open(asked, rate=_RATE, seconds=seconds))
        with _sending(client, images) as sent:
            time.sleep(2)
            before = sum(sent)
            load = generator.open(asked, rate=_RATE, seconds=seconds)
            figures |= _told("items", load) | {"items.per_s": round((sum(sent) - before) / seconds, 1)}
        with _job(client, (_image(number, images) for number in range(10_000))) as job:
            _until(client, job, 200)
            before = client.get(f"/jobs/{job}").json()["done"]
            load = generator.open(asked, rate=_RATE, seconds=seconds)
            done = client.get(f"/jobs/{job}").json()["done"] - before
            figures |= _told("job", load) | {"job.per_s": round(done / seconds, 1)}
            time.sleep(6)  # nobody is expected any more
            before = client.get(f"/jobs/{job}").json()["done"]
            time.sleep(seconds)
            done = client.get(f"/jobs/{job}").json()["done"] - before
            figures["job_alone.per_s"] = round(done / seconds, 1)
        dimensions = read_bundle(bundle).manifest.dimensions
        vectors = inputs.vectors(_VECTORS, dimensions)
        rows = ({"id": f"v{n}", "vector": base64.b64encode(each).decode()} for n, each in enumerate(vectors))
        started = time.perf_counter()
        with _job(client, rows) as job:
            spooled = time.perf_counter() - started
            _until(client, job, _VECTORS)
            figures["vectors.per_s"] = round(_VECTORS / (time.perf_counter() - started - spooled), 1)
    return figures


def _requests(host: str, inputs: Inputs, images: Sequence[str]) -> list[bytes]:
    """A text, an image, and so on."""
    bodies: list[Any] = []
    for number in range(60):
        bodies += [inputs.text(), {"image": images[number]}]
    return [request(host, "/embed", json.dumps({"inputs": [each]}).encode()) for each in bodies]


def _image(number: int, images: Sequence[str]) -> dict[str, str]:
    return {"id": f"{number}", "image": images[number % len(images)]}


@contextmanager
def _sending(client: httpx2.Client, images: Sequence[str]) -> Iterator[list[int]]:
    """Bulk work as ordinary requests."""
    stopped, sent, numbers = threading.Event(), [], itertools.count()

    def send() -> None:
        while not stopped.is_set():
            items = [_image(next(numbers), images) for _ in range(_TOGETHER)]
            if client.post("/items", json={"items": items}).is_success:
                sent.append(_TOGETHER)

    threads = [threading.Thread(target=send) for _ in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield sent
    finally:
        stopped.set()
        for thread in threads:
            thread.join()


@contextmanager
def _job(client: httpx2.Client, items: Iterator[dict[str, str]]) -> Iterator[str]:
    lines = (json.dumps(each).encode() + b"\n" for each in items)
    blocks = (b"".join(itertools.islice(lines, 50)) for _ in itertools.count())
    answer = client.post(
        "/jobs",
        content=itertools.takewhile(len, blocks),
        headers={"content-type": "application/jsonl"},
    )
    job = answer.raise_for_status().json()["id"]
    try:
        yield job
    finally:
        client.delete(f"/jobs/{job}")


def _until(client: httpx2.Client, job: str, done: int) -> None:
    while client.get(f"/jobs/{job}").json()["done"] < done:
        time.sleep(0.05)


def _told(name: str, load: Load) -> dict[str, float]:
    if load.unanswered or set(load.statuses) != {200}:
        raise RuntimeError(f"{name}: {dict(load.statuses)}, {load.unanswered} without an answer")
    return {f"{name}.p{each}_ms": round(1_000 * load.latency(each), 1) for each in (50, 99)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jobs", description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    figures = measure(**vars(parser.parse_args(arguments)))
    print(f"{'':34}{'p50 ms':>9}{'p99 ms':>9}{'items/s':>9}")
    for name, said in (
        ("alone", "requests alone"),
        ("items", "beside POST /items"),
        ("job", "beside a job"),
        ("job_alone", "a job alone, images"),
        ("vectors", "a job alone, ready vectors"),
    ):
        row = [figures.get(f"{name}.{key}", "") for key in ("p50_ms", "p99_ms", "per_s")]
        print(f"{said:34}{row[0]:>9}{row[1]:>9}{row[2]:>9}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
