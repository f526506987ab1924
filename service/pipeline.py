"""Input → decode → preprocess → batch → tower → unit vector. READ FIRST.

The cache is asked before anything is decoded; inputs that are not in it are decoded and preprocessed in worker
threads (so one bad input fails alone, before the queue), wait in the queue of their modality, and share model calls.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.cache import Cache, Entry, key_of
from service.channel import Channel, Open, Runs, opener
from service.contract.bundle import Bundle, Manifest, Modality
from service.contract.errors import InputError, UnsupportedMedia
from service.contract.vectors import l2_normalise
from service.errors import DeadlineExceeded, InferenceFailed, NotReady
from service.metrics import Metrics
from service.modalities import Content, Prepared
from service.settings import Settings
from service.timings import record, timed
from service.workers import Workers

log = logging.getLogger(__name__)

_HASHED_ON_THE_LOOP = 65_536  # bytes: under 0.1 ms

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


@dataclass
class _Flight:
    """A vector that is being made, and how many wait for it."""

    task: "asyncio.Task[Entry | InputError]"
    waiting: int = 0


class Embedder:
    """A model's way from inputs to vectors: a worker pool, and a channel per tower. Lives on one event loop."""

    def __init__(
        self,
        bundle: Bundle,
        towers: Mapping[Modality, Runs],
        cache: Cache,
        settings: Settings,
        metrics: Metrics,
        open: Open | None = None,
    ) -> None:
        self.bundle = bundle
        self._cache, self._metrics, self.deadline_s = cache, metrics, settings.request_deadline_s
        self._pool = Workers("decode", settings.decode_workers)
        self._flights: dict[str, _Flight] = {}
        self._closing: asyncio.Task[None] | None = None
        self.channels: dict[Modality, Channel] = {}
        name = bundle.manifest.name
        for modality, tower in towers.items():
            observer = metrics.of_tower(name, modality)
            self.channels[modality] = Channel(bundle, modality, tower, open or opener(settings), settings, observer)
            metrics.watch(name, modality, self.channels[modality])

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    async def embed(self, inputs: Sequence[Input]) -> list[Embedded | InputError]:
        """One result per input, in order: a unit vector, or what is wrong with that input.

        Identical inputs are embedded once, also across requests that are under way at the same time. Raises Overloaded
        before any work, DeadlineExceeded, and NotReady at shutdown; a cancelled call withdraws what it waits for.
        """
        modalities = [modality_of(each) for each in inputs]
        with ExitStack() as admitted:
            for modality, count in Counter(modalities).items():
                if modality in self.channels:
                    admitted.enter_context(self.channels[modality].admit(count))
            try:
                async with asyncio.timeout(self.deadline_s):
                    return await self._embed(inputs, modalities)
            except TimeoutError:
                raise DeadlineExceeded("the inputs were not embedded within the deadline") from None

    async def canary(self, modality: Modality) -> None:
        """Embed a small input through one tower, past the cache. Raises if anything on the way does not work."""
        await self.channels[modality].canary()

    def workers_alive(self) -> bool:
        return self._pool.alive and all(channel.alive for channel in self.channels.values())

    async def replace(self, bundle: Bundle) -> None:
        """Embed with another bundle of the same space from now on; what is under way ends with the older one.

        Raises BundleError or TowerError, and goes on with the older one, where a tower cannot be opened or fails.
        """
        opening = [asyncio.create_task(channel.prepare(bundle)) for channel in self.channels.values()]
        await asyncio.wait(opening)
        if failures := [failure for task in opening if (failure := task.exception())]:
            await asyncio.gather(*(task.result().retire() for task in opening if not task.exception()))
            raise failures[0]
        self.bundle = bundle
        for channel, task in zip(self.channels.values(), opening, strict=True):
            channel.install(task.result())

    async def close(self) -> None:
        """Answer everything that waits (NotReady), then stop the threads."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self.channels.values()))
        # What is still being decoded goes on to a closed batcher, and is answered there.
        await asyncio.to_thread(self._pool.close)

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
            return await self._pool.run(lambda: [_key(space, each) for each in inputs])
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
        channel = self.channels.get(modality)
        if channel is None:
            return UnsupportedMedia(f"no {modality} tower is served here")
        async with channel.using() as engine:
            try:
                async with channel.slots:
                    with timed("decode"):
                        prepared = await self._prepared(engine.handling.prepare, each)
                    waiting = await engine.batcher.enqueue(prepared.value, prepared.size)
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

    async def _prepared(self, prepare: Callable[[Content], Prepared], each: Input) -> Prepared:
        try:
            return await self._pool.run(lambda: prepare(content_of(each)))
        except (InputError, NotReady):
            raise
        except Exception:  # a fault of ours or of a library, which this input alone has met
            log.exception("an input of kind %s could not be prepared", modality_of(each))
            raise InferenceFailed("the server failed to read this input") from None


def modality_of(each: Input) -> Modality:
    return each.modality if isinstance(each, Media) else "text"


def content_of(each: Input) -> Content:
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
