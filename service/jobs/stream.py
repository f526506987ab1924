"""Chunks of jobs through Redis: the server hands them out and takes vectors back, workers embed. Decision 18 says why.

    isthmus:jobs:1:work:SPACE           stream, group `workers`: which chunks are to be done, each an entry
    isthmus:jobs:1:workers:SPACE        sorted set: workers by when they were last heard of, in Redis' own time
    isthmus:jobs:1:chunk:OWNER:…        a chunk's content, until it is done
    isthmus:jobs:1:results:OWNER        stream: what came of the chunks that this owner (a server's ledger) handed out

Nothing here is the truth: the ledger is. What Redis forgets is handed out again; what comes twice is ignored.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError, ResponseError

from service.jobs.ledger import Chunk
from service.jobs.pieces import Outcome, Work, decode_outcomes, decode_work, encode_outcomes, encode_work
from service.jobs.turns import Turns

log = logging.getLogger(__name__)

_PREFIX = "isthmus:jobs:1"
_GROUP = "workers"
_LOOK_S = 1.0
_BLOCK_MS = 1_000
_TIMEOUT_S = 10.0
"""Longer than a read blocks."""
_PAUSE_S = 1.0
"""Before Redis is asked again after a failure."""
_KEPT_S = 86_400
"""Of what nobody comes back for."""
_LONG_AGO_MS = 10**9

_FAILURES = (RedisError, OSError, TimeoutError)


class NoWorkers(Exception):
    """No worker is there any more. `deliveries`: how often one had this chunk."""

    def __init__(self, deliveries: int) -> None:
        super().__init__(f"delivered {deliveries} times")
        self.deliveries = deliveries


class Poison(Exception):
    """Whoever takes this chunk up does not live to answer."""


def connect(url: str) -> "redis.asyncio.Redis":
    return redis.asyncio.Redis.from_url(url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=None)


def _stream(space: str) -> str:
    return f"{_PREFIX}:work:{space}"


def _workers(space: str) -> str:
    return f"{_PREFIX}:workers:{space}"


def _results(owner: str) -> str:
    return f"{_PREFIX}:results:{owner}"


@dataclass(eq=False)
class _Handed:
    """A chunk that was handed out."""

    key: str
    content: bytes
    suspect: bool
    result: "asyncio.Future[list[Outcome]]"
    entry: bytes | None = None
    """Of the stream; None while it could not be written there."""
    broken: int = 0
    """Answers that could not be read."""
    missed: int = 0
    """Looks in a row that did not find it in Redis."""


class Dispatcher:
    """The server's side. Lives on one event loop; `close` it."""

    def __init__(self, url: str, space: str, owner: str, dimensions: int, *, deliveries: int, silence_s: float) -> None:
        self._redis = connect(url)
        self._space, self._owner, self._dimensions = space, owner, dimensions
        self._deliveries, self._silence_s = deliveries, silence_s
        self._handed: dict[str, _Handed] = {}
        self._workers = 0
        self._reached = time.monotonic()
        self._position = b"0"
        self._closed = False  # the client of Redis may make another error of a cancellation
        self._tasks = [asyncio.create_task(self._reading()), asyncio.create_task(self._looking())]

    @property
    def workers(self) -> int:
        """How many are alive; 0 while Redis cannot be reached."""
        return self._workers

    async def embed(self, chunk: Chunk, work: Work) -> list[Outcome]:
        """Hand a chunk out and wait for what comes of it. Raises Poison, NoWorkers."""
        content = await asyncio.to_thread(encode_work, work)
        key = f"{_PREFIX}:chunk:{self._owner}:{chunk.job}:{chunk.first}:{chunk.count}"
        handed = self._handed[key] = _Handed(key, content, chunk.suspect, asyncio.get_running_loop().create_future())
        try:
            await self._hand_out(handed)
            return await handed.result
        finally:
            del self._handed[key]
            await self._take_back(handed)

    async def close(self) -> None:
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.aclose()

    async def _hand_out(self, handed: _Handed) -> None:
        with contextlib.suppress(*_FAILURES):  # the next look tries again
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.set(handed.key, handed.content, ex=_KEPT_S)
                fields: dict[Any, Any] = {"chunk": handed.key, "owner": self._owner, "suspect": int(handed.suspect)}
                pipeline.xadd(_stream(self._space), fields)
                handed.entry = (await pipeline.execute())[1]

    async def _take_back(self, handed: _Handed) -> None:
        """Of one that is done or given up; a worker that has it in hand finds nobody to answer to."""
        with contextlib.suppress(*_FAILURES):
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.delete(handed.key)
                if handed.entry is not None:
                    pipeline.xack(_stream(self._space), _GROUP, handed.entry)
                    pipeline.xdel(_stream(self._space), handed.entry)
                await pipeline.execute(raise_on_error=False)  # there may be no group

    async def _reading(self) -> None:
        while not self._closed:
            try:
                await self._read(_BLOCK_MS)
            except _FAILURES:
                await asyncio.sleep(_PAUSE_S)

    async def _read(self, block_ms: int | None) -> None:
        found: Any = await self._redis.xread({_results(self._owner): self._position}, count=8, block=block_ms)
        for _, entries in found:
            for position, fields in entries:
                self._position = position
                await self._take(fields)
                await self._redis.xdel(_results(self._owner), position)

    async def _take(self, fields: dict[bytes, bytes]) -> None:
        handed = self._handed.get(fields.get(b"chunk", b"").decode("utf-8", "replace"))
        if handed is None or handed.result.done():
            return
        if b"poison" in fields:
            handed.result.set_exception(Poison())
            return
        try:
            outcomes = await asyncio.to_thread(decode_outcomes, fields.get(b"outcomes", b""), self._dimensions)
        except ValueError:
            log.warning("a worker's answer cannot be read: are its version and its bundle the server's?")
            handed.broken += 1
            if handed.broken >= self._deliveries:
                handed.result.set_exception(Poison())
            return
        if not handed.result.done():
            handed.result.set_result(outcomes)

    async def _looking(self) -> None:
        """Count the workers; hand out again what Redis lost, or all of it to nobody where no worker is left."""
        while not self._closed:
            try:
                await self._look()
                self._reached = time.monotonic()
            except _FAILURES:
                if time.monotonic() - self._reached > self._silence_s:
                    self._workers = 0
                    self._give_up(self._handed, {})
            await asyncio.sleep(_LOOK_S)

    async def _look(self) -> None:
        now = await _now(self._redis)
        before = self._workers
        self._workers = await self._redis.zcount(_workers(self._space), now - self._silence_s, "+inf")
        if self._workers != before:
            log.info("%d workers", self._workers)
        there = dict(self._handed)
        if not self._workers:
            self._give_up(there, await self._delivered(there))
            return
        async with self._redis.pipeline(transaction=False) as pipeline:
            for handed in there.values():
                entry = handed.entry or b"0-0"
                pipeline.xrange(_stream(self._space), entry, entry)
                pipeline.exists(handed.key)
            answers = await pipeline.execute()
        for handed, found, content in zip(there.values(), answers[::2], answers[1::2], strict=True):
            # A worker that is done takes the entry off as it answers; by the next look the answer was read.
            handed.missed = 0 if found and content else handed.missed + 1
            if handed.missed > 1 and handed.key in self._handed and not handed.result.done():
                log.warning("a chunk is handed out again: Redis does not have it any more")
                await self._take_back(handed)
                await self._hand_out(handed)

    async def _delivered(self, there: dict[str, _Handed]) -> dict[str, int]:
        deliveries = {}
        for handed in there.values():
            if handed.entry is not None:
                deliveries[handed.key] = await _deliveries(self._redis, self._space, handed.entry)
        return deliveries

    def _give_up(self, what: Mapping[str, _Handed], deliveries: Mapping[str, int]) -> None:
        for handed in what.values():
            if not handed.result.done():
                handed.result.set_exception(NoWorkers(deliveries.get(handed.key, 0)))


