"""Does every search see the store as it is? Records what many clients do at once, and looks for an order that explains
it.

python -m benchmarks.consistency [--searches 20000] [--bundle build/starter] [--seed 0]

Writers replace items, and delete some of them, as fast as they are answered, several writers the same items. Other
clients search meanwhile, in every way there is, so many times in each. Every write has a version of its own, which the
item's metadata, vector and modality follow from. Whatever the clients did to one id must have an order, in which each
operation lies between its begin and its end and each search finds what was written last before it (it is linearizable).
A search that no such order has room for is counted: as `missing` where it did not find the item, `stale` where it found
what had been replaced, `resurrected` what had been deleted, `phantom` what was never written. Its last line is one JSON
object, with the rate of acknowledged writes of an item beside these counts.
"""

import itertools
import json
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np

from benchmarks.commands import finish, parser_of
from benchmarks.crash import vector_of
from benchmarks.servers import at_once, isthmus
from service.contract.bundle import read_bundle

_ALWAYS = tuple(f"always {number}" for number in range(3))
"""Ids that are replaced and never deleted: every search finds them."""
_SOMETIMES = tuple(f"sometimes {number}" for number in range(3))
_IDS = (*_ALWAYS, *_SOMETIMES)
_WRITERS = 2
_SEARCHERS = 2
_WORDS = "the harbour at night "
_LONG = 80
"""Repetitions of the words that make metadata too long to be held in memory."""
_ALONE = 0.999
"""Similarity that no two versions have."""


class Operation(NamedTuple):
    """Holds what one client did to one id, or found of it. A value of None: the item is not there."""

    id: str
    write: bool
    value: int | None
    begun: float
    ended: float


@dataclass
class Findings:
    operations: int = 0
    searches: int = 0
    missing: int = 0
    stale: int = 0
    resurrected: int = 0
    phantom: int = 0
    writes_per_s: float = 0.0


def judge(history: Iterable[Operation]) -> Counter[str]:
    """Return how many reads of one id no order explains, and what is wrong with each.

    Goes through the begins and ends in their order and holds every state that the id may be in: its value, the writes
    under way that have happened, and the reads under way that are explained (Lowe, "Testing for linearizability").
    """
    operations = list(history)
    events = sorted(
        [(made.begun, 0, number) for number, made in enumerate(operations)]
        + [(made.ended, 1, number) for number, made in enumerate(operations)]
    )
    states: set[tuple[int | None, frozenset[int]]] = {(None, frozenset())}
    writes: set[int] = set()
    reads: set[int] = set()
    wrong: Counter[str] = Counter()
    for _, ends, number in events:
        operation = operations[number]
        if not ends:
            (writes if operation.write else reads).add(number)
            if not operation.write:
                states = {(value, _with(done, number, value == operation.value)) for value, done in states}
            continue
        explained: set[tuple[int | None, frozenset[int]]] = set()
        waiting, seen = list(states), set(states)
        while waiting:
            value, done = waiting.pop()
            if number in done:
                explained.add((value, done - {number}))
                continue
            for write in writes - done:
                new = operations[write].value
                after = (new, done | {write} | {read for read in reads if operations[read].value == new})
                if after not in seen:
                    seen.add(after)
                    waiting.append(after)
        (writes if operation.write else reads).discard(number)
        if explained:
            states = explained
        else:
            wrong[_kind(operation, operations)] += 1
    return wrong


def _with(done: frozenset[int], number: int, happened: bool) -> frozenset[int]:
    return done | {number} if happened else done


def _kind(read: Operation, operations: Sequence[Operation]) -> str:
    if read.value is None:
        return "missing"
    made = [
        operation
        for operation in operations
        if operation.write and operation.value == read.value and operation.begun < read.ended
    ]
    if not made:
        return "phantom"
    deleted = any(
        operation.write and operation.value is None and made[0].ended < operation.begun and operation.ended < read.begun
        for operation in operations
    )
    return "resurrected" if deleted else "stale"


@dataclass
class Client:
    """One connection, and what was done and found over it."""

    http: httpx2.Client
    dimensions: int
    rng: random.Random
    operations: list[Operation] = field(default_factory=list)
    phantoms: int = 0
    """Results that are twice in an answer, of no id that was written, or not what their version is."""

    def write(self, versions: Iterator[int]) -> None:
        """Replace some items, or delete some of those that may be deleted."""
        if self.rng.random() < 0.2:
            chosen = self.rng.sample(_SOMETIMES, self.rng.randint(1, 2))
            self._post("/items/delete", {"ids": chosen}, dict.fromkeys(chosen))
        else:
            made = {id: next(versions) for id in self.rng.sample(_IDS, self.rng.randint(1, 3))}
            items = [item(id, version, self.dimensions) for id, version in made.items()]
            self._post("/items", {"items": items}, made)

    def _post(self, path: str, body: Mapping[str, Any], made: Mapping[str, int | None]) -> None:
        begun = time.perf_counter()
        self.http.post(path, json=body).raise_for_status()
        ended = time.perf_counter()
        self.operations += [Operation(id, True, version, begun, ended) for id, version in made.items()]

    def search(self, look: "Callable[[Client], list[dict[str, Any]]]", ids: Sequence[str] = _IDS) -> None:
        begun = time.perf_counter()
        results = look(self)
        ended = time.perf_counter()
        stored: dict[str, int] = {}
        for result in results:
            id, version = result["id"], result["metadata"]["version"]
            expected = item(id, version, self.dimensions)
            whole = result["metadata"] == expected["metadata"] and result["modality"] == expected["modality"]
            if "vector" in result:
                whole = whole and np.allclose(result["vector"], expected["vector"], atol=1e-6)
            self.phantoms += id in stored or id not in _IDS or not whole
            stored[id] = version
        self.operations += [Operation(id, False, stored.get(id), begun, ended) for id in ids]


