"""The two clients: `Isthmus`, and `AsyncIsthmus` with the same methods to be awaited.

    with Isthmus("http://127.0.0.1:8000") as space:
        space.upsert([NewItem("cat", Path("cat.jpg"), {"place": "garden"})])
        for found in space.search("a cat", top_k=3):
            print(found.id, found.score)

Every method raises a ClientError (errors.py) where there is no result. Overload (429) and restarts (503, a connection
that breaks) are waited for first, as `Retries` says.
"""

import asyncio
import json
import os
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, closing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from isthmus_client import batches, calls, jobs
from isthmus_client.batches import Batching, Entry, Plan, gather_lazily, map_lazily
from isthmus_client.calls import (
    Call,
    ClassifyOptions,
    CollectionOptions,
    EmbedOptions,
    ListOptions,
    NewItem,
    SearchOptions,
)
from isthmus_client.errors import ClientError, Unreachable, UnreadableAnswer, refusal
from isthmus_client.inputs import Input
from isthmus_client.jobs import Report, Source, Upload
from isthmus_client.results import (
    Classified,
    Collection,
    Embedding,
    Facets,
    Found,
    Item,
    Job,
    JobError,
    LabelSet,
    Map,
    Model,
    Page,
    Preview,
    Readiness,
    Written,
)
from isthmus_client.retries import RETRIED_FAILURES, RETRIED_STATUSES, Retries, retry_after

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_S = 60.0
T = TypeVar("T")
Labels = Sequence[str | Mapping[str, Any]]
Templates = Sequence[str] | Mapping[str, Sequence[str]]


