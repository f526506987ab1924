"""Uvicorn and httptools speak HTTP/1.1 here, within limits that they lack: the size of a request's head and of what
stands between the bytes of its body, the time that either takes to come, and the time that an answer waits to be read.
A malformed request gets a problem too, and a refused client can read why."""

import asyncio
import fcntl
import logging
import socket
import struct
import sys
import termios
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.api.problems import problem

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 65_536
"""Largest request line and headers together, in bytes."""
MAX_HEADERS = 256
"""Largest number of headers: each is looked at by several stages, and ten thousand of four bytes would take as long as
a hundred requests."""
MAX_UNSENT_BYTES = 128_000_000
"""Largest answers, together, that clients have not read yet, in bytes. Past it the address with the most unread bytes
loses the connection that has been behind for the longest."""
MAX_CONNECTIONS = 4_096
"""Largest number of connections; of a process that may open few files, a third as many as it may open: a file that is
sent takes another. Past it the address with the most connections loses one that waits for its client."""
_MOST_WAITING = 64
"""Largest number of requests of one connection that wait for the answer to the one before. The last of them gets
`Connection: close`, and anything after it is not read."""
_MOST_CHUNKS, _LEAST_CHUNK_BYTES = 65_536, 16
"""A body may come in so many pieces; of one in more the mean piece has at least so many bytes: the parser calls Python
for each, and chunks of a byte would take seconds of the event loop for each megabyte."""
_HEAD_S = 20.0
_REST_S = 20.0
"""Seconds to receive the rest of a request that was answered before all of it had come."""
_LAST_HEAD_S = 2.0
"""The same, once the server ends: of who has connected and asked nothing yet, or has begun to ask."""
_LINGER_S = 5.0
"""Seconds to read on from a client that is still writing after its last answer."""
_MOST_THROWN_AWAY = 2**26
"""Bytes that are read on from it at most: one that sends at the network's full rate would take most of the loop."""
_READ_BYTES = 2**18
"""Largest number of bytes received at once; some of them may be the body of the request before."""
_UNREAD_S, _UNREAD_RATE = 20.0, 10_000
"""A client may be so many seconds behind in reading its answer, at so many bytes a second: as `BodyLimit` has it for
writing."""
_LOOK_S = 0.25
"""Seconds between two checks of a client that reads too slowly."""

_REFUSALS = {
    400: ("malformed_request", "the request is not valid HTTP"),
    408: ("request_timeout", "the request did not come in time"),
    431: (
        "headers_too_large",
        f"the request line and the headers, or what stands between the chunks of the body, are larger than "
        f"{MAX_HEAD_BYTES} bytes, or more than {MAX_HEADERS} headers",
    ),
}


class Unsent:
    """Bounds the unread answers of all connections of a server: to `most` bytes, or to the answers of one connection.

    Past that a connection of the address with the most unread bytes is closed, the one that has been behind for the
    longest: one client that does not read cannot have others' answers cut off.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes: dict[Protocol, int] = {}
        """Unsent bytes by connection, in the order in which they fell behind."""
        self._together = 0
        self._bytes_by_address: Counter[str] = Counter()

    def note(self, connection: "Protocol", unsent: int) -> None:
        """Note the number of bytes written to a connection but not sent; 0: the connection is not behind."""
        more = unsent - self._bytes.get(connection, 0)
        self._together += more
        self._bytes_by_address[connection.address] += more
        if not self._bytes_by_address[connection.address]:
            del self._bytes_by_address[connection.address]
        if unsent:
            self._bytes[connection] = unsent
        else:
            self._bytes.pop(connection, None)

    def bound(self, now: float) -> None:
        """Close connections for which there is no room, by the loop's clock; never one that had no time to read."""
        while self._together > self._most and len(self._bytes) > 1:
            [(address, _)] = self._bytes_by_address.most_common(1)
            first = next(connection for connection in self._bytes if connection.address == address)
            unsent = first.unsent
            if unsent < self._bytes[first]:
                self.note(first, unsent)
            elif now - first.behind_since < _LOOK_S:
                break
            else:
                self.cut(first)

    def cut(self, connection: "Protocol") -> None:
        """Close a connection, and forget what was written to it."""
        log.info("a client does not read its answer: its connection is closed")
        self.note(connection, 0)
        connection.abort()


class Connections:
    """Bounds the connections of a server: each takes a file descriptor, without which a server accepts nobody and
    opens no file, and may hold a head.

    Past `most` the address with the most connections loses the oldest of those that wait for their client, to send a
    request or the rest of one; where none does, the new one is closed.
    """

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._by_address: dict[str, dict[Protocol, None]] = {}

    def join(self, connection: "Protocol") -> None:
        self._by_address.setdefault(connection.address, {})[connection] = None
        self._count += 1
        if self._count > self._most:
            crowd = max(self._by_address.values(), key=len)
            waiting = next((one for one in crowd if one.waits and one is not connection), connection)
            self.leave(waiting)
            log.debug("there are too many connections: one that waits is closed")
            waiting.let_go()

    def leave(self, connection: "Protocol") -> None:
        of_address = self._by_address.get(connection.address, {})
        if connection in of_address:
            del of_address[connection]
            self._count -= 1
            if not of_address:
                del self._by_address[connection.address]