@lru_cache(4_096)
def item(id: str, version: int, dimensions: int) -> Mapping[str, Any]:
    words = _WORDS * (_LONG if version % 2 else 1)
    metadata = {"version": version, "of": id, "shelf": version % 7, "words": words}
    vector = vector_of(id, version, dimensions).tolist()
    return {"id": id, "vector": vector, "modality": ("image", "text", "audio")[version % 3], "metadata": metadata}


def _searched(**asked: Any) -> "Callable[[Client], list[dict[str, Any]]]":
    def look(client: Client) -> list[dict[str, Any]]:
        query = {"vector": vector_of("query", client.rng.randrange(100), client.dimensions).tolist()}
        answer = client.http.post("/search", json={"query": query, "top_k": 50} | asked)
        results: list[dict[str, Any]] = answer.raise_for_status().json()["results"]
        if "keywords" in asked:
            # Found by its words and by its vector: each of them is a search that may miss it.
            results = [
                result for result in results if result["explain"]["keyword_rank"] and result["explain"]["vector_rank"]
            ]
        return results

    return look


def _listed(client: Client) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = client.http.get("/items").raise_for_status().json()["items"]
    return items


KINDS: "Mapping[str, Callable[[Client], list[dict[str, Any]]]]" = {
    "plain": _searched(),
    "vector": _searched(include=["metadata", "vector"]),
    "contains": _searched(filter={"words": {"$contains": "harbour"}}),
    "not contains": _searched(filter={"$not": {"words": {"$contains": "desert"}}}),
    "deduplicate": _searched(deduplicate=_ALONE),
    "keywords": _searched(
        keywords={"query": "harbour"}, filter={"shelf": {"$gte": 0}}, include=["metadata", "explain"]
    ),
    "exact": _searched(effort={"exact": True}, filter={"shelf": {"$lt": 7}}),
    "list": _listed,
}
CORRECTED = {"correction": _searched(correction=0.5)}
"""The searches of bundles that have means of their modalities."""


def consistency(bundle: Path, store: Path, searches: int, seed: int = 0) -> Findings:
    """Makes so many searches of each kind while the items are written, and what was wrong with them."""
    manifest = read_bundle(bundle).manifest
    kinds = {**KINDS, **(CORRECTED if manifest.means else {})}
    rng = random.Random(seed)
    versions = itertools.count(1)  # next() of it is one step of the interpreter
    findings = Findings()
    with ExitStack() as stack:
        served = stack.enter_context(isthmus("consistency", bundle, store, modalities=next(iter(manifest.towers))))

        def client() -> Client:
            http = httpx2.Client(base_url=served.address, timeout=60, trust_env=False)
            return Client(stack.enter_context(http), manifest.dimensions, random.Random(rng.random()))

        writers, searchers = [client() for _ in range(_WRITERS)], [client() for _ in range(_SEARCHERS)]
        writers[0].http.put("/collections/default", json={"keywords": ["words"]}).raise_for_status()
        started = time.perf_counter()

        def writing(client: Client, stopped: threading.Event) -> None:
            while not stopped.is_set():
                client.write(versions)

        with at_once(*(partial(writing, writer) for writer in writers)) as stopped:

            def searching(
                client: Client, look: Callable[[Client], list[dict[str, Any]]], count: int, _: object
            ) -> None:
                for _ in range(count):
                    if stopped.is_set():
                        break
                    client.search(look)

            for name, look in kinds.items():
                shares = [searches // _SEARCHERS + (number < searches % _SEARCHERS) for number in range(_SEARCHERS)]
                shared = zip(searchers, shares, strict=True)
                with at_once(*(partial(searching, searcher, look, count) for searcher, count in shared)):
                    pass  # until each has had its share
                print(f"{name}: {searches} searches, {time.perf_counter() - started:.1f} s", flush=True)
        elapsed_s = time.perf_counter() - started
    written = [operation for client in writers for operation in client.operations]
    histories: dict[str, list[Operation]] = defaultdict(list)
    for operation in itertools.chain(written, *(client.operations for client in searchers)):
        histories[operation.id].append(operation)
    wrong = sum((judge(history) for history in histories.values()), Counter())
    findings.operations = sum(map(len, histories.values()))
    findings.searches = searches * len(kinds)
    findings.missing, findings.stale, findings.resurrected = (
        wrong[name] for name in ("missing", "stale", "resurrected")
    )
    findings.phantom = wrong["phantom"] + sum(client.phantoms for client in searchers)
    findings.writes_per_s = round(len(written) / elapsed_s, 1)
    return findings


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("consistency", __doc__)
    parser.add_argument("--searches", type=int, default=20_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of what is written and asked")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        findings = consistency(options.bundle, Path(folder) / "store", options.searches, options.seed)
    print(json.dumps(vars(findings)))
    return int(bool(findings.missing or findings.stale or findings.resurrected or findings.phantom))


if __name__ == "__main__":
    finish(main)