class _Conversation:
    """What both clients share: the server's address, and the reading of answers."""

    def __init__(
        self,
        url: str | None,
        api_key: str | None,
        timeout_s: float,
        retries: Retries,
        batching: Batching,
        background: bool,
    ) -> None:
        self.url = (url or os.environ.get("ISTHMUS_URL") or DEFAULT_URL).rstrip("/")
        self.retries = retries
        self.batching = batching
        key = api_key or os.environ.get("ISTHMUS_API_KEY")
        headers = {"accept": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        if background:
            headers["priority"] = "u=7"  # RFC 9218: after everything else that the server is asked
        timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        self.options: dict[str, Any] = {"base_url": self.url, "headers": headers, "timeout": timeout}

    @staticmethod
    def request(call: Call[Any]) -> dict[str, Any]:
        """Return a call as arguments of httpx2."""
        parts: dict[str, Any] = {"method": call.method, "url": call.path}
        parts |= {"params": call.parameters, "headers": call.headers}
        if call.files:
            parts["data"] = {"request": json.dumps(call.body, allow_nan=False)}
            parts["files"] = [("file", (str(number), data)) for number, data in enumerate(call.files)]
        elif not isinstance(call.body, Upload):
            parts["json"] = call.body
        return {name: value for name, value in parts.items() if value is not None}

    def pause(self, call: Call[Any], failed: int, outcome: httpx2.Response | httpx2.HTTPError) -> float | None:
        """Seconds until the next try; None where this outcome is the last one."""
        if isinstance(outcome, httpx2.HTTPError):
            return self.retries.pause(failed, None) if isinstance(outcome, RETRIED_FAILURES) else None
        if outcome.status_code in RETRIED_STATUSES - call.answers:
            return self.retries.pause(failed, retry_after(outcome))
        return None

    def result(self, call: Call[T], outcome: httpx2.Response | httpx2.HTTPError) -> T:
        """The typed result of the last outcome. Raises ClientError."""
        if isinstance(outcome, httpx2.HTTPError):
            what = "did not answer in time" if isinstance(outcome, httpx2.TimeoutException) else "cannot be reached"
            raise Unreachable(f"{self.url} {what}: {type(outcome).__name__}: {outcome}") from outcome
        if outcome.is_error and outcome.status_code not in call.answers:
            raise refusal(outcome, retry_after(outcome))
        try:
            return call.read(outcome)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnreadableAnswer(
                f"{self.url}{call.path} gave an answer ({outcome.status_code}) that is not one of an Isthmus server"
            ) from error


class Isthmus(_Conversation):
    """The client. `url` defaults to ISTHMUS_URL or http://127.0.0.1:8000, `api_key` to ISTHMUS_API_KEY. Threads may
    share it.

    What is embedded in the `background` waits behind what others ask for. `transport` and `sleep` are seams for tests.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries = Retries(),
        batching: Batching = Batching(),
        background: bool = False,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__(url, api_key, timeout_s, retries, batching, background)
        self._http = httpx2.Client(**self.options, transport=transport)
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _do(self, call: Call[T]) -> T:
        failed = 0
        while True:
            outcome: httpx2.Response | httpx2.HTTPError
            try:
                content = call.body.blocks() if isinstance(call.body, Upload) else None
                outcome = self._http.request(**self.request(call), content=content)
            except httpx2.HTTPError as error:
                outcome = error
            failed += 1
            pause = self.pause(call, failed, outcome)
            if pause is None:
                return self.result(call, outcome)
            self._sleep(pause)

    def _drive(self, plan: Plan[T]) -> T:
        try:
            call = next(plan)
            while True:
                try:
                    result = self._do(call)
                except ClientError as error:
                    call = plan.throw(error)
                else:
                    call = plan.send(result)
        except StopIteration as done:
            finished: T = done.value
            return finished

    def embed(self, inputs: Iterable[Input], **options: Unpack[EmbedOptions]) -> list[Embedding]:
        """Embed inputs in one request: a unit vector per input, in order."""
        return self._do(calls.embed(inputs, options))

    def embed_many(self, inputs: Iterable[Input], **options: Unpack[EmbedOptions]) -> Generator[Embedding, None, None]:
        """Embed any number of inputs, in order, in batches of which several are under way at once (`Batching`).

        `inputs` is read as it is needed. An input that cannot be embedded gives an Embedding with its `error`.
        """
        whole: EmbedOptions = {"on_error": "null", **options}

        def one(batch: Sequence[Entry]) -> list[Embedding]:
            return self._drive(batches.embedded(batch, whole))

        entries = batches.of_inputs(inputs, self.batching)
        with closing(map_lazily(one, entries, self.batching.concurrency)) as finished:
            for done in finished:
                yield from done

    def search(self, query: Input, **options: Unpack[SearchOptions]) -> list[Found]:
        """Search the stored items, nearest first."""
        return self._do(calls.search(query, options))

    def search_many(self, queries: Iterable[Input], **options: Unpack[SearchOptions]) -> list[list[Found]]:
        """Search for several queries in one request: a list of results for each."""
        return self._do(calls.search_many(queries, options))

    def classify(self, inputs: Iterable[Input], **options: Unpack[ClassifyOptions]) -> list[Classified]:
        """The labels of each input, best first. Give `labels` or the name of a stored `label_set`."""
        return self._do(calls.classify(inputs, options))

    def score(self, pairs: Iterable[tuple[Input, Input]], *, model: str | None = None) -> list[float]:
        """The cosine similarity of each pair."""
        return self._do(calls.score(pairs, model))

    def upsert(self, items: Iterable[NewItem], *, on_error: str = "fail") -> list[Written]:
        """Store items in one request, each replacing the one of its collection and id. Returns once they are on
        disk."""
        return self._do(calls.upsert_wire([item.to_wire(as_file=True) for item in items], on_error))

    def upsert_many(self, items: Iterable[NewItem]) -> Generator[Written, None, None]:
        """Store any number of items, as `embed_many`: yields the outcome of each, in order. Only iterated items are
        sent."""

        def one(batch: Sequence[Entry]) -> list[Written]:
            return self._drive(batches.written(batch))

        entries = batches.of_items(items, self.batching)
        with closing(map_lazily(one, entries, self.batching.concurrency)) as finished:
            for done in finished:
                yield from done

    def page(self, **options: Unpack[ListOptions]) -> Page:
        """Return one page of the stored items."""
        return self._do(calls.list_items(options))

    def items(self, **options: Unpack[ListOptions]) -> Iterator[Item]:
        """Yield every stored item, page by page, in the order in which they were first stored."""
        while True:
            page = self.page(**options)
            yield from page.items
            if page.next_cursor is None:
                return
            options["cursor"] = page.next_cursor

    def item(
        self,
        id: str,
        *,
        collection: str = "default",
        with_vector: bool = False,
        with_preview: bool = False,
        with_original: bool = False,
    ) -> Item:
        return self._do(calls.get_item(id, collection, with_vector, with_preview, with_original))

    def delete(
        self,
        ids: Sequence[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        collection: str = "default",
    ) -> int:
        """Delete items by ids, or by a filter over the metadata; return how many there were."""
        return self._do(calls.delete_items(ids, filter, collection))

    def move(
        self,
        ids: Mapping[str, str],
        *,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        collection: str = "default",
    ) -> int:
        """Give up to 1,000 items other ids (old → new), with all that is stored of them; return how many there were.

        Items whose old ids are in `metadata` get these metadata in place of theirs.
        """
        return self._do(calls.move_items(ids, metadata, collection))

    def collections(self) -> list[Collection]:
        return self._do(calls.list_collections())

    def collection(self, name: str) -> Collection:
        return self._do(calls.get_collection(name))

    def put_collection(self, name: str, **options: Unpack[CollectionOptions]) -> Collection:
        """Create a collection, or change the given options of it."""
        return self._do(calls.put_collection(name, options))

    def drop_collection(self, name: str) -> None:
        self._do(calls.drop_collection(name))

    def map(self, collection: str = "default", *, limit: int | None = None, label: str | None = None) -> Map:
        """A collection in the plane, each point with the value of a metadata key as its label."""
        return self._do(calls.map_collection(collection, limit, label))

    def facets(
        self,
        collection: str = "default",
        keys: Sequence[str] = (),
        *,
        filter: Mapping[str, Any] | None = None,
        modality: str | None = None,
    ) -> Facets:
        """Count the items that pass a filter: all, those of each modality, and those with each value of the keys."""
        return self._do(calls.facets(collection, keys, filter, modality))

    def preview(self, id: str, *, collection: str = "default") -> Preview:
        """Return the preview that the server keeps of an item: an image (JPEG) or a sound (MP3). Raises NotFound
        without one."""
        return self._do(calls.preview(id, collection))

    def original(self, id: str, *, collection: str = "default") -> Preview:
        """Return the file that an item was made from. Raises NotFound where the server gives out no such file."""
        return self._do(calls.original(id, collection))

    def create_job(self, source: Source, *, collection: str | None = None, idempotency_key: str | None = None) -> Job:
        """Store the items of JSON lines or a tar in the background, of any number and size.

        Returns once the server has it on its disk. With the same `idempotency_key` and content it is the same job.
        `collection` is that of items which do not name one.
        """
        return self._do(jobs.create(source, collection, idempotency_key))

    def job(self, id: str) -> Job:
        return self._do(jobs.get(id))

    def jobs(self, *, limit: int = 100, before: str | None = None, states: Sequence[str] = ()) -> list[Job]:
        """The newest first; `before`: those that are older than that job."""
        return self._do(jobs.listed(limit, before, states))

    def wait_for_job(self, id: str, *, report: Report | None = None, every_s: float = 2.0) -> Job:
        """The job once it has ended, whichever way; `report` is told of it at each look."""
        for pause in jobs.pauses(every_s):
            job = self.job(id)
            if report is not None:
                report(job)
            if job.ended is not None:
                return job
            self._sleep(pause)
        raise AssertionError("pauses have no end")

    def job_errors(self, id: str) -> list[JobError]:
        """The items that were refused so far, in the order of the input."""
        return self._do(jobs.errors(id))

    def cancel_job(self, id: str) -> Job:
        """Stop a job; nothing more of it is written after that, and what it stored stays."""
        return self._do(jobs.cancel(id))

    def put_label_set(
        self, name: str, labels: Labels, *, templates: Templates | None = None, off_topic: Iterable[Input] = ()
    ) -> LabelSet:
        """Store labels, encoded once, for `classify(label_set=name)`."""
        return self._do(calls.put_label_set(name, labels, templates, off_topic))

    def label_sets(self, *, limit: int = 100, after: str | None = None) -> list[str]:
        """Return the names of the stored label sets, in order; `after`: those that come after that name."""
        return self._do(calls.list_label_sets(limit, after))

    def label_set(self, name: str) -> LabelSet:
        return self._do(calls.get_label_set(name))

    def delete_label_set(self, name: str) -> None:
        self._do(calls.delete_label_set(name))

    def models(self) -> list[Model]:
        """The served bundles; the first is the default."""
        return self._do(calls.models())

    def keeps_previews(self) -> bool:
        """Return whether the server keeps previews of what is stored from now on."""
        return self._do(calls.keeps_previews())

    def ready(self) -> Readiness:
        """Return which parts of the server work. Does not raise where the server answers that it is not ready."""
        return self._do(calls.ready())


class AsyncIsthmus(_Conversation):
    """The asynchronous `Isthmus`: its methods are awaited; `embed_many`, `upsert_many` and `items` are async
    iterators."""

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries = Retries(),
        batching: Batching = Batching(),
        background: bool = False,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        super().__init__(url, api_key, timeout_s, retries, batching, background)
        self._http = httpx2.AsyncClient(**self.options, transport=transport)
        self._sleep = sleep

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _do(self, call: Call[T]) -> T:
        failed = 0
        while True:
            outcome: httpx2.Response | httpx2.HTTPError
            try:
                content = call.body.awaited() if isinstance(call.body, Upload) else None
                outcome = await self._http.request(**self.request(call), content=content)
            except httpx2.HTTPError as error:
                outcome = error
            failed += 1
            pause = self.pause(call, failed, outcome)
            if pause is None:
                return self.result(call, outcome)
            await self._sleep(pause)

    async def _drive(self, plan: Plan[T]) -> T:
        try:
            call = next(plan)
            while True:
                try:
                    result = await self._do(call)
                except ClientError as error:
                    call = plan.throw(error)
                else:
                    call = plan.send(result)
        except StopIteration as done:
            finished: T = done.value
            return finished

    # Calls that may read files are made in a thread.

    async def embed(self, inputs: Iterable[Input], **options: Unpack[EmbedOptions]) -> list[Embedding]:
        return await self._do(await asyncio.to_thread(calls.embed, inputs, options))

    async def embed_many(
        self, inputs: Iterable[Input], **options: Unpack[EmbedOptions]
    ) -> AsyncGenerator[Embedding, None]:
        whole: EmbedOptions = {"on_error": "null", **options}

        async def one(batch: Sequence[Entry]) -> list[Embedding]:
            return await self._drive(batches.embedded(batch, whole))

        entries = batches.of_inputs(inputs, self.batching)
        async with aclosing(gather_lazily(one, entries, self.batching.concurrency)) as finished:
            async for done in finished:
                for result in done:
                    yield result

    async def search(self, query: Input, **options: Unpack[SearchOptions]) -> list[Found]:
        return await self._do(await asyncio.to_thread(calls.search, query, options))

    async def search_many(self, queries: Iterable[Input], **options: Unpack[SearchOptions]) -> list[list[Found]]:
        return await self._do(await asyncio.to_thread(calls.search_many, queries, options))

    async def classify(self, inputs: Iterable[Input], **options: Unpack[ClassifyOptions]) -> list[Classified]:
        return await self._do(await asyncio.to_thread(calls.classify, inputs, options))

    async def score(self, pairs: Iterable[tuple[Input, Input]], *, model: str | None = None) -> list[float]:
        return await self._do(await asyncio.to_thread(calls.score, pairs, model))

    async def upsert(self, items: Iterable[NewItem], *, on_error: str = "fail") -> list[Written]:
        wires = await asyncio.to_thread(lambda: [item.to_wire(as_file=True) for item in items])
        return await self._do(calls.upsert_wire(wires, on_error))

    async def upsert_many(self, items: Iterable[NewItem]) -> AsyncGenerator[Written, None]:
        async def one(batch: Sequence[Entry]) -> list[Written]:
            return await self._drive(batches.written(batch))

        entries = batches.of_items(items, self.batching)
        async with aclosing(gather_lazily(one, entries, self.batching.concurrency)) as finished:
            async for done in finished:
                for result in done:
                    yield result

    async def page(self, **options: Unpack[ListOptions]) -> Page:
        return await self._do(calls.list_items(options))

    async def items(self, **options: Unpack[ListOptions]) -> AsyncIterator[Item]:
        while True:
            page = await self.page(**options)
            for item in page.items:
                yield item
            if page.next_cursor is None:
                return
            options["cursor"] = page.next_cursor

    async def item(
        self,
        id: str,
        *,
        collection: str = "default",
        with_vector: bool = False,
        with_preview: bool = False,
        with_original: bool = False,
    ) -> Item:
        return await self._do(calls.get_item(id, collection, with_vector, with_preview, with_original))

    async def delete(
        self,
        ids: Sequence[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        collection: str = "default",
    ) -> int:
        return await self._do(calls.delete_items(ids, filter, collection))

    async def move(
        self,
        ids: Mapping[str, str],
        *,
        metadata: Mapping[str, Mapping[str, Any]] | None = None,
        collection: str = "default",
    ) -> int:
        return await self._do(calls.move_items(ids, metadata, collection))

    async def collections(self) -> list[Collection]:
        return await self._do(calls.list_collections())

    async def collection(self, name: str) -> Collection:
        return await self._do(calls.get_collection(name))

    async def put_collection(self, name: str, **options: Unpack[CollectionOptions]) -> Collection:
        return await self._do(calls.put_collection(name, options))

    async def drop_collection(self, name: str) -> None:
        await self._do(calls.drop_collection(name))

    async def map(self, collection: str = "default", *, limit: int | None = None, label: str | None = None) -> Map:
        return await self._do(calls.map_collection(collection, limit, label))

    async def facets(
        self,
        collection: str = "default",
        keys: Sequence[str] = (),
        *,
        filter: Mapping[str, Any] | None = None,
        modality: str | None = None,
    ) -> Facets:
        return await self._do(calls.facets(collection, keys, filter, modality))

    async def preview(self, id: str, *, collection: str = "default") -> Preview:
        return await self._do(calls.preview(id, collection))

    async def original(self, id: str, *, collection: str = "default") -> Preview:
        return await self._do(calls.original(id, collection))

    async def create_job(
        self, source: Source, *, collection: str | None = None, idempotency_key: str | None = None
    ) -> Job:
        return await self._do(await asyncio.to_thread(jobs.create, source, collection, idempotency_key))

    async def job(self, id: str) -> Job:
        return await self._do(jobs.get(id))

    async def jobs(self, *, limit: int = 100, before: str | None = None, states: Sequence[str] = ()) -> list[Job]:
        return await self._do(jobs.listed(limit, before, states))

    async def wait_for_job(self, id: str, *, report: Report | None = None, every_s: float = 2.0) -> Job:
        for pause in jobs.pauses(every_s):
            job = await self.job(id)
            if report is not None:
                report(job)
            if job.ended is not None:
                return job
            await self._sleep(pause)
        raise AssertionError("pauses have no end")

    async def job_errors(self, id: str) -> list[JobError]:
        return await self._do(jobs.errors(id))

    async def cancel_job(self, id: str) -> Job:
        return await self._do(jobs.cancel(id))

    async def put_label_set(
        self, name: str, labels: Labels, *, templates: Templates | None = None, off_topic: Iterable[Input] = ()
    ) -> LabelSet:
        return await self._do(await asyncio.to_thread(calls.put_label_set, name, labels, templates, off_topic))

    async def label_sets(self, *, limit: int = 100, after: str | None = None) -> list[str]:
        return await self._do(calls.list_label_sets(limit, after))

    async def label_set(self, name: str) -> LabelSet:
        return await self._do(calls.get_label_set(name))

    async def delete_label_set(self, name: str) -> None:
        await self._do(calls.delete_label_set(name))

    async def models(self) -> list[Model]:
        return await self._do(calls.models())

    async def keeps_previews(self) -> bool:
        return await self._do(calls.keeps_previews())

    async def ready(self) -> Readiness:
        return await self._do(calls.ready())
