"""Chunks through a real Redis: dead workers, poison, a Redis that forgets, answers that are none."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis.asyncio

from service.jobs import stream
from service.jobs.ledger import Chunk, Refusal
from service.jobs.pieces import Outcome, Work
from service.jobs.plan import Piece
from service.jobs.stream import Dispatcher, NoWorkers, Poison, Worker, connect
from service.jobs.turns import Turns

SPACE, OWNER = "space", "owner"
SILENCE_S = 0.5
WORK, WORKERS = f"isthmus:jobs:1:work:{SPACE}", f"isthmus:jobs:1:workers:{SPACE}"
Embed = Callable[[Work], Awaitable[list[Outcome]]]


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await main

    asyncio.run(bounded())


def work(number: int, count: int = 1) -> Work:
    return Work("default", frozenset(), [Piece(number, "line", "", b"x") for _ in range(count)])


async def refuse(work: Work) -> list[Outcome]:
    return [Refusal(piece.line, None, "code", "detail") for piece in work.pieces]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_LOOK_S", 0.05)


@asynccontextmanager
async def dispatcher(url: str) -> AsyncIterator[Dispatcher]:
    opened = Dispatcher(url, SPACE, OWNER, 4, deliveries=2, silence_s=SILENCE_S)
    try:
        yield opened
    finally:
        await opened.close()


@asynccontextmanager
async def worker(
    url: str, embed: Embed = refuse, *, name: str = "w", deliveries: int = 2, tasks: int = 2
) -> AsyncIterator[Worker]:
    connection = connect(url)
    made = Worker(connection, SPACE, name, embed, 2, SILENCE_S)
    running = asyncio.create_task(made.run(tasks))
    try:
        while not await connection.zscore(WORKERS, name):
            pass
        yield made
    finally:
        made.stopping.set()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await connection.aclose()


@asynccontextmanager
async def raw(url: str) -> AsyncIterator["redis.asyncio.Redis"]:
    connection = connect(url)
    try:
        yield connection
    finally:
        await connection.aclose()


async def taken_by_the_dead(connection: "redis.asyncio.Redis", name: str = "dead") -> None:
    """A worker takes an entry, and is never heard of again."""
    await connection.xgroup_create(WORK, "workers", id="0", mkstream=True)
    while not await connection.xreadgroup("workers", name, {WORK: ">"}, count=1, block=5_000):
        pass


@asynccontextmanager
async def believed(url: str) -> AsyncIterator[tuple["redis.asyncio.Redis", Dispatcher]]:
    """A dispatcher that takes somebody for a worker who never does anything."""
    async with raw(url) as connection:
        await connection.zadd(WORKERS, {"other": 1e12})
        async with dispatcher(url) as server:
            await crewed(connection, server)
            yield connection, server


async def crewed(connection: "redis.asyncio.Redis", server: Dispatcher) -> None:
    while not server.workers:
        await connection.ping()


async def keys(connection: "redis.asyncio.Redis", pattern: str) -> list[bytes]:
    return [key async for key in connection.scan_iter(match=f"isthmus:jobs:1:{pattern}")]


def test_what_is_handed_out_comes_back_and_leaves_nothing(redis_url: str) -> None:
    async def main() -> None:
        async with raw(redis_url) as connection, dispatcher(redis_url) as server, worker(redis_url) as first:
            await crewed(connection, server)
            async with worker(redis_url, name="second"):
                answers = await asyncio.gather(*(server.embed(Chunk(1, n, 1), work(n)) for n in range(40)))
            assert [answer[0].line for answer in answers] == list(range(40))  # type: ignore[union-attr]
            assert 0 < first.done < 40, "two workers shared it"
            assert await keys(connection, "chunk:*") == []
            assert await connection.xlen(WORK) == 0

    run(main())


def test_what_a_dead_worker_had_is_another_s(redis_url: str) -> None:
    async def main() -> None:
        async with believed(redis_url) as (connection, server):
            answer = asyncio.create_task(server.embed(Chunk(1, 0, 1), work(7)))
            await taken_by_the_dead(connection)
            async with worker(redis_url):
                assert (await answer)[0].line == 7  # type: ignore[union-attr]

    run(main())


def test_a_worker_that_takes_long_keeps_what_it_has(redis_url: str) -> None:
    async def main() -> None:
        given, begun = asyncio.Event(), asyncio.Event()
        calls: list[str] = []

        async def slowly(work: Work) -> list[Outcome]:
            calls.append("slow")
            begun.set()
            await given.wait()
            return await refuse(work)

        async def other(work: Work) -> list[Outcome]:
            calls.append("other")
            return await refuse(work)

        async with believed(redis_url) as (connection, server), worker(redis_url, slowly):
            answer = asyncio.create_task(server.embed(Chunk(1, 0, 1), work(0)))
            await begun.wait()
            async with worker(redis_url, other, name="other"):
                # Redis' own clock says when the silence would be over.
                seconds, _ = await connection.time()
                while (await connection.time())[0] < seconds + 3:
                    await connection.ping()
                assert calls == ["slow"]
                given.set()
                await answer

    run(main())


def test_a_chunk_that_nobody_lives_to_answer_is_poison(redis_url: str) -> None:
    async def main() -> None:
        async def dies(work: Work) -> list[Outcome]:
            raise RuntimeError("what an error of ours looks like")

        async with believed(redis_url) as (_, server), worker(redis_url, dies) as worked:
            with pytest.raises(Poison):
                await server.embed(Chunk(1, 0, 2), work(0, 2))
            assert worked.done == 0

    run(main())


def test_suspects_are_tried_alone(redis_url: str) -> None:
    async def main() -> None:
        inside: set[int] = set()
        seen: list[set[int]] = []

        async def watch(work: Work) -> list[Outcome]:
            inside.add(work.pieces[0].line)
            for _ in range(20):
                await asyncio.sleep(0)
            seen.append(set(inside))
            inside.discard(work.pieces[0].line)
            return await refuse(work)

        async with believed(redis_url) as (_, server), worker(redis_url, watch, tasks=4):
            chunks = [Chunk(1, n, 1, suspect=n % 3 == 0) for n in range(30)]
            await asyncio.gather(*(server.embed(chunk, work(chunk.first)) for chunk in chunks))
        assert all(len(together) == 1 for together in seen if any(n % 3 == 0 for n in together))

    run(main())


def test_what_redis_forgets_is_handed_out_again(redis_url: str) -> None:
    async def main() -> None:
        async with believed(redis_url) as (connection, server):
            answers = [asyncio.create_task(server.embed(Chunk(1, n, 1), work(n))) for n in range(3)]
            while len(await keys(connection, "chunk:*")) < 3:
                pass
            async with connection.pipeline(transaction=True) as pipeline:
                pipeline.flushall()
                pipeline.zadd(WORKERS, {"other": 1e12})
                await pipeline.execute()
            async with worker(redis_url):
                assert [(await answer)[0].line for answer in answers] == [0, 1, 2]  # type: ignore[union-attr]

    run(main())


def test_where_no_worker_is_left_the_server_has_it_back(redis_url: str) -> None:
    async def main() -> None:
        async with believed(redis_url) as (connection, server):
            answers = [asyncio.create_task(server.embed(Chunk(1, n, 1), work(n))) for n in range(2)]
            await taken_by_the_dead(connection)
            while len(await keys(connection, "chunk:*")) < 2:
                pass
            await connection.delete(WORKERS)
            found = await asyncio.gather(*answers, return_exceptions=True)
            assert sorted(each.deliveries for each in found if isinstance(each, NoWorkers)) == [0, 1]
            assert await keys(connection, "chunk:*") == []

    run(main())


def test_answers_that_cannot_be_read_are_poison_in_the_end(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "encode_outcomes", lambda _: b"of another version")

    async def main() -> None:
        async with believed(redis_url) as (_, server), worker(redis_url):
            with pytest.raises(Poison):
                await server.embed(Chunk(1, 0, 1), work(0))

    run(main())


def test_a_redis_that_cannot_be_reached_is_as_good_as_no_worker(
    free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_LOOK_S", 0.05)

    async def main() -> None:
        async with dispatcher(f"redis://127.0.0.1:{free_port}/0") as server:
            assert server.workers == 0
            with pytest.raises(NoWorkers):
                await server.embed(Chunk(1, 0, 1), work(0))

    run(main())


def test_a_worker_that_is_stopped_gives_back_what_it_has(redis_url: str) -> None:
    async def main() -> None:
        async def never(work: Work) -> list[Outcome]:
            begun.set()
            await asyncio.Event().wait()
            raise AssertionError

        begun = asyncio.Event()
        async with believed(redis_url) as (connection, server):
            async with worker(redis_url, never):
                answer = asyncio.create_task(server.embed(Chunk(1, 0, 1), work(3)))
                await begun.wait()
            [pending] = await connection.xpending_range(WORK, "workers", "-", "+", 9)
            assert pending["time_since_delivered"] > 10_000, "anybody's at once"
            async with worker(redis_url, name="next"):
                assert (await answer)[0].line == 3  # type: ignore[union-attr]

    run(main())


def test_turns() -> None:
    async def main() -> None:
        turns = Turns()
        order: list[str] = []

        async def go(name: str, alone: bool) -> None:
            async with turns.take(alone=alone):
                order.append(f"+{name}")
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                order.append(f"-{name}")

        await asyncio.gather(go("a", False), go("b", False), go("c", True), go("d", False), go("e", False))
        assert order == ["+a", "+b", "-a", "-b", "+c", "-c", "+d", "+e", "-d", "-e"]

    run(main())
