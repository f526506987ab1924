"""Every request passes this middleware, outermost first: Prefix, SecurityHeaders, Context, auth.Gate, Disconnects,
BodyLimit, Heads."""

import asyncio
import logging
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Collection, Mapping
from contextlib import nullcontext
from http import HTTPMethod
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import reason, respond
from service.errors import BodyTooLarge, NotReady, Overloaded, UnsupportedBody
from service.runtime import tracing
from service.runtime.logs import caller, request_id
from service.runtime.metrics import Metrics
from service.runtime.timings import stages
from service.runtime.tracing import Tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger("service.requests")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_BODY_S, _BODY_RATE = 20.0, 10_000
"""A body may be waited for so many seconds, and one more, up to as many again, for every so many bytes that came."""
_MOST_DIGITS = 20
"""Largest number of digits of a plausible Content-Length."""
_SELF_UNPACKED = frozenset({"gzip", "x-gzip"})
"""Encodings that a streamed route recognises by the first bytes of the body, whatever the headers say."""
SLOW_REQUEST_S = 10.0
"""A request that takes longer gets a warning in the log, with the time of each stage."""
_SMALL_SHARE, _MORE_SHARE = 4_096, 8
"""Of the room for bodies: one that takes no more than this part of it is small (100 kB), and small bodies may take so
large a part more than others: whoever fills the room with large bodies, others go on searching."""
_TOO_MUCH = "too many large bodies are being read"
CLIENT_GONE = 499
_METHODS = frozenset(HTTPMethod)

