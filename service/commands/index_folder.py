"""`python -m service index FOLDER`: a folder of photographs, sounds and texts → a running server, or a store.

What is in the store says what is done: with each item goes what its file was (`file` in its metadata: bytes, time of
change, sha256), so that another run, from wherever, goes on where one was stopped and looks only at what is new. A file
whose size and time are those of its item is not even read; one whose content is the same is not sent.
"""

import asyncio
import hashlib
import tempfile
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from isthmus_client import (
    AsyncIsthmus,
    Batching,
    Input,
    NotAllowed,
    NotFound,
    Refused,
    Retries,
    Unreachable,
    UnreadableAnswer,
    Written,
    audio,
    image,
    video,
)
from isthmus_client import NewItem as Sent
from isthmus_client import folder as files
from service.contract.errors import InputError
from service.engine.caller import BACKGROUND
from service.engine.embedder import Embedder
from service.engine.inputs import Media, Text, Unreadable, Video
from service.engine.inputs import opened as opened_container
from service.engine.opening import open_cache, open_engine
from service.engine.previews import Previewer
from service.engine.token_vectors import TokenEmbedder
from service.jobs.input import Bounds, Reader, Unusable, build, read_piece
from service.jobs.ledger import Refusal
from service.retrieval.indexing import NewItem, index_items
from service.runtime.disk import Disk
from service.runtime.metrics import Metrics
from service.settings import Settings, SettingsError
from service.store import StoreInUse
from service.store.opening import open_store

_ITEMS, _BYTES = 32, 8_000_000
"""Of one request, or one item."""
_AT_ONCE = 2
_PAGE = 1_000
_LONGEST_PAUSE_S = 30.0
_ATTEMPTS = 10
"""Of a request, within about a minute, before nobody is there; while there is no room it is asked for ever."""
_ANSWERED_S = 600.0
T = TypeVar("T")


class Stopped(Exception):
    """It cannot go on: the message says why."""


@dataclass(frozen=True)
class Item:
    """One file."""

    input: NewItem
    """Of kind file or text."""
    size: int


@dataclass
class Outcome:
    indexed: int = 0
    unchanged: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    """(name, why)"""


class Target(Protocol):
    def known(self, collection: str) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        """(id, metadata) of what is there."""

    async def put(self, items: Sequence[NewItem]) -> list[str | None]:
        """Why an item was refused, or None, for each. Raises Stopped."""


async def index_folder(folder: Path, collection: str, target: Target, settings: Settings) -> Outcome:
    """Index what is new in a folder, with a progress bar on a terminal. Raises Stopped."""
    outcome = Outcome()
    there = {id: metadata.get(files.KEY) async for id, metadata in target.known(collection)}
    known = {id: file for id, file in there.items() if isinstance(file, dict)}
    bounds = Bounds(settings.limits, settings.max_job_items)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as work:
        plan, ended = Path(work) / "plan.sqlite3", threading.Event()
        try:
            count = await asyncio.to_thread(build, "folder", folder, plan, bounds, ended, Disk(plan.parent, 0))
        except Unusable as error:
            raise Stopped(f"{folder}: {error}") from None
        finally:
            ended.set()
        reader = Reader("folder", folder, plan, bounds)
        with tqdm(total=count, unit=" files", disable=None, dynamic_ncols=True) as bar:
            try:
                await _index(folder, reader, count, collection, known, target, settings, outcome, bar)
            finally:
                reader.close()
    return outcome


async def _index(
    folder: Path,
    reader: Reader,
    count: int,
    collection: str,
    known: Mapping[str, Mapping[str, Any]],
    target: Target,
    settings: Settings,
    outcome: Outcome,
    bar: "tqdm[Any]",
) -> None:
    waiting: list[Item] = []
    sending: set[asyncio.Task[None]] = set()

    async def send(items: list[Item]) -> None:
        for item, refused in zip(items, await target.put([each.input for each in items]), strict=True):
            if refused is None:
                outcome.indexed += 1
            else:
                outcome.refused.append((item.input.id, refused))
            bar.update()

    async def room(most: int) -> None:
        while len(sending) > most:
            done, _ = await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
            sending.difference_update(done)
            for task in done:
                task.result()

    try:
        for number in range(count):
            found = await asyncio.to_thread(_look, folder, reader, number, collection, known, settings)
            if found is None:
                outcome.unchanged += 1
                bar.update()
            elif isinstance(found, Refusal):
                outcome.refused.append((found.id or "", found.detail))
                bar.update()
            else:
                if waiting and (len(waiting) >= _ITEMS or sum(each.size for each in waiting) + found.size > _BYTES):
                    await room(_AT_ONCE - 1)
                    sending.add(asyncio.create_task(send(waiting)))
                    waiting = []
                waiting.append(found)
        if waiting:
            sending.add(asyncio.create_task(send(waiting)))
        await room(0)
    finally:
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)


