"""Many inputs go in batches, several at once, in order; an error concerns one input alone.

`Plan`s are generators that yield calls and are sent their results, so that both clients drive the same logic.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from isthmus_client import calls
from isthmus_client.calls import Call, NewItem
from isthmus_client.errors import InvalidInput, Refused, ServerFailed
from isthmus_client.inputs import Input, to_wire, wire_size
from isthmus_client.results import Embedding, Problem, Written

B = TypeVar("B")
R = TypeVar("R")
S = TypeVar("S")
Plan = Generator[Call[Any], Any, R]
UNREADABLE = "unreadable_file"


@dataclass(frozen=True)
class Batching:
    """Bounds a request to so many inputs and about so many bytes; `concurrency` requests are under way at once."""

    inputs: int = 64
    bytes: int = 8_000_000
    concurrency: int = 4

    def __post_init__(self) -> None:
        if min(self.inputs, self.bytes, self.concurrency) < 1:
            raise ValueError(f"inputs, bytes and concurrency are 1 or more, not {self}")


@dataclass(frozen=True)
class Entry:
    """Holds one input with its position and its wire form, or why it has none."""

    number: int
    source: Any
    wire: str | dict[str, Any] | Problem


def of_inputs(inputs: Iterable[Input], batching: Batching) -> Iterator[list[Entry]]:
    return _batches(inputs, to_wire, batching)


def of_items(items: Iterable[NewItem], batching: Batching) -> Iterator[list[Entry]]:
    return _batches(items, partial(NewItem.to_wire, as_file=True), batching)


def embedded(batch: Sequence[Entry], options: Mapping[str, Any]) -> Plan[list[Embedding]]:
    """Return the embedding or the error of each entry, numbered as the entries are."""

    def ask(wires: Sequence[Any]) -> Call[list[Embedding]]:
        return calls.embed(wires, options)

    results = yield from _each(batch, ask, lambda entry, problem: Embedding(entry.number, error=problem))
    return [replace(result, index=entry.number) for entry, result in zip(batch, results, strict=True)]


def written(batch: Sequence[Entry]) -> Plan[list[Written]]:
    def ask(wires: Sequence[Any]) -> Call[list[Written]]:
        return calls.upsert(wires, "null")

    def on_failure(entry: Entry, problem: Problem) -> Written:
        return Written(entry.source.id, entry.source.collection, error=problem)

    return (yield from _each(batch, ask, on_failure))


def _each(
    batch: Sequence[Entry],
    ask: Callable[[Sequence[Any]], Call[list[R]]],
    on_failure: Callable[[Entry, Problem], R],
) -> Plan[list[R]]:
    """Send all inputs that can be sent, and put the errors of the others in their places."""
    sendable = [entry for entry in batch if not isinstance(entry.wire, Problem)]
    answers = iter((yield from _halved(sendable, ask, on_failure)))
    return [on_failure(entry, entry.wire) if isinstance(entry.wire, Problem) else next(answers) for entry in batch]


def _halved(
    batch: Sequence[Entry],
    ask: Callable[[Sequence[Any]], Call[list[R]]],
    on_failure: Callable[[Entry, Problem], R],
) -> Plan[list[R]]:
    """Send a batch; one that fails for what it holds is sent again in halves, until each bad input is alone."""
    if not batch:
        return []
    try:
        answers: list[R] = yield ask([entry.wire for entry in batch])
    except (InvalidInput, ServerFailed) as error:
        if not _of_inputs(error):
            raise
        if len(batch) == 1:
            return [on_failure(batch[0], Problem(error.code, _reason(error)))]
        middle = len(batch) // 2
        first = yield from _halved(batch[:middle], ask, on_failure)
        return first + (yield from _halved(batch[middle:], ask, on_failure))
    return answers


def _of_inputs(error: InvalidInput | ServerFailed) -> bool:
    """Return whether the inputs are wrong, or their number or size, and not an option, which all requests share.

    The server's failure (500) or deadline (504) counts as well: one input may be the reason.
    """
    if isinstance(error, ServerFailed):
        return error.status in (500, 504)
    return not error.errors or any(tuple(problem["loc"])[1:2] in (("inputs",), ("items",)) for problem in error.errors)


def _reason(error: Refused) -> str:
    """Return the error in words, after the name of the field if it concerns one."""
    if not error.errors:
        return error.detail
    first = error.errors[0]
    where = ".".join(str(part) for part in first["loc"][3:])
    words = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {words}" if where else words


def _batches(
    sources: Iterable[S], to_wire: Callable[[S], str | dict[str, Any]], batching: Batching
) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    total = 0
    for number, source in enumerate(sources):
        wire: str | dict[str, Any] | Problem
        try:
            wire = to_wire(source)
            size = wire_size(wire)
        except OSError as error:
            wire, size = Problem(UNREADABLE, f"{error.filename}: {error.strerror or error}"), 0
        if batch and (len(batch) == batching.inputs or total + size > batching.bytes):
            yield batch
            batch, total = [], 0
        batch.append(Entry(number, source, wire))
        total += size
    if batch:
        yield batch


def map_lazily(function: Callable[[B], R], batches: Iterator[B], concurrency: int) -> Generator[R, None, None]:
    """Map a function over batches in so many threads, in order; batches are read only as calls end."""
    with ThreadPoolExecutor(concurrency, "isthmus-client") as pool:
        running: deque[Future[R]] = deque()
        try:
            for batch in batches:
                running.append(pool.submit(function, batch))
                if len(running) == concurrency:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


async def gather_lazily(
    function: Callable[[B], Awaitable[R]], batches: Iterator[B], concurrency: int
) -> AsyncGenerator[R, None]:
    """Do the same with tasks. Batches are made in a thread: that may read files."""
    running: deque[asyncio.Future[R]] = deque()
    try:
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            running.append(asyncio.ensure_future(function(batch)))
            if len(running) == concurrency:
                yield await running.popleft()
        while running:
            yield await running.popleft()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
