"""Input → decode → preprocess → batch → tower → unit vector. READ FIRST.

The cache is asked before anything is decoded; inputs that are not in it are decoded and preprocessed in worker
threads (so one bad input fails alone, before the queue), wait in the queue of their modality, and share model calls.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.contract.audio import Recording
from service.contract.bundle import Bundle, Modality, front_end_of
from service.contract.errors import InputError, UnsupportedMedia
from service.contract.images import ImagePreprocessing
from service.contract.sounds import AudioPreprocessing, stretches
from service.contract.videos import Clip, read_video
from service.engine import videos
from service.engine.batcher import Answer, Prepared
from service.engine.cache import Cache, keys_of
from service.engine.caller import PROCESS, Caller
from service.engine.channel import Channel
from service.engine.inputs import (
    NOT_FETCHED,
    UNKNOWN_TEXT,
    Decoded,
    Embedded,
    Fused,
    Input,
    Media,
    Moment,
    Part,
    Single,
    Unreadable,
    Url,
    Video,
    by_input,
    costs_of,
    fused,
    length_of,
    modality_of,
    opened,
    parts_of,
)
from service.engine.towers import Tower
from service.errors import FetchDisabled, InferenceFailed
from service.runtime.deadline import within
from service.runtime.fair import FairSemaphore
from service.runtime.metrics import Metrics, TowerMetrics
from service.runtime.timings import record, timed
from service.runtime.workers import WorkerDied, Workers
from service.settings import Settings

log = logging.getLogger(__name__)
_HASHED_ON_THE_LOOP = 65_536
"""Bytes that the event loop hashes itself, in under 0.1 ms."""
_TOKENISED_ON_THE_LOOP = 512
"""Characters that the event loop tokenises itself, in about 0.2 ms: a hop to a thread and back costs nearly as much."""
_CHUNK_CHARS = 8_192
"""Characters that one hop to a thread tokenises: the first texts are embedded while the others wait to be read."""
_CHUNK_BYTES = 131_072
"""Bytes of media that one hop to a thread decodes: the hop costs a tenth of decoding a small photograph."""
_TOGETHER = 12
"""Moments of a long sound that are decoded and embedded at a time: two minutes."""

_NO_ARRAYS = "the data is an array (.npy), and no tower for arrays is served here"

Result = TypeVar("Result")


@dataclass
class _Flight:
    """A vector that is being made, and how many wait for it. Cancelling the result gives it up."""

    result: "asyncio.Future[Answer]"
    name: str
    waiting: int = 0
    embedded: Callable[[NDArray[np.float32]], Embedded] = field(init=False)
    """Makes the result of the vector, once the input is prepared."""

    def fail(self, error: BaseException) -> None:
        if not self.result.done():
            self.result.set_exception(error)

    def landed(self) -> Embedded | InputError:
        """Return what has become of it. Raises the failure that is not of this input alone."""
        if isinstance(error := self.result.exception(), InputError):
            return error
        answer = self.result.result()
        record("queue", answer.queue_s)
        record("model", answer.model_s)
        if not answer.vector.any():
            return InferenceFailed("the model gave this input no direction")
        vector = answer.vector.copy()  # of one row: the cache shall not keep the whole batch
        vector.setflags(write=False)
        return self.embedded(vector)


_Making = Sequence[tuple[Single, _Flight]]


class Embedder:
    """A model's way from inputs to vectors: a worker pool, and a channel per tower. Lives on one event loop."""

    def __init__(
        self,
        bundle: Bundle,
        towers: Mapping[Modality, Tower],
        cache: Cache,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.manifest = bundle.manifest
        self._cache, self._metrics, self.deadline_s = cache, metrics, settings.request_deadline_s
        self._capacity, self.limits = settings.queue_inputs, settings.limits
        self._decode_workers = settings.decode_workers
        at_once = max(1, settings.decode_workers // 2)
        self.long_sounds = {True: FairSemaphore(1), False: FairSemaphore(at_once + 1, per_caller=at_once)}
        """Places for sounds in memory while their moments are embedded; background work has its own."""
        self._pool = Workers("decode", settings.decode_workers, spare=1)
        self._flights: dict[str, _Flight] = {}
        self._making: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self.channels: dict[Modality, Channel] = {}
        name = bundle.manifest.name
        for modality, tower in towers.items():
            channel = Channel(bundle, modality, tower, settings, TowerMetrics(metrics, name, modality))
            self.channels[modality] = channel
            metrics.watch(name, modality, channel.depth, settings.queue_inputs)

    async def embed(
        self, inputs: Sequence[Input], caller: Caller = PROCESS, *, stored: bool = False, admit_unknown: bool = False
    ) -> list[Embedded | InputError]:
        """Return one result per input, in order: a unit vector, or the input's error.

        So is a text of which the tokenizer knows nothing, unless `admit_unknown`: its vector is that of every such
        text. With `stored`, long sounds have their moments, as videos have.

        The parts of a fused input are embedded like others, and get one result, which has no moments.

        Identical inputs are embedded once, also across requests that are under way at the same time. Raises Overloaded
        and RateLimited before any work, DeadlineExceeded, and NotReady at shutdown; a cancelled call withdraws what it
        waits for.
        """
        if any(isinstance(given, Url | Video | Fused) or _is_unnamed(given) for given in inputs):
            inputs = await self.read(inputs, caller)
        has_fused = any(isinstance(given, Fused) for given in inputs)
        parts = [part for given in inputs for part in parts_of(given)] if has_fused else inputs
        single = [part for part in parts if isinstance(part, Single)]
        made = iter(await self._embed(single, caller) if single else ())
        results: list[Embedded | InputError] = []
        for part in parts:
            if isinstance(part, Unreadable):
                results.append(part.error)
            elif isinstance(part, Video):
                results.append(await self._embed_video(part, caller))
            else:
                result = next(made)
                unknown = isinstance(result, Embedded) and result.unknown == 1 and not admit_unknown
                results.append(InputError(UNKNOWN_TEXT) if unknown else result)
        if has_fused:
            results = [
                fused(given, group) if isinstance(given, Fused) else group[0]
                for given, group in by_input(inputs, results)
            ]
        if stored:
            await self._add_moments(inputs, results, caller)
        return results

    async def read(self, inputs: Sequence[Input], caller: Caller = PROCESS) -> list[Input]:
        """Return the inputs with files in place of URLs, and with videos that are only sounds as sounds.

        Raises RateLimited, DeadlineExceeded.
        """
        parts = [part for given in inputs for part in parts_of(given)]
        urls = {place: part for place, part in enumerate(parts) if isinstance(part, Url)}
        fetched: dict[int, bytes | InputError] = {}
        if caller.fetches is not None and urls:
            addresses = [(part.kind, part.url) for part in urls.values()]
            fetched = dict(zip(urls, await caller.fetches.all(addresses), strict=True))
        read: list[Part] = []
        for place, part in enumerate(parts):
            if isinstance(part, Url):
                file = fetched.get(place, FetchDisabled(NOT_FETCHED))
                read.append(part.holding(file) if isinstance(file, bytes) else Unreadable(file))
            elif isinstance(part, Video) and not part.opened:
                read.append(await self.in_worker(partial(opened, part)))
            elif isinstance(part, Media) and _is_unnamed(part):
                read.append(self._named(part))
            else:
                read.append(part)
        return [
            given.with_parts(group) if isinstance(given, Fused) else group[0] for given, group in by_input(inputs, read)
        ]

    def _named(self, array: Media) -> Part:
        """Return an array with the modality of the only tower that takes arrays."""
        towers = self.manifest.towers
        names = [name for name in self.channels if front_end_of(towers[name].preprocessing) == "array"]
        if len(names) == 1:
            return replace(array, modality=names[0], front_end="array")
        told = f"say which modality the array is of (modality): {', '.join(names)}" if names else _NO_ARRAYS
        return Unreadable(UnsupportedMedia(told))

    async def _embed(self, inputs: Sequence[Single], caller: Caller) -> list[Embedded | InputError]:
        """Embed inputs together, or piece by piece where there are too many for the queue."""
        capacity = max(1, self._capacity // 4) if caller.background else self._capacity
        size = max(1, len(inputs) if len(inputs) <= capacity else capacity // 2)
        precisions = {modality: channel.tower.precision for modality, channel in self.channels.items()}
        results: list[Embedded | InputError] = []
        # Each piece takes the room of the one before it.
        async with self.admitted(Counter(map(modality_of, inputs)), size, caller):
            await self._charge(inputs, caller)
            for start in range(0, len(inputs), size):
                piece = inputs[start : start + size]
                naming = partial(keys_of, self.manifest.space, precisions, piece)
                large = sum(map(_bytes, piece)) > _HASHED_ON_THE_LOOP
                keys = await self.in_worker(naming) if large else naming()
                misses = dict(zip(keys, piece, strict=True))
                with timed("cache"):
                    hits = await self._cache.get_many({key: modality_of(input) for key, input in misses.items()})
                for key in hits:
                    del misses[key]
                self._metrics.cache.labels("hit").inc(len(hits))
                self._metrics.cache.labels("miss").inc(len(misses))
                results_by_key = await self._made(misses, caller.background) if misses else {}
                with timed("cache"):
                    entries = {key: entry for key, entry in results_by_key.items() if isinstance(entry, Embedded)}
                    await self._cache.put_many(entries)
                results += [hits[key] if key in hits else results_by_key[key] for key in keys]
        return results

    @asynccontextmanager
    async def admitted(self, counts: Mapping[Modality, int], most: int, caller: Caller) -> AsyncIterator[None]:
        """Reserve room for so many inputs of each modality, `most` at a time, and bound the time. Raises Overloaded,
        NotReady, DeadlineExceeded."""
        with ExitStack() as rooms:
            for modality, count in counts.items():
                if modality in self.channels:
                    rooms.enter_context(self.channels[modality].admit(min(count, most)))
            async with self.in_time(caller):
                yield

    def in_time(self, caller: Caller) -> AbstractAsyncContextManager[object]:
        """Bound the time of a caller that waits. The block raises DeadlineExceeded."""
        return within(None if caller.background else self.deadline_s)

    async def _charge(self, inputs: Sequence[Single], caller: Caller) -> None:
        """Charge the inputs' costs to the limits of the caller's key. Raises RateLimited."""
        meter = caller.meter
        if meter is None or meter.units <= {"requests"}:
            return
        by_size = meter.units & {"pixels", "seconds"} and any(isinstance(input, Media) for input in inputs)
        limits = self.limits if by_size else None
        await meter.take(await self.in_worker(lambda: costs_of(inputs, limits)) if limits else costs_of(inputs, None))

    async def _embed_video(self, video: Video, caller: Caller) -> Embedded | InputError:
        served = {name: self.manifest.towers[name].preprocessing for name in self.channels}
        picture, sound = served.get("image"), served.get("audio")
        spec = picture if isinstance(picture, ImagePreprocessing) else None
        rate = sound.sampling_rate if isinstance(sound, AudioPreprocessing) else None
        if spec is None and rate is None:
            return UnsupportedMedia("no tower is served here for the frames or the sound of a video")

        def read() -> Clip | InputError:
            try:
                return read_video(video.data, spec, rate, self.limits.of_videos)
            except InputError as error:
                return error.without_frames()

        async with self.in_time(caller):
            clip = await self.in_worker(read)
            if isinstance(clip, InputError):
                return clip
            return videos.pooled(clip, await self._embed(videos.decoded(clip), caller))

    async def _add_moments(self, inputs: Sequence[Input], results: list[Embedded | InputError], caller: Caller) -> None:
        """Add the vectors of their moments to the results of long sounds."""
        sounds = {
            place: input
            for place, (input, result) in enumerate(zip(inputs, results, strict=True))
            if isinstance(input, Media) and input.modality == "audio" and isinstance(result, Embedded)
        }
        # Most sounds' headers say that they are short; those are not decoded again.
        for place in await self.in_worker(lambda: videos.perhaps_long(sounds, self.limits)) if sounds else ():
            sound_result, spec = results[place], self.manifest.towers["audio"].preprocessing
            assert isinstance(sound_result, Embedded) and isinstance(spec, AudioPreprocessing)
            try:
                async with self.in_time(caller), self.long_sounds[caller.background]:
                    moments = await self._moments(sounds[place], spec.sampling_rate, caller.uncharged)
            except InputError:  # the whole is embedded; its moments are not worth its failing
                continue
            results[place] = replace(sound_result, moments=tuple(moments))

    async def _moments(self, sound: Media, rate: int, caller: Caller) -> list[Moment]:
        """Embed the moments of a sound, if it has more than one. Raises InputError as decode_audio does."""
        recording = await self.in_worker(lambda: Recording(sound.data, rate, self.limits.of_sounds))
        mix = recording.mix
        moments = await self._moments_of(recording, rate, caller)
        # Only the whole sound tells how its channels are to be mixed.
        return moments if recording.mix == mix else await self._moments_of(recording, rate, caller)

    async def _moments_of(self, recording: Recording, rate: int, caller: Caller) -> list[Moment]:
        """Embed the moments of a recording, of which _TOGETHER are in memory at a time."""
        parts, moments, samples = stretches(recording, rate), list[Moment](), 0
        while together := await self.in_worker(lambda: list(islice(parts, _TOGETHER))):
            if not samples and len(together) == 1:
                return []
            inputs = [Decoded("audio", part, len(part) / rate) for part in together]
            for part, result in zip(together, await self._embed(inputs, caller), strict=True):
                start, samples = samples, samples + len(part)
                if isinstance(result, Embedded):
                    moments.append(Moment("audio", round(start / rate, 3), round(samples / rate, 3), result.vector))
        return moments

    async def canary(self, modality: Modality) -> None:
        """Embed a small input through one tower, past the cache. Raises if anything on the way does not work."""
        await self.channels[modality].canary()

    async def in_worker(self, function: Callable[[], Result]) -> Result:
        """Run a slow function in a decoding thread, or in another if that one dies with it. Raises WorkerDied where
        that dies too, and NotReady after close."""
        try:
            return await self._pool.run(function)
        except WorkerDied:
            return await self._pool.run(function)

    def workers_alive(self) -> bool:
        return self._pool.alive and all(channel.alive for channel in self.channels.values())

    async def cache_alive(self) -> bool:
        return await self._cache.alive()

    async def close(self) -> None:
        """Answer all waiting inputs with NotReady, then stop the threads."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self.channels.values()))
        # Inputs that are still being decoded go on to a closed batcher, which answers them.
        await asyncio.to_thread(self._pool.close)

    async def _made(self, missing: Mapping[str, Single], background: bool) -> dict[str, Embedded | InputError]:
        """Make each vector, or wait for a call that is making the same. A vector is given up when its last waiter goes
        away.

        Raises the first failure that is not of one input alone.
        """
        loop = asyncio.get_running_loop()
        flights: dict[str, _Flight] = {}
        new: dict[Modality, list[tuple[Single, _Flight]]] = {}
        for key, given in missing.items():
            # A request does not wait for a vector that background work makes.
            name = f"background {key}" if background and key not in self._flights else key
            flight = self._flights.get(name)
            if flight is None:
                flight = self._flights[name] = _Flight(loop.create_future(), name)
                new.setdefault(modality_of(given), []).append((given, flight))
            flight.waiting += 1
            flights[key] = flight
        for modality, making in new.items():
            if all(length_of(given) < math.inf for given, _ in making):
                self._begin(self._make(modality, _chunks(making, length_of, _CHUNK_CHARS, len(making)), background))
            else:  # side by side, and never so many together that another worker has nothing to do
                most = -(-len(making) // self._decode_workers)
                least = 4 * self.channels[modality].handling.canary.size if modality in self.channels else 0
                for chunk in _chunks(making, partial(_file_bytes, least), _CHUNK_BYTES, most):
                    self._begin(self._make(modality, [chunk], background))
        try:
            pending = {flight.result for flight in flights.values()}
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
                for failure in filter(None, (result.exception() for result in done)):
                    if not isinstance(failure, InputError):
                        raise failure
            return {key: flight.landed() for key, flight in flights.items()}
        finally:
            for flight in flights.values():
                flight.waiting -= 1
                if not flight.waiting:
                    if not flight.result.cancel() and not flight.result.cancelled():
                        flight.result.exception()  # seen, whoever raises it
                    if self._flights.get(flight.name) is flight:
                        del self._flights[flight.name]

    def _begin(self, making: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(making)
        self._making.add(task)
        task.add_done_callback(self._making.discard)

    async def _make(self, modality: Modality, chunks: Sequence[_Making], background: bool) -> None:
        """Prepare and enqueue chunk by chunk, and complete every flight, whatever happens."""
        try:
            channel = self.channels.get(modality)
            if channel is None:
                raise UnsupportedMedia(f"no {modality} tower is served here: there are {', '.join(self.channels)}")
            for chunk in chunks:
                async with channel.background_slots if background else channel.slots:
                    chunk = [pair for pair in chunk if not pair[1].result.done()]  # who gave up meanwhile
                    preparing = partial(_prepare_each, channel.handling.prepare, [given for given, _ in chunk])
                    quick = sum(length_of(given) for given, _ in chunk) <= _TOKENISED_ON_THE_LOOP
                    with timed("decode") as took:
                        try:
                            prepared = preparing() if quick else await self._pool.run(preparing)
                        except WorkerDied:  # one of the inputs may have caused it, or none
                            prepared = [await self._prepare_alone(channel, given) for given, _ in chunk]
                    channel.decoded(took(), len(chunk))
                    for (_, flight), ready in zip(chunk, prepared, strict=True):
                        if isinstance(ready, InputError):
                            flight.fail(ready)
                        elif not flight.result.done():
                            flight.embedded = partial(
                                Embedded,
                                modality=modality,
                                truncated=ready.truncated,
                                cached=False,
                                tokens=ready.tokens,
                                unknown=ready.unknown,
                            )
                            await channel.batcher.enqueue(ready, flight.result, background=background)
        except BaseException as error:
            for _, flight in chain(*chunks):
                flight.fail(error)
            if not isinstance(error, Exception):
                raise

    async def _prepare_alone(self, channel: Channel, input: Single) -> Prepared | InputError:
        """Prepare an input whose thread died with it and others."""
        try:
            return (await self._pool.run(partial(_prepare_each, channel.handling.prepare, [input])))[0]
        except WorkerDied:
            return InferenceFailed("the server failed to read this input")


def _is_unnamed(given: Input) -> bool:
    return isinstance(given, Media) and given.modality == "array"


def _file_bytes(least: int, given: Single) -> int:
    """Return the bytes of a file, and at least those of the float32 that are made of one: rows of an array repeat."""
    return max(least, len(given.data)) if isinstance(given, Media) else 0


def _prepare_each(prepare: Callable[[Single], Prepared], inputs: Sequence[Single]) -> list[Prepared | InputError]:
    """Prepare inputs; the error of an input stands in its place."""
    prepared: list[Prepared | InputError] = []
    for input in inputs:
        try:
            prepared.append(prepare(input))
        except InputError as error:
            prepared.append(error.without_frames())
        except Exception:  # a fault of ours or of a library, which this input alone has met
            log.exception("an input of kind %s could not be prepared", modality_of(input))
            prepared.append(InferenceFailed("the server failed to read this input"))
    return prepared


def _chunks(making: _Making, cost_of: Callable[[Single], float], room: float, most: int) -> list[_Making]:
    """Split inputs into chunks that one thread prepares: each costs about `room`, and has at most so many inputs."""
    chunks: list[list[tuple[Single, _Flight]]] = []
    room_left = 0.0
    for input, flight in making:
        cost = cost_of(input)
        if not chunks or cost > room_left or len(chunks[-1]) == most:
            chunks.append([])
            room_left = room
        chunks[-1].append((input, flight))
        room_left -= cost
    return list(chunks)


def _bytes(input: Single) -> int:
    """Return the number of bytes to be hashed: those of media."""
    return len(input.data) if isinstance(input, Media) else input.value.nbytes if isinstance(input, Decoded) else 0