def _look(
    folder: Path,
    reader: Reader,
    number: int,
    collection: str,
    known: Mapping[str, Mapping[str, Any]],
    settings: Settings,
) -> Item | Refusal | None:
    """What is to be sent of one file; None where it is there as it is."""
    name, described = reader.name(number)
    held = known.get(name, {})
    stamp: dict[str, Any] = {}
    with suppress(OSError):  # reading it says what is wrong
        stamp |= files.stamp(folder / name)
    if described:
        stamp["described"] = hashlib.sha256(b"\0".join(described)).hexdigest()
    if stamp and stamp == {key: value for key, value in held.items() if key != "sha256"}:
        return None
    [piece] = reader.pieces(number, 1)
    item = read_piece(piece, collection, settings.limits)
    if isinstance(item, Refusal):
        return item
    stamp |= files.digest(piece.data)
    if all(stamp.get(key) == held.get(key) for key in ("sha256", "described")):
        return None
    return Item(replace(item, metadata={**item.metadata, files.KEY: stamp}), len(piece.data))


# A running server


class Server:
    """By its address, through the client. Sends behind everything else that is asked of it."""

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._space = AsyncIsthmus(
            url,
            api_key=key,
            timeout_s=_ANSWERED_S,
            retries=Retries(attempts=_ATTEMPTS, most_s=_LONGEST_PAUSE_S),
            batching=Batching(inputs=_ITEMS, bytes=4 * _BYTES, concurrency=1),
            background=True,
        )

    async def close(self) -> None:
        await self._space.close()

    async def known(self, collection: str) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        cursor = None
        while True:
            try:
                page = await self._patiently(
                    lambda cursor=cursor: self._space.page(collection=collection, limit=_PAGE, cursor=cursor)  # type: ignore[misc]
                )
            except NotFound as error:
                if error.code == "not_found":
                    return  # there is no such collection yet
                raise Stopped(f"{self._url} is no Isthmus: it has no /items") from None
            except Refused as error:
                raise Stopped(f"{self._url} refuses: {error.detail}") from None
            for item in page.items:
                yield item.id, item.metadata
            if (cursor := page.next_cursor) is None:
                return

    async def put(self, items: Sequence[NewItem]) -> list[str | None]:
        refused: list[str | None] = []
        wanted = []
        for item in items:
            try:
                refused.append(None)
                wanted.append((len(refused) - 1, Sent(item.id, _content(item), dict(item.metadata), item.collection)))
            except InputError as error:  # it is none of what the server reads
                refused[-1] = str(error)
        for (place, _), why in zip(wanted, await self._upsert([each for _, each in wanted]), strict=True):
            refused[place] = why
        return refused

    async def _upsert(self, items: Sequence[Sent]) -> list[str | None]:
        async def send() -> list[Written]:
            return [each async for each in self._space.upsert_many(items)]

        try:
            return [each.error.detail if each.error else None for each in await self._patiently(send)]
        except (NotAllowed, NotFound) as error:
            raise Stopped(f"{self._url} refuses: {error.detail}") from None
        except Refused as error:
            if len(items) == 1:
                return [error.detail]
            # One of them spoils the request: which?
            return [why for item in items for why in await self._upsert([item])]

    async def _patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Again while there is no room (429, 503). Raises Stopped where nobody answers, Refused."""
        while True:
            try:
                return await ask()
            except (Unreachable, UnreadableAnswer) as error:
                raise Stopped(f"{self._url} cannot be reached: {error}") from None
            except Refused as error:
                if error.status not in (429, 503):
                    raise


def _content(item: NewItem) -> Input:
    """Raises InputError."""
    match item.content:
        case Text(text):
            return text
        case Media("image", data):
            return image(data)
        case Media("audio", data):
            return audio(data)
        case Video(data):
            return video(data) if isinstance(opened_container(item.content), Video) else audio(data)
        case Unreadable(error):
            raise error
    raise AssertionError(item.content)


# A store


class Direct:
    """A store that no server has open."""

    def __init__(self, embedder: Embedder, tokens: TokenEmbedder, previewer: Previewer | None, store: Any) -> None:
        self._embedder, self._tokens, self._previewer, self._store = embedder, tokens, previewer, store

    async def known(self, collection: str) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
        await self._store.create_collection(collection)
        cursor = None
        while True:
            items, cursor = await self._store.page(collection, None, cursor, _PAGE)
            for item in items:
                yield item.id, item.metadata
            if cursor is None:
                return

    async def put(self, items: Sequence[NewItem]) -> list[str | None]:
        answers = await index_items(
            self._embedder,
            self._store,
            items,
            fail=False,
            caller=BACKGROUND,
            tokens=self._tokens,
            previewer=self._previewer,
        )
        return [str(each) if isinstance(each, InputError) else None for each in answers]


@asynccontextmanager
async def reached(url: str, key: str | None) -> AsyncIterator[Target]:
    server = Server(url, key)
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Target]:
    """The store that the settings name. Raises BundleError, TowerError, StoreError, SettingsError."""
    bundle = settings.read_bundle()
    try:
        store, _ = open_store(settings, [bundle.manifest])
    except StoreInUse:
        raise SettingsError(
            f"{settings.store} is open in another process: where that is a server, name it by --url"
        ) from None
    metrics = Metrics()
    try:
        cache = open_cache(settings, bundle.manifest, metrics)
        embedder = open_engine(settings, bundle).embedder(cache, settings, metrics)
        tokens = TokenEmbedder(embedder)
        previewer = Previewer(embedder, settings.limits) if settings.previews else None
        try:
            yield Direct(embedder, tokens, previewer, store)
        finally:
            await tokens.close()
            await embedder.close()
            await cache.close()
    finally:
        await store.close()
