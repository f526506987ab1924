"""Is everything that was acknowledged still there after `kill -9`? Kills the server at random moments and looks.

python -m benchmarks.crash [--kills 50] [--bundle build/starter] [--seed 0]

Several clients upsert and delete batches at once, each over ids of its own, so that what an id must hold is known: what
was acknowledged last, or else, of the one batch that was under way, all of it or nothing. A vector follows from its id
and version. After every kill the server is started again on what is there, and every item is looked at twice, as a row
and through the index. More clients race to replace and delete the same video: whoever was last, each video has the
moments of its own file and no others. Prints a line per kill and, as its last line, one JSON object.
"""

import base64
import json
import os
import random
import signal
import tempfile
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from benchmarks.commands import finish, parser_of
from benchmarks.servers import Server, at_once, isthmus, stored_items
from service.contract.bundle import read_bundle
from service.contract.vectors import Vectors, l2_normalise
from service.store import moments, schema, upkeep
from tests.service.films import colours

_CLIENTS = 4
_IDS = 300
"""The items of each client: together more than a graph is built from, so that indexes are built and saved while it
is killed."""
_FILMERS = 3
_FILMS = 4
"""Ids of each of them, besides the one that all of them write."""
_COLOURS = ("red", "green", "blue")
_LONGEST_S = 1.5
_START_S = 120.0


@dataclass
class Client:
    """Holds what one client knows. A version of None: the item is not there."""

    name: str
    acknowledged: dict[str, int | None] = field(default_factory=dict)
    under_way: dict[str, int | None] = field(default_factory=dict)
    """What the batch that was not answered would make of its ids."""
    writes: int = 0
    version: int = 0


@dataclass
class Findings:
    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    duplicates: int = 0
    half_written: int = 0
    strayed: int = 0
    """Videos without their moments, and moments of a video that is gone or was replaced."""


def vector_of(id: str, version: int, dimensions: int) -> Vectors:
    rng = np.random.default_rng([zlib.crc32(id.encode()), version])
    return l2_normalise(rng.standard_normal(dimensions))


@contextmanager
def server(bundle: Path, store: Path) -> Iterator[tuple[Server, httpx2.Client]]:
    """A server and a client of it."""
    towers = read_bundle(bundle).manifest.towers
    settings = {"max_top_k": 2 * _CLIENTS * _IDS, "modalities": next(iter(towers))}
    with (
        isthmus("crash", bundle, store, **settings) as served,
        httpx2.Client(base_url=served.address, timeout=60, trust_env=False) as client,
    ):
        yield served, client


def write(client: Client, http: httpx2.Client, rng: random.Random, dimensions: int, stopped: threading.Event) -> None:
    """Batches, one after the other, until the server is gone."""
    ids = [f"{client.name} {number}" for number in range(_IDS)]
    while not stopped.is_set():
        deleting = rng.random() < 0.25
        chosen = rng.sample(ids, rng.randint(1, 12 if deleting else 40))
        client.version += 1
        client.under_way = dict.fromkeys(chosen, None if deleting else client.version)
        try:
            if deleting:
                http.post("/items/delete", json={"ids": chosen}).raise_for_status()
            else:
                items = [_item(id, client.version, dimensions) for id in chosen]
                http.post("/items", json={"items": items}).raise_for_status()
        except httpx2.TransportError:
            return
        client.acknowledged |= client.under_way
        client.under_way = {}
        client.writes += len(chosen)


def write_videos(
    client: Client, http: httpx2.Client, rng: random.Random, begun: threading.Semaphore, stopped: threading.Event
) -> None:
    """Replace or delete a video of its own and the one that all write, in one batch, until the server is gone."""
    while not stopped.is_set():
        unshared, shared = f"{client.name} {rng.randrange(_FILMS)}", "the film"
        deleting = rng.random() < 0.25
        client.version += 1
        client.under_way = {unshared: None if deleting else client.version}
        try:
            if deleting:
                http.post("/items/delete", json={"ids": [unshared, shared]}).raise_for_status()
            else:
                film = _film(rng.choice(_COLOURS), rng.randint(1, 4))
                items = [
                    {"id": id, "video": film, "metadata": {"version": client.version, "of": id, "by": client.name}}
                    for id in (unshared, shared)
                ]
                http.post("/items", json={"items": items}).raise_for_status()
        except httpx2.TransportError:
            return
        client.acknowledged |= client.under_way
        client.under_way = {}
        client.writes += 1
        begun.release()


@cache
def _film(colour: str, seconds: int) -> str:
    return base64.b64encode(colours(colour, seconds=seconds)).decode()


