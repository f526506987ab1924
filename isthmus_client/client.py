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
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, closing
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack, cast
from urllib.parse import quote

import httpx2

from isthmus_client import batches, calls, jobs, results
from isthmus_client.batches import Batching, Entry, Plan, gather_lazily, map_lazily
from isthmus_client.calls import (
    Call,
    ClassifyOptions,
    CollectionOptions,
    EmbedOptions,
    Judgement,
    ListOptions,
    NewItem,
    ScriptOptions,
    SearchOptions,
)
from isthmus_client.errors import ClientError, Unreachable, UnreadableAnswer, refusal
from isthmus_client.inputs import Input, to_wire
from isthmus_client.jobs import Report, Source, Upload
from isthmus_client.results import (
    Classified,
    Collection,
    Embedding,
    Facets,
    Feedback,
    FeedbackVersion,
    Followed,
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
P = ParamSpec("P")
Labels = Sequence[str | Mapping[str, Any]]
Templates = Sequence[str] | Mapping[str, Sequence[str]]


class _Conversation:
    """The parts that both clients share: the server's address, and the reading of answers."""

    _open: Callable[..., Any]
    _sleep: Callable[[float], Any]

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 60.0,
        retries: Retries = Retries(),
        batching: Batching = Batching(),
        background: bool = False,
        transport: httpx2.BaseTransport | httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        self.url = (url or os.environ.get("ISTHMUS_URL") or DEFAULT_URL).rstrip("/")
        self.retries = retries
        self.batching = batching
        key = api_key or os.environ.get("ISTHMUS_API_KEY")
        headers = {"accept": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        if background:
            headers["priority"] = "u=7"  # RFC 9218: after everything else that the server is asked
        timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_S))
        self._http = self._open(base_url=self.url, headers=headers, timeout=timeout, transport=transport)
        self._sleep = sleep or self._sleep

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

    def pause(self, call: Call[Any], failures: int, outcome: httpx2.Response | httpx2.HTTPError) -> float | None:
        """Return the seconds until the next try; None where this outcome is the last one."""
        if isinstance(outcome, httpx2.HTTPError):
            return self.retries.pause(failures, None) if isinstance(outcome, RETRIED_FAILURES) else None
        if outcome.status_code in RETRIED_STATUSES - call.answers:
            return self.retries.pause(failures, retry_after(outcome))
        return None

    def result(self, call: Call[T], outcome: httpx2.Response | httpx2.HTTPError) -> T:
        """Return the typed result of the last outcome. Raises ClientError."""
        if isinstance(outcome, httpx2.HTTPError):
            problem = "did not answer in time" if isinstance(outcome, httpx2.TimeoutException) else "cannot be reached"
            raise Unreachable(f"{self.url} {problem}: {type(outcome).__name__}: {outcome}") from outcome
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

    _open, _sleep = httpx2.Client, staticmethod(time.sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _do(self, call: Call[T]) -> T:
        failures = 0
        while True:
            outcome: httpx2.Response | httpx2.HTTPError
            try:
                content = call.body.blocks() if isinstance(call.body, Upload) else None
                outcome = self._http.request(**self.request(call), content=content)
            except httpx2.HTTPError as error:
                outcome = error
            failures += 1
            pause = self.pause(call, failures, outcome)
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
            outcome: T = done.value
            return outcome

    def embed(self, inputs: Iterable[Input], **options: Unpack[EmbedOptions]) -> list[Embedding]:
        """Embed inputs in one request: a unit vector per input, in order."""
        return self._do(calls.embed([to_wire(value) for value in inputs], options))

    def embed_many(self, inputs: Iterable[Input], **options: Unpack[EmbedOptions]) -> Generator[Embedding, None, None]:
        """Embed any number of inputs, in order, in batches of which several are under way at once (`Batching`).

        `inputs` is read as it is needed. An input that cannot be embedded gives an Embedding with its `error`.
        """
        defaults: EmbedOptions = {"on_error": "null", **options}
        return self._many(partial(batches.embedded, options=defaults), batches.of_inputs(inputs, self.batching))

    def search(self, query: Input, **options: Unpack[SearchOptions]) -> list[Found]:
        """Search the stored items, nearest first."""
        body = {"query": to_wire(query), **options}
        return self._do(Call("POST", "/search", calls.answered(Found), body))

    def search_many(self, queries: Iterable[Input], **options: Unpack[SearchOptions]) -> list[list[Found]]:
        """Search for several queries in one request: a list of results for each."""
        body = {"queries": [to_wire(query) for query in queries], **options}

        def read(reply: httpx2.Response) -> list[list[Found]]:
            return [[results.from_json(Found, hit) for hit in hits] for hits in calls.body_of(reply)["results"]]

        return self._do(Call("POST", "/search/batch", read, body))

    def follow(self, script: Iterable[Input], **options: Unpack[ScriptOptions]) -> list[Followed]:
        """Search for the videos and long sounds in which the steps of a script come one after the other."""
        body = {"script": [to_wire(step) for step in script], **options}
        return self._do(Call("POST", "/search/script", calls.answered(Followed), body))

    def teach(self, judgements: Iterable[Judgement], *, collection: str = "default") -> FeedbackVersion:
        """Judge what searches found: they are moved by it from now on. Return the version that this makes."""
        judged = [
            {"query": to_wire(row.query), "relevant": list(row.relevant), "not_relevant": list(row.not_relevant)}
            for row in judgements
        ]
        body = {"judgements": judged, "collection": collection}
        return self._do(
            Call("POST", "/feedback", lambda reply: results.from_json(FeedbackVersion, calls.body_of(reply)), body)
        )

    def feedback(self, collection: str = "default") -> Feedback:
        """Return the versions of what a collection was taught."""
        return self._do(Call("GET", "/feedback", results.reader(Feedback), parameters={"collection": collection}))

    def use_feedback(self, version: int | None, *, collection: str = "default") -> Feedback:
        """Let searches use another version of what a collection was taught, or none."""
        return self._do(
            Call("PUT", "/feedback", results.reader(Feedback), {"version": version, "collection": collection})
        )

    def delete_feedback(self, version: int | None = None, *, collection: str = "default") -> None:
        """Delete a version of what a collection was taught, or all. Searches that used it use none."""
        parameters = _not_none(version=version, collection=collection)
        return self._do(Call("DELETE", "/feedback", _nothing, parameters=parameters))

    def classify(self, inputs: Iterable[Input], **options: Unpack[ClassifyOptions]) -> list[Classified]:
        """Return the labels of each input, best first. Give `labels` or the name of a stored `label_set`."""
        body = {"inputs": [to_wire(value) for value in inputs], **options}
        return self._do(Call("POST", "/classify", calls.answered(Classified), body))

    def score(self, pairs: Iterable[tuple[Input, Input]], *, model: str | None = None) -> list[float]:
        """Return the cosine similarity of each pair."""
        body = {"pairs": [{"a": to_wire(a), "b": to_wire(b)} for a, b in pairs]} | _not_none(model=model)
        return self._do(Call("POST", "/score", lambda reply: list(reply.json()["scores"]), body))

    def upsert(self, items: Iterable[NewItem], *, on_error: str = "fail") -> list[Written]:
        """Store items in one request, each in place of that of its collection and id. Returns once on disk."""
        return self._do(calls.upsert([item.to_wire(as_file=True) for item in items], on_error))

    def upsert_many(self, items: Iterable[NewItem]) -> Generator[Written, None, None]:
        """Store any number of items, as `embed_many`; yield the outcome of each. Only iterated items are sent."""
        return self._many(batches.written, batches.of_items(items, self.batching))

    def _many(
        self, plan: Callable[[Sequence[Entry]], Plan[list[T]]], entries: Iterator[list[Entry]]
    ) -> Generator[T, None, None]:
        with closing(
            map_lazily(lambda batch: self._drive(plan(batch)), entries, self.batching.concurrency)
        ) as batches_done:
            for batch in batches_done:
                yield from batch

    def page(self, **options: Unpack[ListOptions]) -> Page:
        """Return one page of the stored items."""
        parameters = _query_parameters(**options)
        return self._do(Call("GET", "/items", results.reader(Page), parameters=parameters))

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
        include = {"vector": with_vector, "preview": with_preview, "original": with_original}
        parameters = {"collection": collection, "include": [name for name in include if include[name]]}
        return self._do(Call("GET", _path("items", id), results.reader(Item), parameters=parameters))

    def delete(
        self,
        ids: Sequence[str] | None = None,
        *,
        filter: Mapping[str, Any] | None = None,
        collection: str = "default",
    ) -> int:
        """Delete items by ids, or by a filter over the metadata; return how many there were."""
        body = _not_none(collection=collection, ids=ids, filter=filter)
        return self._do(Call("POST", "/items/delete", lambda reply: int(reply.json()["deleted"]), body))

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
        described = {id: {"metadata": fields} for id, fields in (metadata or {}).items()}
        moves = [{"id": id, "to": to, **described.get(id, {})} for id, to in ids.items()]
        body = {"moves": moves, "collection": collection}
        return self._do(Call("POST", "/items/move", lambda reply: int(reply.json()["moved"]), body))

    def collections(self) -> list[Collection]:
        return self._do(Call("GET", "/collections", results.listed("collections", Collection)))

    def collection(self, name: str) -> Collection:
        return self._do(Call("GET", _path("collections", name), results.reader(Collection)))

    def put_collection(self, name: str, **options: Unpack[CollectionOptions]) -> Collection:
        """Create a collection, or change the given options of it."""
        return self._do(Call("PUT", _path("collections", name), results.reader(Collection), options))

    def drop_collection(self, name: str) -> None:
        return self._do(Call("DELETE", _path("collections", name), _nothing))

    def map(self, collection: str = "default", *, limit: int | None = None, label: str | None = None) -> Map:
        """Return the map of a collection, each point with the value of a metadata key as its label."""
        parameters = _not_none(limit=limit, label=label)
        return self._do(
            Call("GET", _path("collections", collection, "map"), results.reader(Map), parameters=parameters)
        )

    def facets(
        self,
        collection: str = "default",
        keys: Sequence[str] = (),
        *,
        filter: Mapping[str, Any] | None = None,
        modality: str | None = None,
    ) -> Facets:
        """Count the items that pass a filter: all, those of each modality, and those with each value of the keys."""
        parameters = _query_parameters(key=list(keys), modality=modality, filter=filter)
        path = _path("collections", collection, "facets")
        return self._do(Call("GET", path, results.reader(Facets), parameters=parameters))

    def preview(self, id: str, *, collection: str = "default") -> Preview:
        """Return the preview that the server keeps of an item, JPEG or MP3. Raises NotFound without one."""
        return self._do(Call("GET", _path("previews", id), results.file, parameters={"collection": collection}))

    def original(self, id: str, *, collection: str = "default") -> Preview:
        """Return the file that an item was made from. Raises NotFound where the server gives out no such file."""
        return self._do(Call("GET", _path("media", id), results.file, parameters={"collection": collection}))

    def create_job(self, source: Source, *, collection: str | None = None, idempotency_key: str | None = None) -> Job:
        """Store the items of JSON lines or a tar in the background, of any number and size.

        Returns once the server has it on its disk. With the same `idempotency_key` and content it is the same job.
        `collection` is that of items which do not name one.
        """
        return self._do(jobs.create(source, collection, idempotency_key))

    def job(self, id: str) -> Job:
        return self._do(Call("GET", _path("jobs", id), results.reader(Job)))

    def jobs(self, *, limit: int = 100, before: str | None = None, states: Sequence[str] = ()) -> list[Job]:
        """Return the newest jobs first; `before`: those that are older than that job."""
        parameters = _not_none(limit=limit, state=list(states), before=before)
        return self._do(Call("GET", "/jobs", results.listed("jobs", Job), parameters=parameters))

    def wait_for_job(self, id: str, *, report: Report | None = None, every_s: float = 2.0) -> Job:
        """Return the job once it has ended, whichever way; `report` is told of it at each look."""
        for pause in jobs.pauses(every_s):
            job = self.job(id)
            if report is not None:
                report(job)
            if job.ended is not None:
                return job
            self._sleep(pause)
        raise AssertionError("pauses have no end")

    def job_errors(self, id: str) -> list[JobError]:
        """Return the items that were refused so far, in the order of the input."""

        # Not splitlines: a line of JSON may contain other line separators.
        def read(reply: httpx2.Response) -> list[JobError]:
            return [results.from_json(JobError, json.loads(line)) for line in reply.content.split(b"\n") if line]

        return self._do(Call("GET", _path("jobs", id, "errors"), read))

    def cancel_job(self, id: str) -> Job:
        """Stop a job; nothing more of it is written after that, and what it stored stays."""
        return self._do(Call("DELETE", _path("jobs", id), results.reader(Job)))

    def put_label_set(
        self, name: str, labels: Labels, *, templates: Templates | None = None, off_topic: Iterable[Input] = ()
    ) -> LabelSet:
        """Store labels, encoded once, for `classify(label_set=name)`. A label's `examples` are inputs."""
        off = [to_wire(value) for value in off_topic]
        body = _not_none(labels=[_taught(label) for label in labels], off_topic=off, templates=templates)
        return self._do(Call("PUT", _path("label-sets", name), results.label_set, body))

    def label_sets(self, *, limit: int = 100, after: str | None = None) -> list[str]:
        """Return the names of the stored label sets, in order; `after`: those that come after that name."""
        parameters = _not_none(limit=limit, after=after)
        return self._do(
            Call(
                "GET",
                "/label-sets",
                lambda reply: [row["name"] for row in reply.json()["label_sets"]],
                None,
                parameters,
            )
        )

    def label_set(self, name: str) -> LabelSet:
        return self._do(Call("GET", _path("label-sets", name), results.label_set))

    def delete_label_set(self, name: str) -> None:
        return self._do(Call("DELETE", _path("label-sets", name), _nothing))

    def models(self) -> list[Model]:
        """Return the served bundles; the first is the default."""
        return self._do(Call("GET", "/models", results.listed("models", Model)))

    def keeps_previews(self) -> bool:
        """Return whether the server keeps previews of what is stored from now on."""
        return self._do(Call("GET", "/models", lambda reply: bool(reply.json().get("previews", False))))

    def ready(self) -> Readiness:
        """Return which parts of the server work. Does not raise where the server answers that it is not ready."""

        def read(reply: httpx2.Response) -> Readiness:
            body = reply.json()
            return Readiness(body["status"] == "ready", body["checks"], body.get("providers", {}))

        return self._do(Call("GET", "/readyz", read, answers=frozenset({503})))


def _path(*parts: str) -> str:
    return "".join(f"/{quote(part, safe='')}" for part in parts)


def _not_none(**options: Any) -> dict[str, Any]:
    """Return the options that are not None, as parameters or fields of a body."""
    return {name: value for name, value in options.items() if value is not None}


def _query_parameters(**options: Any) -> dict[str, Any]:
    """Return the options that are not None, as parameters, of which a filter is JSON."""
    parameters = _not_none(**options)
    return parameters | ({"filter": json.dumps(parameters["filter"])} if "filter" in parameters else {})


def _taught(label: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """Return a label as JSON has it, with the inputs that show it."""
    if isinstance(label, str):
        return label
    examples = {"examples": [to_wire(example) for example in label["examples"]]} if "examples" in label else {}
    return {**label, **examples}


def _nothing(_: httpx2.Response) -> None:
    return None


class _Calls:
    """Stands for a client in its methods, of which it takes the calls instead of the results."""

    @staticmethod
    def _do(call: Call[T]) -> Call[T]:
        return call


def _as_coroutine(
    method: Callable[Concatenate[Isthmus, P], T],
) -> Callable[Concatenate["AsyncIsthmus", P], Coroutine[Any, Any, T]]:
    """Return a method of `Isthmus` as one to be awaited. It makes its call in a thread: that may read files."""
    make: Callable[..., Call[T]] = cast("Any", method)

    @wraps(method)
    async def awaited(client: "AsyncIsthmus", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await client._do(await asyncio.to_thread(make, _Calls, *args, **kwargs))

    return awaited


class AsyncIsthmus(_Conversation):
    """The asynchronous `Isthmus`: methods are awaited; `embed_many`, `upsert_many`, `items` are async iterators."""

    _open, _sleep = httpx2.AsyncClient, staticmethod(asyncio.sleep)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _do(self, call: Call[T]) -> T:
        failures = 0
        while True:
            outcome: httpx2.Response | httpx2.HTTPError
            try:
                content = call.body.awaited() if isinstance(call.body, Upload) else None
                outcome = await self._http.request(**self.request(call), content=content)
            except httpx2.HTTPError as error:
                outcome = error
            failures += 1
            pause = self.pause(call, failures, outcome)
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
            outcome: T = done.value
            return outcome

    embed = _as_coroutine(Isthmus.embed)
    search = _as_coroutine(Isthmus.search)
    search_many = _as_coroutine(Isthmus.search_many)
    follow = _as_coroutine(Isthmus.follow)
    teach = _as_coroutine(Isthmus.teach)
    feedback = _as_coroutine(Isthmus.feedback)
    use_feedback = _as_coroutine(Isthmus.use_feedback)
    delete_feedback = _as_coroutine(Isthmus.delete_feedback)
    classify = _as_coroutine(Isthmus.classify)
    score = _as_coroutine(Isthmus.score)
    upsert = _as_coroutine(Isthmus.upsert)
    page = _as_coroutine(Isthmus.page)
    item = _as_coroutine(Isthmus.item)
    delete = _as_coroutine(Isthmus.delete)
    move = _as_coroutine(Isthmus.move)
    collections = _as_coroutine(Isthmus.collections)
    collection = _as_coroutine(Isthmus.collection)
    put_collection = _as_coroutine(Isthmus.put_collection)
    drop_collection = _as_coroutine(Isthmus.drop_collection)
    map = _as_coroutine(Isthmus.map)
    facets = _as_coroutine(Isthmus.facets)
    preview = _as_coroutine(Isthmus.preview)
    original = _as_coroutine(Isthmus.original)
    create_job = _as_coroutine(Isthmus.create_job)
    job = _as_coroutine(Isthmus.job)
    jobs = _as_coroutine(Isthmus.jobs)
    job_errors = _as_coroutine(Isthmus.job_errors)
    cancel_job = _as_coroutine(Isthmus.cancel_job)
    put_label_set = _as_coroutine(Isthmus.put_label_set)
    label_sets = _as_coroutine(Isthmus.label_sets)
    label_set = _as_coroutine(Isthmus.label_set)
    delete_label_set = _as_coroutine(Isthmus.delete_label_set)
    models = _as_coroutine(Isthmus.models)
    keeps_previews = _as_coroutine(Isthmus.keeps_previews)
    ready = _as_coroutine(Isthmus.ready)

    def embed_many(self, inputs: Iterable[Input], **options: Unpack[EmbedOptions]) -> AsyncGenerator[Embedding, None]:
        defaults: EmbedOptions = {"on_error": "null", **options}
        return self._many(partial(batches.embedded, options=defaults), batches.of_inputs(inputs, self.batching))

    def upsert_many(self, items: Iterable[NewItem]) -> AsyncGenerator[Written, None]:
        return self._many(batches.written, batches.of_items(items, self.batching))

    async def _many(
        self, plan: Callable[[Sequence[Entry]], Plan[list[T]]], entries: Iterator[list[Entry]]
    ) -> AsyncGenerator[T, None]:
        async with aclosing(
            gather_lazily(lambda batch: self._drive(plan(batch)), entries, self.batching.concurrency)
        ) as batches_done:
            async for batch in batches_done:
                for result in batch:
                    yield result

    async def items(self, **options: Unpack[ListOptions]) -> AsyncIterator[Item]:
        while True:
            page = await self.page(**options)
            for item in page.items:
                yield item
            if page.next_cursor is None:
                return
            options["cursor"] = page.next_cursor

    async def wait_for_job(self, id: str, *, report: Report | None = None, every_s: float = 2.0) -> Job:
        for pause in jobs.pauses(every_s):
            job = await self.job(id)
            if report is not None:
                report(job)
            if job.ended is not None:
                return job
            await self._sleep(pause)
        raise AssertionError("pauses have no end")