@dataclass
class Worker:
    """A worker's side: takes chunks, one after the other in each of its tasks, until told to stop."""

    redis: "redis.asyncio.Redis"
    space: str
    name: str
    embed: Callable[[Work], Awaitable[list[Outcome]]]
    deliveries: int
    silence_s: float
    """An entry whose worker was silent for so long is another's."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    done: int = 0
    """Chunks."""
    _in_hand: set[bytes] = field(default_factory=set)
    _turns: Turns = field(default_factory=Turns)
    _ended: bool = False

    async def run(self, tasks: int) -> None:
        beating = asyncio.create_task(self._beating())
        try:
            await asyncio.gather(*(self._working() for _ in range(tasks)))
        finally:
            self._ended = True
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            with contextlib.suppress(*_FAILURES):
                await self._give_back()
                await self.redis.zrem(_workers(self.space), self.name)

    async def _give_back(self) -> None:
        """What is in hand still is anybody's at once."""
        for entry in list(self._in_hand):
            await self._claim(entry, idle_ms=_LONG_AGO_MS)

    async def _claim(self, entry: bytes, idle_ms: int) -> None:
        await self.redis.xclaim(_stream(self.space), _GROUP, self.name, 0, [entry], idle=idle_ms, justid=True)

    async def _beating(self) -> None:
        """Say that it is alive, and that what it has in hand is in good hands."""
        while not self._ended:
            with contextlib.suppress(*_FAILURES):
                now = await _now(self.redis)
                async with self.redis.pipeline(transaction=False) as pipeline:
                    pipeline.zadd(_workers(self.space), {self.name: now})
                    pipeline.zremrangebyscore(_workers(self.space), "-inf", now - _KEPT_S)
                    await pipeline.execute()
                for entry in list(self._in_hand):
                    await self._claim(entry, idle_ms=0)
            await asyncio.sleep(self.silence_s / 5)

    async def _working(self) -> None:
        failing = False
        while not self.stopping.is_set():
            try:
                taken = await self._take()
                failing = False
                if taken is not None:
                    await self._do(*taken)
            except _FAILURES as error:
                if "NOGROUP" in str(error):
                    with contextlib.suppress(ResponseError):  # another was faster
                        await self.redis.xgroup_create(_stream(self.space), _GROUP, id="0", mkstream=True)
                    continue
                if not failing:
                    log.warning("Redis cannot be used: %s", type(error).__name__)
                failing = True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE_S):
                        await self.stopping.wait()

    async def _take(self) -> tuple[bytes, dict[bytes, bytes]] | None:
        """An entry that a silent worker had, or a new one."""
        stream = _stream(self.space)
        idle = round(1_000 * self.silence_s)
        claimed: Any = await self.redis.xautoclaim(stream, _GROUP, self.name, idle, count=1)
        entries = claimed[1]
        if not entries:
            found: Any = await self.redis.xreadgroup(_GROUP, self.name, {stream: ">"}, count=1, block=_BLOCK_MS)
            entries = found[0][1] if found else []
        if not entries:
            return None
        entry, fields = entries[0]
        return entry, fields or {}

    async def _do(self, entry: bytes, fields: dict[bytes, bytes]) -> None:
        key, owner = fields.get(b"chunk", b"").decode(), fields.get(b"owner", b"").decode()
        self._in_hand.add(entry)
        try:
            content: Any = await self.redis.get(key) if key else None
            deliveries = await _deliveries(self.redis, self.space, entry)
            if content is None:  # it was given up
                await self._finish(entry, key, owner, None)
            elif deliveries > self.deliveries:
                log.error("a chunk was taken up %d times, and nobody lived to answer: it is poison", self.deliveries)
                await self._finish(entry, key, owner, {"chunk": key, "poison": "1"})
            else:
                work = await asyncio.to_thread(decode_work, content)
                async with self._turns.take(alone=deliveries > 1 or fields.get(b"suspect") == b"1"):
                    outcomes = await self.embed(work)
                answer = await asyncio.to_thread(encode_outcomes, outcomes)
                await self._finish(entry, key, owner, {"chunk": key, "outcomes": answer})
                self.done += 1
        except _FAILURES:
            raise
        except Exception:
            # Somebody else may do better; what nobody can do is poison in the end.
            log.exception("a chunk failed")
            await self._claim(entry, idle_ms=_LONG_AGO_MS)
        finally:
            if not self._cancelled():
                self._in_hand.discard(entry)

    @staticmethod
    def _cancelled() -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0

    async def _finish(self, entry: bytes, key: str, owner: str, answer: dict[Any, Any] | None) -> None:
        """Answer and take the entry off in one step: whoever dies before has not answered."""
        async with self.redis.pipeline(transaction=True) as pipeline:
            if answer is not None:
                pipeline.xadd(_results(owner), answer)
                pipeline.expire(_results(owner), _KEPT_S)
                pipeline.delete(key)
            pipeline.xack(_stream(self.space), _GROUP, entry)
            pipeline.xdel(_stream(self.space), entry)
            await pipeline.execute()


async def _deliveries(connection: "redis.asyncio.Redis", space: str, entry: bytes) -> int:
    """How often a worker was given an entry of the stream."""
    try:
        found = await connection.xpending_range(_stream(space), _GROUP, entry, entry, 1)
    except ResponseError:  # there is no group, and so never was a worker
        return 0
    return int(found[0]["times_delivered"]) if found else 0


async def _now(connection: "redis.asyncio.Redis") -> float:
    seconds, microseconds = await connection.time()
    return seconds + microseconds / 1e6