def strayed(store: Path) -> int:
    """Return how many videos have no moments, and how many moments are not of their video as it is (see Findings)."""
    with closing(schema.connect(store / schema.FILE, read_only=True)) as connection:
        rows = connection.execute(
            """SELECT name, id, metadata FROM items JOIN collections ON collections.key = items.collection
            WHERE modality = 'video'"""
        ).fetchall()
    videos = {id: json.loads(row) for name, id, row in rows if name == schema.DEFAULT_COLLECTION}
    owners = [json.loads(row) for name, _, row in rows if name == moments.moments_table(schema.DEFAULT_COLLECTION)]
    ids = [owner.pop(moments.OWNER) for owner in owners]
    elsewhere = [id for id, owner in zip(ids, owners, strict=True) if videos.get(id) != owner]
    return len(videos.keys() - set(ids)) + len(elsewhere)


def _item(id: str, version: int, dimensions: int) -> dict[str, Any]:
    vector = base64.b64encode(vector_of(id, version, dimensions).tobytes()).decode()
    return {"id": id, "vector": vector, "modality": "image", "metadata": {"version": version, "of": id}}


def look(http: httpx2.Client, clients: list[Client], findings: Findings, dimensions: int) -> None:
    """Compare what is there with what must be there, and take it as what is known from now on."""
    rows: dict[str, int] = {}
    for item in stored_items(http):
        findings.duplicates += item["id"] in rows
        rows[item["id"]] = _version(item, findings)
    stored: dict[str, int] = {}
    query = {"vector": vector_of("query", 0, dimensions).tolist()}
    expected: dict[str, Any] = {
        "query": query,
        "top_k": 2 * _CLIENTS * _IDS,
        "include": ["metadata", "vector"],
        "effort": {"exact": True},
    }
    for item in http.post("/search", json=expected).raise_for_status().json()["results"]:
        findings.duplicates += item["id"] in stored
        stored[item["id"]] = version = _version(item, findings)
        if item["modality"] != "video" and not np.allclose(
            item["vector"], vector_of(item["id"], version, dimensions), atol=1e-6
        ):
            findings.half_written += 1
    # What the index does not find, or finds as it was, is as good as lost.
    findings.lost += sum(stored.get(id) != rows.get(id) for id in stored.keys() | rows.keys())
    for client in clients:
        _judge(client, rows, findings)


def _version(item: Mapping[str, Any], findings: Findings) -> int:
    whole = item["metadata"].get("of") == item["id"] and isinstance(item["metadata"].get("version"), int)
    findings.half_written += not whole
    return int(item["metadata"]["version"]) if whole else -1


def _judge(client: Client, rows: Mapping[str, int], findings: Findings) -> None:
    applied = [rows.get(id) == version for id, version in client.under_way.items()]
    # An id that the batch would leave as it is tells nothing of whether it was written.
    changing = [
        done
        for (id, version), done in zip(client.under_way.items(), applied, strict=True)
        if version != client.acknowledged.get(id)
    ]
    findings.half_written += bool(changing) and any(changing) and not all(changing)
    expected = client.acknowledged | (client.under_way if changing and all(changing) else {})
    findings.lost += sum(rows.get(id) != version for id, version in expected.items())
    findings.acknowledged += client.writes
    client.writes = 0
    client.under_way = {}
    client.acknowledged = {id: rows.get(id) for id in expected}


def crash(bundle: Path, store: Path, kills: int, seed: int = 0) -> Findings:
    """Kill the server so often, and what was found after each kill."""
    rng = random.Random(seed)
    dimensions = read_bundle(bundle).manifest.dimensions
    clients = [Client(f"client {number}") for number in range(_CLIENTS)]
    filmers = [Client(f"filmer {number}") for number in range(_FILMERS)]
    findings = Findings()
    while True:
        with server(bundle, store) as (served, http):
            if findings.kills:
                look(http, [*clients, *filmers], findings, dimensions)
                findings.strayed += strayed(store)
                told = f"{findings.acknowledged} writes acknowledged, {findings.lost} lost"
                print(f"kill {findings.kills}: {told}", flush=True)
            if findings.kills == kills:
                break
            begun = threading.Semaphore(0)
            works = [partial(write, client, http, random.Random(rng.random()), dimensions) for client in clients]
            works += [partial(write_videos, filmer, http, random.Random(rng.random()), begun) for filmer in filmers]
            with at_once(*works) as stopped:
                for _ in range(_FILMERS):  # the first video takes longer than all that follow
                    begun.acquire(timeout=_START_S)
                stopped.wait(rng.uniform(0.05, _LONGEST_S))
                os.kill(served.pid, signal.SIGKILL)
            findings.kills += 1
    wrong = [said for good, said in upkeep.check(store) if not good]
    if wrong:
        raise RuntimeError(f"the store is not whole: {'; '.join(wrong)}")
    return findings


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("crash", __doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of what is written and when it is killed")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        findings = crash(options.bundle, Path(folder) / "store", options.kills, options.seed)
    print(json.dumps(vars(findings)))
    return int(bool(findings.lost or findings.duplicates or findings.half_written or findings.strayed))


if __name__ == "__main__":
    finish(main)
