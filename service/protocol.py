"""HTTP/1.1 as uvicorn reads it with httptools, with what it does not bound: how large a request's head is, and how long
it takes to come. What cannot be read is answered with a problem too, and whoever is refused can read why.
"""

import asyncio
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import problem

MAX_HEAD_BYTES = 65_536
"""Of the request line and the headers together."""
_HEAD_S = 20.0
_LAST_HEAD_S = 2.0
"""The same, once the server ends: of who has connected and asked nothing yet, or has begun to ask."""
_LINGER_S = 5.0
"""For which a client that is still writing is listened to after it was answered for the last time."""
_READ_BYTES = 2**18
"""That come at once, at most; a part of them may be the body of the request before."""

_REFUSALS = {
    400: ("malformed_request", "the request is not valid HTTP"),
    408: ("request_timeout", "the request did not come in time"),
    431: ("headers_too_large", f"the request line and the headers are larger than {MAX_HEAD_BYTES} bytes"),
}


class _Lingering:
    """A transport that `closed` closes: uvicorn closes one as soon as it has answered."""

    def __init__(self, transport: asyncio.Transport, closed: Callable[[], None]) -> None:
        self._transport = transport
        self.close = closed
        self.lingers = False

    def write(self, data: bytes) -> None:
        if not self.lingers:
            self._transport.write(data)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """One connection.

    A socket that is closed while something is unread in it, or arrives after, resets its connection, and the client's
    system forgets the answer that was not read yet. So where a request is not whole its connection is closed in one
    direction, and in the other what still comes is thrown away, until the client closes it too or `_LINGER_S` is over.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.url = b""
        self._in_head, self._arrived, self._head_bytes = True, 0, 0
        self._whole = True
        self._overdue: asyncio.TimerHandle | None = None
        self._refusal = 400
        self._ending = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._socket = transport
        self.transport = self._closing = _Lingering(transport, self._close)  # type: ignore[assignment]
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._closing.lingers:
            return
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._arrived += len(data)
        if self._arrived > MAX_HEAD_BYTES + _READ_BYTES:
            self._refuse(431)
        elif self._overdue is None:
            self._expect_head()

    def eof_received(self) -> None:
        """A client that sends no more before its request is whole: it may still read why it is refused."""
        if self._closing.lingers:
            self._socket.close()
            return
        begun = self._arrived if self._in_head else self.cycle.more_body and not self.cycle.response_started
        if begun and not self.transport.is_closing():
            self._refuse(400)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._whole = False
        self._in_head, self._arrived, self._head_bytes = True, 0, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_is_there()
        if self._head_bytes + len(self.url) > MAX_HEAD_BYTES:
            self._refusal = 431
            raise ValueError  # the parser stops, and `send_400_response` is called
        super().on_headers_complete()
        if self._ending:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._whole = True
        super().on_message_complete()

    def shutdown(self) -> None:
        """The server ends. Whoever is about to ask is still answered; one that was answered and is silent is let go."""
        self._ending = True
        if self.cycle is not None and not (self.cycle.response_complete and self._in_head and self._arrived):
            super().shutdown()
        elif not self.transport.is_closing():
            self._head_is_there()
            self._overdue = self.loop.call_later(_LAST_HEAD_S, self._let_go)

    def send_400_response(self, msg: str) -> None:
        self._refuse(self._refusal)

    def _unsupported_upgrade_warning(self) -> None:
        """It goes on as HTTP/1.1, as it may; nobody need be told."""

    def _expect_head(self) -> None:
        self._overdue = self.loop.call_later(_HEAD_S, self._refuse, 408)

    def _head_is_there(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _let_go(self) -> None:
        if self._arrived:
            self._refuse(408)
        else:
            self.transport.close()

    def _close(self) -> None:
        if self._whole or self.transport.is_closing():
            self._socket.close()
        else:
            self._linger()

    def _linger(self) -> None:
        self._head_is_there()
        self._closing.lingers = True
        if self.cycle is not None:
            self.cycle.disconnected = not self.cycle.response_complete
            self.cycle.message_event.set()
        self.flow.resume_reading()
        if self._socket.can_write_eof():
            self._socket.write_eof()
        self._overdue = self.loop.call_later(_LINGER_S, self._socket.close)

    def _refuse(self, status: int) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.response_started:
            self.transport.close()  # half of another answer is out
            return
        code, detail = _REFUSALS[status]
        answer = problem(unquote(self.url.decode("latin-1")), status, code, detail, headers={"Connection": "close"})
        head = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
        self.transport.write(b"".join((STATUS_LINE[status], head, b"\r\n", bytes(answer.body))))
        self._linger()