_ANSWER_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
# The playground: its own scripts and styles as files, nothing inline; media that it makes or is given.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "connect-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class OfRequests(ABC):
    """Handles HTTP requests alone: it passes on the start and the end of the app."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        return (self.handle if scope["type"] == "http" else self.app)(scope, receive, send)

    @abstractmethod
    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""


class Context(OfRequests):
    """Adds X-Request-ID, Server-Timing, metrics, spans and the log line, and answers exceptions that no handler
    expects."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing | None = None) -> None:
        super().__init__(app)
        self.metrics, self.tracing = metrics, tracing

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        with (
            self.metrics.in_flight.track_inprogress(),
            self.tracing.request(_method(scope), headers) if self.tracing else nullcontext() as span,
        ):
            await self._handle(scope, receive, send, headers, span)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, headers: Headers, span: "Span | None") -> None:
        client_id = headers.get("x-request-id", "")
        identity = client_id if _REQUEST_ID.fullmatch(client_id) else secrets.token_hex(16)
        request_id.set(identity)
        durations: dict[str, float] = {}
        stages.set(durations)
        reason.set(None)
        caller.set(None)
        start_s, status = time.perf_counter(), CLIENT_GONE

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                total = time.perf_counter() - start_s
                timing = [
                    f"{name};dur={1000 * seconds:.2f}" for name, seconds in (durations | {"total": total}).items()
                ]
                added = {"x-request-id": identity, "server-timing": ", ".join(timing)}
                if span is not None:
                    added["traceparent"] = tracing.traceparent(span)
                if _draining(scope):
                    added["connection"] = "close"  # the next request is for another replica
                sent = message.get("headers", ())
                message["headers"] = [*sent, *((name.encode(), value.encode()) for name, value in added.items())]
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except ClientDisconnect:
            pass  # in the middle of its body: there is nobody to answer
        except asyncio.CancelledError:  # uvicorn ends, and would answer 500 in plain text
            if status != CLIENT_GONE:
                raise
            await respond(scope["path"], NotReady("the server is shutting down"))(scope, receive, sending)
        except Exception as error:
            log.exception("unexpected failure")
            if status != CLIENT_GONE:
                raise  # half of an answer is out: only closing the connection says that it is not whole
            await respond(scope["path"], error)(scope, receive, sending)
        finally:
            self._observe(scope, status, time.perf_counter() - start_s, durations, span)

    def _observe(
        self, scope: Scope, status: int, seconds: float, durations: Mapping[str, float], span: "Span | None"
    ) -> None:
        route, method, code = getattr(scope.get("route"), "path", "unmatched"), _method(scope), reason.get()
        self.metrics.requests.labels(method, route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        for stage, duration in durations.items():
            self.metrics.stage_seconds.labels(stage).observe(duration)
        if status == CLIENT_GONE:
            self.metrics.disconnects.inc()
        elif status >= 400:
            self.metrics.rejections.labels(code or str(status)).inc()
        fields: dict[str, Any] = {"method": method, "route": route, "status": status, "ms": round(1000 * seconds, 2)}
        if code is not None:
            fields["code"] = code
        log.info("request", extra={"fields": fields})
        took = {f"{stage}_ms": round(1000 * duration, 2) for stage, duration in durations.items()}
        if seconds >= SLOW_REQUEST_S:
            self.metrics.slow_requests.labels(route).inc()
            log.warning("slow request", extra={"fields": fields | {"stages": took}})
        if span is not None:
            attributes: dict[str, Any] = {f"isthmus.{stage}": value for stage, value in took.items()}
            if code is not None:
                attributes["error.type"] = code
            tracing.finish(span, route, method, status, attributes)


def _method(scope: Scope) -> str:
    """Return the method if HTTP defines it, otherwise _OTHER: a client may write anything there."""
    return scope["method"] if scope["method"] in _METHODS else "_OTHER"


def _draining(scope: Scope) -> bool:
    services = scope.get("state", {}).get("services")
    return services is not None and services.draining.is_set()


class Prefix(OfRequests):
    """Removes the path under which a proxy serves the service, where the proxy does not, and makes redirects lead to
    where the client comes from: the server knows neither the proxy's scheme nor its name, and its path only by
    `root_path`."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        super().__init__(app)
        self.root_path = root_path

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.root_path and scope["path"].startswith(f"{self.root_path}/"):
            raw = scope["raw_path"].removeprefix(self.root_path.encode())
            scope = {**scope, "path": scope["path"].removeprefix(self.root_path), "raw_path": raw}

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 307:
                headers = MutableHeaders(scope=message)
                headers["location"] = self._redirect_target(scope["path"], urlsplit(headers["location"]))
            await send(message)

        await self.app(scope, receive, sending)

    def _redirect_target(self, path: str, to: SplitResult) -> str:
        """Return a redirect's target, the path with or without its last slash; relative where the prefix is unknown."""
        if self.root_path:
            target = self.root_path + to.path
        else:
            last = to.path.rstrip("/").rpartition("/")[2]
            target = f"./{last}/" if to.path.endswith("/") else "../" * (len(path) - len(path.rstrip("/"))) + last
        return f"{target}?{to.query}" if to.query else target


HEAD = "isthmus.head"
"""Key in the scope of a GET that is answered without its body: a route may then leave out making it."""


class Heads(OfRequests):
    """Answers HEAD as GET; the protocol leaves the body out."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        get_scope = {**scope, "method": "GET", HEAD: True}
        try:
            await self.app(get_scope, receive, send)
        finally:
            scope["route"] = get_scope.get("route")  # for the log


class SecurityHeaders(OfRequests):
    """Adds headers that keep a browser from misreading an answer; an answer that is not JSON may be a page, and gets
    all."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                json = headers.get("content-type", "").partition(";")[0].endswith("json")
                headers.update(_ANSWER_HEADERS if json else _ANSWER_HEADERS | _PAGE_HEADERS)
            await send(message)

        await self.app(scope, receive, sending)


_WITH_BODY = {b"content-length", b"transfer-encoding"}


class Disconnects(OfRequests):
    """Cancels a request whose client went away before its answer began, so that no work is spent on it.

    It can be seen once the request is whole: where there is a body its route reads it, and else it is taken here.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = False
        taken: list[Message] = []
        watcher: asyncio.Task[Message] | None = None
        cancel = anyio.CancelScope()

        async def watch() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not answering:
                cancel.cancel()
            return message

        async def receiving() -> Message:
            nonlocal watcher
            if taken:
                return taken.pop()
            if watcher is not None:
                return await asyncio.shield(watcher)
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                watcher = asyncio.create_task(watch())
            return message

        async def sending(message: Message) -> None:
            nonlocal answering
            answering = True
            await send(message)

        try:
            with cancel:
                if scope["method"] in ("GET", "HEAD") and _WITH_BODY.isdisjoint(name for name, _ in scope["headers"]):
                    taken.append(await receiving())
                await self.app(scope, receiving, sending)
        finally:
            if watcher is not None:
                watcher.cancel()


class BodyLimit(OfRequests):
    """Answers 413 past `limit` bytes: at once where Content-Length says so, else as soon as that many have come.
    Answers 408 for a body that does not come, and 415 for one with a Content-Encoding that nothing decodes. Answers 429
    where the bodies of all requests under way would exceed `together`; where those of one key would leave less room
    than they take, so that other keys' bodies have some; or where `refuse_if_full` raises Overloaded for a route in
    `embedding`.

    A route that is named in `streamed` has a limit of its own for what is no JSON: it keeps nothing of that in memory.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        together: int,
        streamed: Mapping[str, int] | None = None,
        embedding: Collection[str] = (),
    ) -> None:
        super().__init__(app)
        self.limit, self.together, self.streamed, self.embedding = limit, together, streamed or {}, embedding
        self._held: Counter[str | None] = Counter()
        """Bytes of bodies, by key."""

    def _has_room(self, key: str | None, size: int) -> bool:
        """Return whether a key's bodies may take so many more bytes; a lone request's always may."""
        if not size or not self._held:
            return True
        more = self.together // _MORE_SHARE if size <= self.together // _SMALL_SHARE else 0
        room = self.together + more - self._held.total() - size
        return room >= 0 and (key is None or not self._held[key] or self._held[key] + size <= room)

    def _hold(self, key: str | None, size: int) -> None:
        self._held[key] += size
        if not self._held[key]:
            del self._held[key]

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        streamed = kind != "application/json" and scope["path"] in self.streamed
        limit = self.streamed[scope["path"]] if streamed else self.limit
        response = self._refusal(scope, headers, limit, streamed=streamed)
        if response is not None:
            await refuse(response, scope, receive, send)
            return
        reserved, key = 0 if streamed else stated_length(headers) or 0, caller.get()
        received, is_whole = 0, False
        patience_s = _BODY_S

        async def receiving() -> Message:
            nonlocal received, is_whole, reserved, patience_s
            if is_whole:
                return await receive()
            began = time.monotonic()
            try:
                async with asyncio.timeout(patience_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, headers={"Connection": "close"}) from None
            size = len(message.get("body", b""))
            received += size
            patience_s = max(0.0, min(_BODY_S, patience_s - (time.monotonic() - began) + size / _BODY_RATE))
            is_whole = not message.get("more_body", False)
            if received > limit:
                # FastAPI lets an HTTPException through while it reads a body, and hides any other.
                raise HTTPException(413, headers={"Connection": "close"})
            if received > reserved and not streamed:  # it did not say how long it is
                self._hold(key, -reserved)
                room = self._has_room(key, received)
                self._hold(key, received)
                reserved = received
                if not room:
                    raise HTTPException(429, headers={"Connection": "close", "Retry-After": "1"})
            return message

        self._hold(key, reserved)
        try:
            await self.app(scope, receiving, send)
        finally:
            self._hold(key, -reserved)

    def _refusal(self, scope: Scope, headers: Headers, limit: int, *, streamed: bool) -> Response | None:
        """Return the answer to a request that is refused before its body is read; None where it is not refused."""
        length = stated_length(headers)
        unpacked_here = _SELF_UNPACKED if streamed else set()
        coded = headers.get("content-encoding", "").strip().lower() not in {"", "identity"} | unpacked_here
        if coded and (length or "transfer-encoding" in headers):
            response = respond(
                scope["path"], UnsupportedBody("a body with a Content-Encoding is not read: send it as it is")
            )
            response.headers["Accept-Encoding"] = "identity"
            return response
        if length is not None and length > limit:
            return respond(scope["path"], BodyTooLarge(f"the body is larger than {limit} bytes"))
        if not self._has_room(caller.get(), 0 if streamed else length or 0):
            return respond(scope["path"], Overloaded(_TOO_MUCH))
        if scope["path"] in self.embedding and scope["method"] == "POST":
            try:
                scope["state"]["services"].refuse_if_full()
            except Overloaded as full:
                return respond(scope["path"], full)
        return None


def stated_length(headers: Headers) -> int | None:
    """Return Content-Length in bytes; None where it is absent. Python refuses numbers of thousands of digits."""
    digits = headers.get("content-length", "")
    return int(digits.lstrip("0")[:_MOST_DIGITS] or "0") if digits.isdecimal() else None


async def refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request whose body will not be read, and close its connection (`protocol.py` does)."""
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
