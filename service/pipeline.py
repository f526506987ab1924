"""Input → decode → preprocess → batch → tower → unit vector. READ FIRST.

The cache is asked before anything is decoded; inputs that are not in it are decoded and preprocessed in worker
threads (so one bad input fails alone, before the queue), wait in the queue of their modality, and share model calls.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.batcher import Batcher
from service.cache import Cache, Entry, key_of
from service.contract.bundle import Bundle, Manifest, Modality
from service.contract.errors import InputError, UnsupportedMedia
from service.contract.vectors import l2_normalise
from service.errors import DeadlineExceeded, InferenceFailed
from service.metrics import Metrics
from service.modalities import Content, Handling, handling
from service.settings import Settings
from service.timings import record, timed
from service.towers import Tower

_HASHED_ON_THE_LOOP = 65_536  # bytes: under 0.1 ms
_CANARY_S = 5.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class TokenIds:
    """Made by the client with the bundle's own tokenizer, special tokens included."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """An image file or a sound file, not yet decoded."""

    modality: Literal["image", "audio"]
    data: bytes


Input = Text | TokenIds | Media


@dataclass(frozen=True)
class Embedded:
    vector: NDArray[np.float32]
    """(D,), unit length, not writeable."""
    modality: Modality
    truncated: bool
    cached: bool
    tokens: int = 0
    """That a text has, special tokens included; 0 for media."""


@dataclass(frozen=True)
class _Channel:
    handling: Handling
    batcher: Batcher[Any]
    slots: asyncio.Semaphore
    """Held from undecoded to enqueued."""


@dataclass
class _Flight:
    """A vector that is being made, and how many wait for it."""

    task: "asyncio.Task[Entry | InputError]"
    waiting: int = 0


class Embedder:
    """Owns a worker pool and one batcher per tower. Lives on one event loop."""

    def __init__(
        self, bundle: Bundle, towers: Mapping[Modality, Tower], cache: Cache, settings: Settings, metrics: Metrics
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self._cache, self._metrics, self._deadline_s = cache, metrics, settings.request_deadline_s
        self._pool = ThreadPoolExecutor(settings.decode_workers, "decode")
        self._flights: dict[str, _Flight] = {}
        self._channels: dict[Modality, _Channel] = {}
        for modality, tower in towers.items():
            how = handling(bundle, modality, settings)
            batcher: Batcher[Any] = Batcher(
                modality,
                how.collate,
                tower.run,
                dimensions=self.manifest.dimensions,
                budget=how.budget,
                capacity=settings.queue_inputs,
                observer=metrics.of_tower(modality),
            )
            self._channels[modality] = _Channel(how, batcher, asyncio.Semaphore(settings.decode_workers))
            metrics.watch_queue(modality, batcher)

    async def embed(self, inputs: Sequence[Input]) -> list[Embedded | InputError]:
        """One result per input, in order: a unit vector, or what is wrong with that input.

        Identical inputs are embedded once, also across requests that are under way at the same time. Raises Overloaded
        before any work, DeadlineExceeded, and NotReady at shutdown; a cancelled call withdraws what it waits for.
        """
        modalities = [modality_of(each) for each in inputs]
        with ExitStack() as admitted:
            for modality, count in Counter(modalities).items():
                if modality in self._channels:
                    admitted.enter_context(self._channels[modality].batcher.admit(count))
            try:
                async with asyncio.timeout(self._deadline_s):
                    return await self._embed(inputs, modalities)
            except TimeoutError:
                raise DeadlineExceeded("the inputs were not embedded within the deadline") from None

    async def canary(self, modality: Modality) -> None:
        """Embed a small input through one tower, past the cache. Raises if anything on the way does not work."""
        channel = self._channels[modality]
        canary = channel.handling.canary
        async with asyncio.timeout(_CANARY_S):
            answer = await channel.batcher.submit(canary.value, canary.size)
        l2_normalise(answer.vector)

    def workers_alive(self) -> bool:
        return all(channel.batcher.alive for channel in self._channels.values())

    async def close(self) -> None:
        """Answer everything that waits (NotReady), then stop the threads."""
        await asyncio.gather(*(channel.batcher.close() for channel in self._channels.values()))
        # What is still being decoded goes on to a closed batcher, and is answered there.
        await asyncio.to_thread(self._pool.shutdown)

    async def _embed(self, inputs: Sequence[Input], modalities: Sequence[Modality]) -> list[Embedded | InputError]:
        keys = await self._keys(inputs)
        distinct = dict(zip(keys, inputs, strict=True))
        with timed("cache"):
            found = await self._cache.get_many(list(distinct))
        known = {key: entry for key, entry in zip(distinct, found, strict=True) if entry is not None}
        missing = [key for key in distinct if key not in known]
        self._metrics.cache.labels("hit").inc(len(known))
        self._metrics.cache.labels("miss").inc(len(missing))
        made = dict(zip(missing, await _all([self._shared(key, distinct[key]) for key in missing]), strict=True))
        await self._cache.put_many({key: each for key, each in made.items() if isinstance(each, Entry)})
        results: list[Embedded | InputError] = []
        for key, modality in zip(keys, modalities, strict=True):
            each = known[key] if key in known else made[key]
            if isinstance(each, InputError):
                results.append(each)
            else:
                results.append(Embedded(each.vector, modality, each.truncated, key in known, each.tokens))
        return results

    async def _keys(self, inputs: Sequence[Input]) -> list[str]:
        large = sum(len(each.data) for each in inputs if isinstance(each, Media)) > _HASHED_ON_THE_LOOP
        space = self.manifest.space
        if large:
            return await self._in_pool(lambda: [_key(space, each) for each in inputs])
        return [_key(space, each) for each in inputs]

    async def _shared(self, key: str, each: Input) -> Entry | InputError:
        """Make a vector, or wait for whoever is making the same. It is given up when the last who waits goes away."""
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._make(each)))
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                flight.task.cancel()  # does nothing to a task that is done
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def _make(self, each: Input) -> Entry | InputError:
        modality = modality_of(each)
        channel = self._channels.get(modality)
        if channel is None:
            return UnsupportedMedia(f"this bundle has no {modality} tower")
        try:
            async with channel.slots:
                with timed("decode"):
                    prepared = await self._in_pool(lambda: channel.handling.prepare(_content_of(each)))
                waiting = await channel.batcher.enqueue(prepared.value, prepared.size)
            answer = await waiting
        except InputError as error:
            return error
        record("queue", answer.queue_s)
        record("model", answer.model_s)
        try:
            vector = l2_normalise(answer.vector)
        except ValueError:
            return InferenceFailed("the model gave this input no direction")
        vector.setflags(write=False)
        return Entry(vector, prepared.truncated, prepared.tokens)

    async def _in_pool(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)


def modality_of(each: Input) -> Modality:
    return each.modality if isinstance(each, Media) else "text"


def _content_of(each: Input) -> Content:
    match each:
        case Text():
            return each.text
        case TokenIds():
            return each.ids
        case Media():
            return each.data


def _key(space: str, each: Input) -> str:
    match each:
        case Text():
            return key_of(space, "text", each.text.encode("utf-8", "surrogatepass"))
        case TokenIds():
            return key_of(space, "ids", ",".join(map(str, each.ids)).encode())
        case Media():
            return key_of(space, each.modality, each.data)


async def _all(work: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run side by side; the first failure cancels the rest."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