class _Lingering:
    """Wraps a transport, which `closed` closes, since uvicorn closes one as soon as it has answered, and tells `wrote`
    of what is written."""

    def __init__(self, transport: asyncio.Transport, closed: Callable[[], None], wrote: Callable[[int], None]) -> None:
        self._transport = transport
        self._wrote = wrote
        self.close = closed
        self.lingers = False

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)
            self._wrote(len(data))

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Protocol(HttpToolsProtocol):
    """Speaks HTTP on one connection.

    A socket that is closed while something is unread in it, or arrives after, resets its connection, and the client's
    system forgets the answer that was not read yet. So where a request is not whole its connection is closed in one
    direction, and in the other what still comes is thrown away, until the client closes it too or `_LINGER_S` is over.
    """

    def __init__(self, *arguments: Any, unsent: Unsent, others: Connections, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._others = others
        self.url = b""
        self.address = ""
        self._all_unsent = unsent
        self._written = 0
        self._taken: int | None = None
        """Bytes that the client's system had at the last look."""
        self.behind_since, self._patience_ends = 0.0, 0.0
        self._look: asyncio.TimerHandle | None = None
        self._in_head, self._arrived, self._head_bytes = True, 0, 0
        self._whole = True
        self._pieces: list[bytes] = []
        """Pieces of the body that came with the bytes at hand."""
        self._piece_count = self._body_bytes = 0
        self._framing: bytes | None = None
        """For a request that asks for another protocol: the headers that state the length of its body."""
        self._overdue: asyncio.TimerHandle | None = None
        self._refusal = 400
        self._ending = self._full = False
        self._thrown_away = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self._socket = transport
        self._closing = _Lingering(transport, self._close, self._wrote)
        self.transport = self._closing  # type: ignore[assignment]
        self._expect_head()
        self._others.join(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._others.leave(self)
        self._in_time()
        self._all_unsent.note(self, 0)
        if self._look is not None:
            self._look.cancel()
            self._look = None
        super().connection_lost(exc)

    @property
    def waits(self) -> bool:
        """Return whether it is the client's turn: to ask, or to send the rest of a request."""
        return not self._whole or self.cycle is None or bool(self.cycle.response_complete)

    def let_go(self) -> None:
        """Close the connection, with what is not sent."""
        if self.unsent:
            self.abort()
        else:
            self._socket.close()

    # Receiving

    def data_received(self, data: bytes) -> None:
        if self._closing.lingers or self._full:
            self._thrown_away += len(data)
            if self._closing.lingers and self._thrown_away > _MOST_THROWN_AWAY:
                self._socket.close()
            return
        if self._whole:  # what comes now belongs to another request, be it only empty lines
            self._in_head, self._arrived, self._head_bytes = True, 0, 0
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
            self._pass_on()
        except httptools.HttpParserError:
            self._refuse(self._refusal)
        if self.transport.is_closing() or (self._whole and not self._in_head):
            return
        self._arrived += len(data)
        if self._arrived > MAX_HEAD_BYTES + _READ_BYTES:
            self._refuse(431)
        elif self._in_head and self._overdue is None:
            self._expect_head()

    def _parse(self, data: bytes) -> None:
        """Raises HttpParserError.

        A request may ask for another protocol (`Upgrade: h2c`, as Java's client does), and the server may ignore that.
        But the parser stops after such a head, as if the rest were of that protocol: another parser reads the rest,
        which is told how long the body is, and not what was asked for.
        """
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as stopped:
                if self._framing is None:  # CONNECT
                    raise httptools.HttpParserError from None
                data = data[stopped.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % self._framing)

    def eof_received(self) -> None:
        """Answer a client that sends no more before its request is whole: it may still read why it is refused."""
        if self._closing.lingers:
            self._socket.close()
            return
        is_incomplete = self._arrived if self._in_head else self.cycle.more_body and not self.cycle.response_started
        if is_incomplete and not self.transport.is_closing():
            self._refuse(400)

    def on_message_begin(self) -> None:
        if self._framing is not None:
            return
        if len(self.pipeline) >= _MOST_WAITING:
            self._full = True
            self.cycle.keep_alive = False
            raise ValueError
        super().on_message_begin()
        self._whole = False
        self._in_head, self._head_bytes = True, 0

    def on_url(self, url: bytes) -> None:
        if self._framing is None:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # a trailer, which nobody reads
            return
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value) + 4
        self._bound_head()

    def on_headers_complete(self) -> None:
        if self._framing is not None:
            return
        self._in_head, self._arrived = False, 0
        self._piece_count = self._body_bytes = 0
        self._in_time()
        self._bound_head()
        super().on_headers_complete()
        if self._ending:
            self.cycle.keep_alive = False
        if self.parser.should_upgrade() and self.scope["method"] != "CONNECT":
            framing = [header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]
            self._framing = b"".join(b"%s: %s\r\n" % header for header in framing)

    def on_body(self, body: bytes) -> None:
        self._arrived = 0
        self._piece_count += 1
        self._body_bytes += len(body)
        if self._piece_count > _MOST_CHUNKS and self._body_bytes < _LEAST_CHUNK_BYTES * self._piece_count:
            self._refusal = 431
            raise ValueError
        self._pieces.append(body)

    def _pass_on(self) -> None:
        """Give what has come of a body to its request at once: Uvicorn copies what it has with each piece."""
        if self._pieces:
            body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
            self._pieces.clear()
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._framing is not None and self.parser.should_upgrade():
            return  # its body is yet to be read
        self._framing = None
        self._whole = True
        self._in_time()
        self._pass_on()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and not (self._whole or self._in_head or self.transport.is_closing()):
            self._in_time()
            self._overdue = self.loop.call_later(_REST_S, self.transport.close)

    def _bound_head(self) -> None:
        """Raises ValueError: the parser stops there."""
        if self._head_bytes + len(self.url) > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = 431
            raise ValueError

    # Sending

    @property
    def unsent(self) -> int:
        """Return the bytes that were written to it and not sent."""
        size: int = self._socket.get_write_buffer_size()
        return size

    def _wrote(self, count: int) -> None:
        self._written += count
        unsent = self.unsent
        if not unsent:
            return
        if unsent <= count:  # before this it was not behind
            self._all_unsent.note(self, 0)
            self.behind_since, self._taken = self.loop.time(), None
            self._patience_ends = self.behind_since + _UNREAD_S
        self._all_unsent.note(self, unsent)
        if self._look is None:
            self._look = self.loop.call_later(_LOOK_S, self._look_at_unsent)

    def _look_at_unsent(self) -> None:
        """Return whether the client reads as quickly as it has to."""
        self._look = None
        unsent, now = self.unsent, self.loop.time()
        sent = self._written - unsent - self._in_system()
        earned = 0 if self._taken is None else (sent - self._taken) / _UNREAD_RATE
        self._patience_ends, self._taken = min(self._patience_ends + earned, now + _UNREAD_S), sent
        self._all_unsent.note(self, unsent)
        if not unsent:
            return
        if now > self._patience_ends:
            self._all_unsent.cut(self)
        else:
            self._look = self.loop.call_later(_LOOK_S, self._look_at_unsent)
            self._all_unsent.bound(now)

    def _in_system(self) -> int:
        """Return the bytes that our system has and the client's does not: megabytes, of which it takes no more until a
        third are gone."""
        count = bytearray(4)
        with suppress(OSError):  # another system than Linux
            fcntl.ioctl(self._socket.get_extra_info("socket").fileno(), termios.TIOCOUTQ, count)
        return int.from_bytes(count, sys.byteorder)

    def abort(self) -> None:
        """Close the connection, and forget what is not sent; the system too, which else would go on trying."""
        with suppress(OSError):
            at_once = struct.pack("ii", 1, 0)
            self._socket.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self._socket.abort()

    # The end

    def shutdown(self) -> None:
        """End with the server: answer whoever is about to ask, and let go who was answered and is silent."""
        self._ending = True
        if self.cycle is not None and not (self.cycle.response_complete and self._in_head and self._arrived):
            super().shutdown()
        elif not self.transport.is_closing():
            self._in_time()
            self._overdue = self.loop.call_later(_LAST_HEAD_S, self._let_go)

    def _expect_head(self) -> None:
        self._overdue = self.loop.call_later(_HEAD_S, self._refuse, 408)

    def _in_time(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _let_go(self) -> None:
        if self._arrived:
            self._refuse(408)
        else:
            self.transport.close()

    def _close(self) -> None:
        if (self._whole and not self._full) or self.transport.is_closing():
            self._socket.close()
        else:
            self._linger()

    def _linger(self) -> None:
        self._in_time()
        self._closing.lingers = True
        if self.cycle is not None:
            self.cycle.disconnected = not self.cycle.response_complete
            self.cycle.message_event.set()
        self.flow.resume_reading()
        if self._socket.can_write_eof():
            self._socket.write_eof()
        self._overdue = self.loop.call_later(_LINGER_S, self._socket.close)

    def _refuse(self, status: int) -> None:
        if self.transport.is_closing() or self._full:
            return
        if self.pipeline or self._answered:
            self.transport.close()  # this answer would be taken for another's
            return
        code, detail = _REFUSALS[status]
        answer = problem(unquote(self.url.decode("latin-1")), status, code, detail, headers={"Connection": "close"})
        head = b"".join(b"%s: %s\r\n" % header for header in answer.raw_headers)
        self.transport.write(b"".join((STATUS_LINE[status], head, b"\r\n", bytes(answer.body))))
        self._linger()

    @property
    def _answered(self) -> bool:
        """Return whether an answer to the request at hand is out, or half of one that is before it."""
        if self.cycle is None or (self._in_head and self.cycle.response_complete):
            return False
        return bool(self.cycle.response_started)
