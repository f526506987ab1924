"""Input → decode → preprocess → batch → tower → unit vector. READ FIRST.

The cache is asked before anything is decoded; inputs that are not in it are decoded and preprocessed in worker
threads (so one bad input fails alone, before the queue), wait in the queue of their modality, and share model calls.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Bundle, Manifest, Modality
from service.contract.errors import InputError, UnsupportedMedia
from service.contract.videos import VideoLimits
from service.engine.batcher import Answer
from service.engine.cache import Cache, Entry, key_of
from service.engine.channel import Channel, Open, Runs, opener
from service.engine.handling import Content, Prepared
from service.engine.handling import Text as Text
from service.engine.header_sizes import stated_pixels, stated_seconds
from service.errors import DeadlineExceeded, InferenceFailed
from service.runtime.metrics import Metrics
from service.runtime.quotas import Costs, Unit, metering
from service.runtime.timings import record, timed
from service.runtime.workers import WorkerDied, Workers
from service.settings import Limits, Settings
from service.store.rows import Moment

log = logging.getLogger(__name__)
T = TypeVar("T")
StoredModality = Literal["image", "audio", "text", "vector", "video"]
"""What an item was made from; `vector` where the client gave the vector and did not say."""

_HASHED_ON_THE_LOOP = 65_536  # bytes: under 0.1 ms
_TOKENISED_ON_THE_LOOP = 512  # characters: about 0.2 ms, where a hop to a thread and back costs nearly as much
_CHUNK = 8_192
_GROUP = 131_072  # bytes of undecoded media

Result = TypeVar("Result")


@dataclass(frozen=True)
class TokenIds:
    """Made by the client with the bundle's own tokenizer, special tokens included."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Media:
    """An image file or a sound file, not yet decoded."""

    modality: Literal["image", "audio"]
    data: bytes


@dataclass(frozen=True, eq=False)
class Ready:
    """Of a video: pixels as the image tower takes them, or samples at the audio tower's rate."""

    modality: Literal["image", "audio"]
    value: NDArray[np.float32]
    cost: float
    """Pixels that were decoded for it, or seconds."""


Input = Text | TokenIds | Media | Ready


@dataclass(frozen=True)
class Embedded:
    vector: NDArray[np.float32]
    """(D,), unit length, not writeable."""
    modality: Modality
    truncated: bool
    cached: bool
    tokens: int = 0
    """That a text has, special tokens included; 0 for media."""
    unknown: float = 0.0
    """The share of a text's tokens that the tokenizer does not know (contract.tokens.Tokens)."""
    moments: tuple[Moment, ...] = ()
    """Of a video, and of a long sound that is going to be stored."""
    video: bool = False
    """It is handled as images are, or as sounds where it has no picture."""

    @property
    def kind(self) -> StoredModality:
        return "video" if self.video else self.modality


@dataclass
class _Flight:
    """A vector that is being made, and how many wait for it. Cancelling the result gives it up."""

    result: "asyncio.Future[Entry | InputError]"
    name: str
    waiting: int = 0

    def land(self, outcome: Entry | InputError | BaseException) -> None:
        if self.result.done():
            return
        if isinstance(outcome, InputError):
            self.result.set_result(outcome)
        elif isinstance(outcome, BaseException):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)


_Making = Sequence[tuple[Input, _Flight]]


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
        self._capacity, self.limits = settings.queue_inputs, settings.limits
        self._decode_workers = settings.decode_workers
        self.video_limits = VideoLimits(
            settings.max_video_bytes,
            settings.max_video_seconds,
            settings.max_video_pixels,
            settings.max_audio_channels,
            settings.video_frames,
        )
        self.long_sounds = {True: asyncio.Semaphore(1), False: asyncio.Semaphore(max(1, settings.decode_workers // 2))}
        """Sounds that are in memory while their moments are embedded; those in the background by themselves."""
        self._pool = Workers("decode", settings.decode_workers)
        self._flights: dict[str, _Flight] = {}
        self._making: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self.channels: dict[Modality, Channel] = {}
        name = bundle.manifest.name
        for modality, tower in towers.items():
            observer = metrics.of_tower(name, modality)
            self.channels[modality] = Channel(bundle, modality, tower, open or opener(settings), settings, observer)
            metrics.watch(name, modality, self.channels[modality], settings.queue_inputs)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    async def embed(self, inputs: Sequence[Input], *, background: bool = False) -> list[Embedded | InputError]:
        """One result per input, in order: a unit vector, or what is wrong with that input.

        Identical inputs are embedded once, also across requests that are under way at the same time. Raises Overloaded
        and RateLimited before any work, DeadlineExceeded, and NotReady at shutdown; a cancelled call withdraws what it
        waits for.

        In the `background` inputs wait behind those of other calls, take a quarter of the room at most, and have no
        deadline.
        """
        capacity = max(1, self._capacity // 4) if background else self._capacity
        size = max(1, len(inputs) if len(inputs) <= capacity else capacity // 2)
        pieces = [inputs[start : start + size] for start in range(0, len(inputs), size)]
        with ExitStack() as admitted:
            # Each piece takes the room of the one before it.
            for modality, count in Counter(map(modality_of, inputs)).items():
                if modality in self.channels:
                    admitted.enter_context(self.channels[modality].admit(min(count, size)))
            try:
                async with asyncio.timeout(None if background else self.deadline_s):
                    await self._charge(inputs)
                    return [each for piece in pieces for each in await self._embed(piece, background)]
            except TimeoutError:
                raise DeadlineExceeded("the inputs were not embedded within the deadline") from None

    async def _charge(self, inputs: Sequence[Input]) -> None:
        """Take what the inputs cost from the limits of the request's key. Raises RateLimited."""
        meter = metering.get()
        if meter is None or meter.units <= {"requests"}:
            return
        measured = meter.units & {"pixels", "seconds"} and any(isinstance(each, Media) for each in inputs)
        costs = await self.in_worker(lambda: costs_of(inputs, self.limits)) if measured else costs_of(inputs, None)
        await meter.take(costs)

    async def canary(self, modality: Modality) -> None:
        """Embed a small input through one tower, past the cache. Raises if anything on the way does not work."""
        await self.channels[modality].canary()

    async def in_worker(self, function: Callable[[], Result]) -> Result:
        """Run something slow in a thread that decodes; in another, if that one dies with it. Raises WorkerDied where
        that dies too, and NotReady after close."""
        try:
            return await self._pool.run(function)
        except WorkerDied:
            return await self._pool.run(function)

    def workers_alive(self) -> bool:
        return self._pool.alive and all(channel.alive for channel in self.channels.values())

    async def cache_alive(self) -> bool:
        return await self._cache.alive()

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

    async def _embed(self, inputs: Sequence[Input], background: bool) -> list[Embedded | InputError]:
        keys = await self._keys(inputs)
        distinct = dict(zip(keys, inputs, strict=True))
        with timed("cache"):
            found = await self._cache.get_many(list(distinct))
        known = {key: entry for key, entry in zip(distinct, found, strict=True) if entry is not None}
        missing = [key for key in distinct if key not in known]
        self._metrics.cache.labels("hit").inc(len(known))
        self._metrics.cache.labels("miss").inc(len(missing))
        made = await self._made({key: distinct[key] for key in missing}, background)
        with timed("cache"):
            await self._cache.put_many({key: each for key, each in made.items() if isinstance(each, Entry)})
        results: list[Embedded | InputError] = []
        for key, given in zip(keys, inputs, strict=True):
            each = known[key] if key in known else made[key]
            if isinstance(each, InputError):
                results.append(each)
            else:
                results.append(
                    Embedded(each.vector, modality_of(given), each.truncated, key in known, each.tokens, each.unknown)
                )
        return results

    async def _keys(self, inputs: Sequence[Input]) -> list[str]:
        large = sum(map(_bytes, inputs)) > _HASHED_ON_THE_LOOP
        space = self.manifest.space
        precisions = {modality: channel.precision for modality, channel in self.channels.items()}

        def keys() -> list[str]:
            return [_key(space, precisions.get(modality_of(each), "none"), each) for each in inputs]

        return await self.in_worker(keys) if large else keys()

    async def _made(self, missing: Mapping[str, Input], background: bool) -> dict[str, Entry | InputError]:
        """Make each vector, or wait for whoever is making the same. One is given up when the last who waits goes away.

        Raises the first failure that is not of one input alone.
        """
        if not missing:
            return {}
        loop = asyncio.get_running_loop()
        flights: dict[str, _Flight] = {}
        new: dict[Modality, list[tuple[Input, _Flight]]] = {}
        for key, each in missing.items():
            # A request does not wait for what is made in the background.
            name = f"background {key}" if background and key not in self._flights else key
            flight = self._flights.get(name)
            if flight is None:
                flight = self._flights[name] = _Flight(loop.create_future(), name)
                new.setdefault(modality_of(each), []).append((each, flight))
            flight.waiting += 1
            flights[key] = flight
        for modality, making in new.items():
            if modality == "text":
                self._begin(self._make(modality, making, _chunks(making), background))
            else:  # side by side
                for group in _groups(making, self._decode_workers):
                    self._begin(self._make(modality, group, [group], background))
        try:
            await asyncio.wait([each.result for each in flights.values()], return_when=asyncio.FIRST_EXCEPTION)
            failures = (each.result.exception() for each in flights.values() if each.result.done())
            if failure := next(filter(None, failures), None):
                raise failure
            return {key: flight.result.result() for key, flight in flights.items()}
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

    async def _make(self, modality: Modality, making: _Making, chunks: Sequence[_Making], background: bool) -> None:
        """Prepare chunk by chunk, enqueue, and let every flight land, whatever happens."""
        try:
            channel = self.channels.get(modality)
            if channel is None:
                raise UnsupportedMedia(f"no {modality} tower is served here")
            async with channel.using() as engine:
                answers: list[asyncio.Future[Answer]] = []
                for chunk in chunks:
                    async with channel.background_slots if background else channel.slots:
                        chunk = [each for each in chunk if not each[1].result.done()]  # who gave up meanwhile
                        with timed("decode") as took:
                            prepared = await self._prepared(engine.handling.prepare, [each for each, _ in chunk])
                        channel.decoded(took(), len(chunk))
                        for (_, flight), ready in zip(chunk, prepared, strict=True):
                            if isinstance(ready, InputError):
                                flight.land(ready)
                            elif not flight.result.done():
                                answer = await engine.batcher.enqueue(ready.value, ready.size, background=background)
                                _couple(flight, answer, ready)
                                answers.append(answer)
                if answers:
                    await asyncio.wait(answers)
        except BaseException as error:
            for _, flight in making:
                flight.land(error)
            if not isinstance(error, Exception):
                raise

    async def _prepared(
        self, prepare: Callable[[Content], Prepared], inputs: Sequence[Input], *, last: bool = False
    ) -> list[Prepared | InputError]:
        def one(each: Input) -> Prepared | InputError:
            try:
                return prepare(content_of(each))
            except InputError as error:
                return error.without_frames()
            except Exception:  # a fault of ours or of a library, which this input alone has met
                log.exception("an input of kind %s could not be prepared", modality_of(each))
                return InferenceFailed("the server failed to read this input")

        if sum(map(_length, inputs)) <= _TOKENISED_ON_THE_LOOP:
            return [one(each) for each in inputs]
        try:
            return await self._pool.run(lambda: [one(each) for each in inputs])
        except WorkerDied:
            if last:
                return [InferenceFailed("the server failed to read this input")]
            # One of them is to blame, or none: each has another try, alone.
            return [(await self._prepared(prepare, [each], last=True))[0] for each in inputs]


def _couple(flight: _Flight, answer: "asyncio.Future[Answer]", prepared: Prepared) -> None:
    """The answer to a prepared input lands its flight; a flight that is given up withdraws the input."""

    def land(answer: "asyncio.Future[Answer]") -> None:
        if answer.cancelled():
            return
        if failure := answer.exception():
            flight.land(failure)
            return
        given = answer.result()
        record("queue", given.queue_s)
        record("model", given.model_s)
        if not given.vector.any():
            flight.land(InferenceFailed("the model gave this input no direction"))
            return
        vector = given.vector.copy()  # of one row: the cache shall not keep the whole batch
        vector.setflags(write=False)
        flight.land(Entry(vector, prepared.truncated, prepared.tokens, prepared.unknown))

    answer.add_done_callback(land)
    flight.result.add_done_callback(lambda result: answer.cancel() if result.cancelled() else None)


def _chunks(making: _Making) -> list[_Making]:
    """Texts of about _CHUNK characters each: few hops between threads, and the first are embedded while the others wait
    to be read."""
    chunks: list[list[tuple[Input, _Flight]]] = []
    room = 0.0
    for each in making:
        length = _length(each[0])
        if length > room or not chunks:
            chunks.append([])
            room = float(_CHUNK)
        chunks[-1].append(each)
        room -= length
    return list(chunks)


def _groups(making: _Making, workers: int) -> list[_Making]:
    """Media that one thread decodes in one go: small ones together, for a hop to a thread and back costs as much as a
    tenth of decoding a small photograph; but never so many that another of the workers has nothing to do."""
    most = -(-len(making) // workers)
    groups: list[list[tuple[Input, _Flight]]] = []
    room = 0
    for each in making:
        size = len(each[0].data) if isinstance(each[0], Media) else 0
        if not groups or size > room or len(groups[-1]) == most:
            groups.append([])
            room = _GROUP
        groups[-1].append(each)
        room -= size
    return list(groups)


def _length(each: Input) -> float:
    """Of a text, in characters or token ids; media are endless."""
    match each:
        case Text():
            return len(each.text)
        case TokenIds():
            return len(each.ids)
        case Media() | Ready():
            return math.inf


def _bytes(each: Input) -> int:
    """Of media, which are hashed."""
    return len(each.data) if isinstance(each, Media) else each.value.nbytes if isinstance(each, Ready) else 0


def costs_of(inputs: Sequence[Input], limits: Limits | None) -> Costs:
    """What inputs cost, in the units of keys' limits; media by what their headers say, without `limits` nothing."""
    costs: dict[Unit, float] = {"items": len(inputs), "characters": 0, "pixels": 0, "seconds": 0}
    for each in inputs:
        if isinstance(each, Ready):
            costs["pixels" if each.modality == "image" else "seconds"] += each.cost
        elif not isinstance(each, Media):
            costs["characters"] += _length(each)
        elif limits is not None and each.modality == "image":
            costs["pixels"] += stated_pixels(each.data, limits)
        elif limits is not None:
            costs["seconds"] += stated_seconds(each.data, limits)
    return costs


def modality_of(each: Input) -> Modality:
    return each.modality if isinstance(each, Media | Ready) else "text"


def content_of(each: Input) -> Content:
    match each:
        case Text():
            return each
        case TokenIds():
            return each.ids
        case Media():
            return each.data
        case Ready():
            return each.value


def _key(space: str, precision: str, each: Input) -> str:
    match each:
        case Text():
            kind = "text" if each.role == "query" else each.role
            return key_of(space, precision, kind, each.text.encode("utf-8", "surrogatepass"))
        case TokenIds():
            return key_of(space, precision, "ids", ",".join(map(str, each.ids)).encode())
        case Media():
            return key_of(space, precision, each.modality, each.data)
        case Ready():
            return key_of(space, precision, f"{each.modality} {each.value.shape}", each.value.tobytes())
