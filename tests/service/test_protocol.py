"""Some bytes are refused before they are a request: heads that are too large, too slow, or no HTTP."""

import asyncio
import itertools
import json
import select
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from service.api import middleware, protocol
from service.api.keys import create_key
from service.settings import Settings
from tests.conftest import DEADLINE_S, serving

JSON = "Content-Type: application/json\r\n"


@contextmanager
def connected(client: httpx.Client) -> Iterator[socket.socket]:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=DEADLINE_S) as connection:
        yield connection


def answer(connection: socket.socket) -> tuple[int, dict[str, object]]:
    """The status and the body of what comes until the server closes."""
    received = b""
    while data := connection.recv(65_536):
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head[9:12]), json.loads(body)


@pytest.mark.parametrize(
    ("wire", "status", "code"),
    [
        (b"EHLO\r\n\r\n", 400, "malformed_request"),
        (b"GET /healthz HTTP/1.1\r\nX: a\0b\r\n\r\n", 400, "malformed_request"),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 70_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 431, "headers_too_large"),
        (b"GET /healthz HTTP/1.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n", 431, "headers_too_large"),
        (b"GET /healthz HTTP/1.1\r\n" + b"a:\r\n" * 257 + b"\r\n", 431, "headers_too_large"),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 400_000, 431, "headers_too_large"),
        (b"GET /" + b"a" * 400_000, 431, "headers_too_large"),
    ],
)
def test_what_is_no_request_is_answered_by_a_problem(
    shared_client: httpx.Client, wire: bytes, status: int, code: str
) -> None:
    with connected(shared_client) as connection:
        connection.sendall(wire)
        given, body = answer(connection)
    assert (given, body["code"], body["status"]) == (status, code, status)
    assert shared_client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"a" * 400_000, 431),
        (b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n", 413),
    ],
)
def test_who_goes_on_writing_can_read_the_refusal(shared_client: httpx.Client, head: bytes, status: int) -> None:
    with connected(shared_client) as connection:
        connection.sendall(head)
        assert connection.recv(1, socket.MSG_PEEK) == b"H"  # it is refused: what is sent from here on comes too late
        for _ in range(64):
            connection.sendall(b"a" * 65_536)
        assert answer(connection)[0] == status


def test_a_body_may_come_in_small_pieces_but_not_in_too_many(shared_client: httpx.Client) -> None:
    """The parser calls Python for each piece: chunks of a byte would take the event loop from all others."""
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}Transfer-Encoding: chunked\r\n".encode()
    body = b'{"inputs":["red"]}'
    small = b"1\r\n \r\n" * 60_000 + b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with connected(shared_client) as connection:
        connection.sendall(head + b"Connection: close\r\n\r\n" + small + b"0\r\n\r\n")
        status, told = answer(connection)
        assert (status, len(told["embeddings"])) == (200, 1)  # type: ignore[arg-type]
    with connected(shared_client) as connection:
        connection.sendall(head + b"\r\n" + b"1\r\n \r\n" * 70_000)
        status, told = answer(connection)
        assert (status, told["code"]) == (431, "headers_too_large")
    longer = b"20\r\n" + b" " * 32 + b"\r\n"
    with connected(shared_client) as connection:
        whole = longer * 70_000 + b"12\r\n" + body + b"\r\n0\r\n\r\n"
        connection.sendall(head + b"Connection: close\r\n\r\n" + whole)
        assert answer(connection)[0] == 200


def test_who_floods_after_its_refusal_is_let_go_at_once(
    shared_client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_MOST_THROWN_AWAY", 10**6)
    monkeypatch.setattr(protocol, "_LINGER_S", 10 * DEADLINE_S)
    with connected(shared_client) as connection:
        connection.sendall(b"EHLO\r\n\r\n")
        assert answer(connection)[0] == 400
        with pytest.raises(ConnectionError):
            connection.sendall(bytes(65_536_000))


def test_who_writes_for_ever_is_let_go(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_LINGER_S", 0.05)
    with serving(settings) as client, connected(client) as connection:
        connection.sendall(b"EHLO\r\n\r\n")
        endless = itertools.repeat(b"a" * 65_536)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            deque(map(connection.sendall, endless), maxlen=0)


def test_a_large_head_within_the_limit_is_read(shared_client: httpx.Client) -> None:
    assert shared_client.get("/healthz", headers={"X": "a" * 60_000}).status_code == 200


@pytest.mark.parametrize("wire", [b"GET /heal", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"])
def test_a_head_that_ends_early_is_refused(shared_client: httpx.Client, wire: bytes) -> None:
    with connected(shared_client) as connection:
        connection.sendall(wire)
        connection.shutdown(socket.SHUT_WR)
        assert answer(connection)[0] == 400


@pytest.mark.parametrize("path", ["/embed", "/v1/embeddings"])
def test_a_body_that_ends_early_is_refused(shared_client: httpx.Client, path: str) -> None:
    with connected(shared_client) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: 99\r\n\r\n{{".encode())
        connection.shutdown(socket.SHUT_WR)
        status, body = answer(connection)
    told = body["error"] if path.startswith("/v1") else body
    assert status == 400 and told["code"] == "malformed_request"  # type: ignore[index]


def test_a_connection_that_says_nothing_is_not_told_anything(shared_client: httpx.Client) -> None:
    with connected(shared_client) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_who_takes_too_long_is_refused(shared_client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_BODY_S", 0.05)
    with connected(shared_client) as connection:
        connection.sendall(f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: 99\r\n\r\n{{".encode())
        status, body = answer(connection)
        assert (status, body["code"]) == (408, "request_timeout")
    monkeypatch.setattr(protocol, "_HEAD_S", 0.05)
    for wire in (b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"):
        with connected(shared_client) as connection:
            connection.sendall(wire)
            assert answer(connection)[0] == 408
    monkeypatch.undo()
    # A request in time is answered, and a second one on its connection.
    for _ in range(2):
        assert shared_client.post("/embed", json={"inputs": ["red"]}).status_code == 200


def test_a_second_head_on_a_connection_has_its_own_limit_and_time(shared_client: httpx.Client) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 60_000 + b"\r\n"
    with connected(shared_client) as connection:
        connection.sendall((head + b"\r\n") * 8 + head + b"Connection: close\r\n\r\n")
        received = b""
        while data := connection.recv(65_536):
            received += data
    assert received.count(b"HTTP/1.1 200") == 9


CHUNKED = "Host: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
MANY_BYTES = 8_000_000


@pytest.mark.parametrize(
    "rest",
    [
        b"0\r\n" + b"a:\r\n" * (MANY_BYTES // 4),
        b"0\r\na:" + b"a" * MANY_BYTES,
        b"1;" + b"a" * MANY_BYTES,
        b"0" * MANY_BYTES,
    ],
    ids=["trailers", "a trailer", "an extension", "a length"],
)
def test_what_is_no_body_has_an_end(shared_client: httpx.Client, rest: bytes) -> None:
    with connected(shared_client) as connection:
        connection.sendall(f"POST /embed HTTP/1.1\r\n{JSON}{CHUNKED}".encode())
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(rest)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 431")
    with connected(shared_client) as connection:
        connection.sendall(f"GET /healthz HTTP/1.1\r\n{CHUNKED}".encode())
        received = b""
        while not received.endswith(b'{"status":"ok"}'):  # it is answered before it is whole, and not closed yet
            data = connection.recv(65_536)
            assert data, received
            received += data
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(rest)
            assert connection.recv(65_536) == b"", "a second answer would be taken for that of another request"


def test_trailers_are_read_over(shared_client: httpx.Client) -> None:
    one = f"POST /embed HTTP/1.1\r\n{JSON}{CHUNKED}12\r\n" + '{"inputs":["red"]}\r\n0\r\nX-Checksum: 1\r\n\r\n'
    last = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with connected(shared_client) as connection:
        connection.sendall((one * 2 + last).encode())
        received = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert received.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("rest", ["", "0\r\na: b\r\n", "ff\r\na"])
def test_a_request_that_is_answered_has_to_come_to_its_end(
    shared_client: httpx.Client, monkeypatch: pytest.MonkeyPatch, rest: str
) -> None:
    monkeypatch.setattr(protocol, "_REST_S", 0.05)
    with connected(shared_client) as connection:
        connection.sendall(f"GET /healthz HTTP/1.1\r\n{CHUNKED}{rest}".encode())
        assert answer(connection)[0] == 200  # and the connection is closed
    monkeypatch.undo()
    with connected(shared_client) as connection:
        for _ in range(2):
            connection.sendall(f"GET /healthz HTTP/1.1\r\n{CHUNKED}".encode())
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
            connection.sendall(b"1\r\na\r\n0\r\n\r\n")  # in time


def test_empty_lines_are_no_sign_of_life(shared_client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(shared_client) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(protocol, "_HEAD_S", 0.05)
        connection.sendall(b"\r\n")
        assert answer(connection)[0] == 408


def test_a_body_has_to_keep_on_coming(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_BODY_S", 0.2)
    monkeypatch.setattr(middleware, "_BODY_RATE", 1)
    with serving(settings) as client, connected(client) as connection:
        # What came quickly is no credit for ever.
        head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: 9999\r\n\r\n"
        connection.sendall(head.encode() + b" " * 5_000)
        assert answer(connection)[0] == 408


@pytest.mark.parametrize("length", ["0" * 5_001 + "18", "18"])
def test_a_length_may_have_any_number_of_digits(shared_client: httpx.Client, length: str) -> None:
    with connected(shared_client) as connection:
        head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: {length}\r\nConnection: close\r\n"
        connection.sendall(f'{head}\r\n{{"inputs":["red"]}}'.encode())
        assert answer(connection)[0] == 200
    with connected(shared_client) as connection:
        connection.sendall(f"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: {'1' * 5_001}\r\n\r\n".encode())
        assert answer(connection)[0] == 400


def test_a_connection_has_few_requests_in_line(shared_client: httpx.Client) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(shared_client) as connection:
        connection.sendall(one * 2_000)
        received = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert received.count(b"HTTP/1.1 200") == 1 + protocol._MOST_WAITING
    assert received.rpartition(b"HTTP/1.1 200")[2].count(b"connection: close\r\n") == 1, "the others may be sent again"
    assert shared_client.get("/healthz").status_code == 200


H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"


@pytest.mark.parametrize("asked", [H2C, "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"])
@pytest.mark.parametrize("pieces", [1, 2, 7])
def test_an_upgrade_is_answered_as_any_request(shared_client: httpx.Client, asked: str, pieces: int) -> None:
    body = '{"inputs":["red"]}'
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}{asked}"
    requests = [
        f"{head}Content-Length: {len(body)}\r\n\r\n{body}",
        f"GET /healthz HTTP/1.1\r\nHost: localhost\r\n{asked}\r\n",
        f"{head}Transfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n{body}\r\n0\r\n\r\n",
        "GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ]
    wire = "".join(requests).encode()
    size = -(-len(wire) // pieces)
    with connected(shared_client) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(wire), size):
            connection.sendall(wire[start : start + size])
            shared_client.get("/healthz")  # one loop: by now it has read that piece
        received = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert [each[:3] for each in received.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"200", b"404"]


def test_a_body_of_an_upgrade_has_its_limits(shared_client: httpx.Client) -> None:
    head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}{H2C}"
    with connected(shared_client) as connection:
        connection.sendall(f"{head}Content-Length: 9999999999\r\n\r\n".encode())
        assert answer(connection)[0] == 413
    with connected(shared_client) as connection:
        connection.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
        connection.shutdown(socket.SHUT_WR)
        assert answer(connection)[0] == 400


def behind(client: httpx.Client) -> socket.socket:
    """A connection on which more is answered than its client reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    connection.settimeout(DEADLINE_S)
    connection.connect((client.base_url.host, client.base_url.port))
    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 60)
    assert connection.recv(1) == b"H"
    return connection


def cut(connection: socket.socket, within_s: float = DEADLINE_S) -> bool:
    """Return whether the server cuts it, seen without reading from it."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(1_000 * within_s))


def test_who_does_not_read_is_cut_off(shared_client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_LOOK_S", 0.02)
    with closing(behind(shared_client)) as connection:
        monkeypatch.setattr(protocol, "_UNREAD_S", 0.1)  # from the next look on
        assert cut(connection)


class Clock(asyncio.AbstractEventLoop):
    """The time of an event loop, which passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[asyncio.TimerHandle] = []

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def call_later(self, delay: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        self.due.append(asyncio.TimerHandle(self.now + delay, callback, args, self))
        return self.due[-1]

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self.due.remove(handle)

    def go_on(self, seconds: float) -> None:
        end = self.now + seconds
        while self.due and (first := min(self.due)).when() <= end:
            self.due.remove(first)
            self.now = first.when()
            first._run()
        self.now = end


class Unread(asyncio.Transport):
    """A connection whose client reads as much as the test says."""

    def __init__(self, connected: socket.socket) -> None:
        super().__init__({"socket": connected})
        self.bytes, self.is_cut = 0, False

    def write(self, data: Any) -> None:
        self.bytes += len(data)

    def get_write_buffer_size(self) -> int:
        return self.bytes

    def is_closing(self) -> bool:
        return self.is_cut

    def abort(self) -> None:
        self.is_cut = True


async def nothing(scope: Any, receive: Any, send: Any) -> None: ...


@pytest.mark.parametrize(("bytes_per_s", "seconds"), [(10_000, 100), (5_000, 40), (0, 20)])
def test_who_reads_slowly_is_cut_off_if_it_is_too_slowly(bytes_per_s: int, seconds: int) -> None:
    """A client may be 20 seconds behind at 10,000 bytes a second: of one that is half as quick, twice as long."""
    clock, (ours, theirs) = Clock(), socket.socketpair()
    with ours, theirs:
        config, state = uvicorn.Config(nothing, lifespan="off", log_config=None), ServerState()
        unsent, others = protocol.Unsent(10**9), protocol.Connections(10)
        connection = protocol.Protocol(config, state, {}, clock, unsent=unsent, others=others)
        connection.connection_made(unread := Unread(ours))
        connection._in_time()  # its request has come
        connection.transport.write(b"x" * 2_000_000)
        passed = 0
        while passed < 100 and not unread.is_cut:
            unread.bytes -= bytes_per_s
            clock.go_on(1)
            passed += 1
        assert abs(passed - seconds) <= 1


def test_what_is_unread_of_all_together_has_a_limit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_LOOK_S", 0.02)
    monkeypatch.setattr("service.commands.serve.MAX_UNSENT_BYTES", 1_000)
    with serving(settings) as client, closing(behind(client)) as first:
        assert not cut(first, 0.2), "one may be behind with whatever it is"
        with closing(behind(client)) as second:
            assert cut(first), "it has been behind for longer"
            assert not cut(second, 0.1)
            assert client.get("/openapi.json").status_code == 200


class Unreading:
    """A connection whose client, at an address, has not read so many bytes of its answer for a minute."""

    def __init__(self, address: str, unsent: int) -> None:
        self.address, self.unsent, self.behind_since, self.is_cut = address, unsent, -60.0, False

    def abort(self) -> None:
        self.is_cut = True


def test_who_leaves_most_unread_is_cut_off_before_others() -> None:
    unsent = protocol.Unsent(1_000)
    other = Unreading("192.0.2.1", 300)
    flood = [Unreading("192.0.2.2", 200) for _ in range(4)]
    for connection in (other, *flood):
        unsent.note(connection, connection.unsent)  # type: ignore[arg-type]
        unsent.bound(0.0)
    assert [connection.is_cut for connection in (other, *flood)] == [False, True, False, False, False]
    unsent.note(other, 0)  # type: ignore[arg-type]
    late = Unreading("192.0.2.1", 900)
    unsent.note(late, late.unsent)  # type: ignore[arg-type]
    unsent.bound(0.0)
    assert late.is_cut and not any(connection.is_cut for connection in flood[1:]), "now it has the most"


def test_idle_connections_leave_room_for_who_asks(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may open so many files: one client that only connects would keep the server from all others."""
    monkeypatch.setattr("service.commands.serve.MAX_CONNECTIONS", 8)
    with serving(settings) as client, ExitStack() as opened:
        heads = [opened.enter_context(connected(client)) for _ in range(6)]
        for connection in heads:
            connection.sendall(b"GET /healthz HT")
        body = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: 18\r\n\r\n{{".encode()
        bodies = [opened.enter_context(connected(client)) for _ in range(6)]
        for connection in bodies:
            connection.sendall(body)
        assert client.post("/embed", json={"inputs": ["red"]}).status_code == 200
        assert heads[0].recv(1) == heads[4].recv(1) == b"", "the oldest go first"
        bodies[-1].sendall(b'"inputs":["red"]}')
        assert bodies[-1].recv(65_536).startswith(b"HTTP/1.1 200"), "the latest has its time"


class Waiting:
    """A connection from an address; whether it is its client's turn."""

    def __init__(self, address: str, waits: bool = True) -> None:
        self.address, self.waits, self.is_closed = address, waits, False

    def let_go(self) -> None:
        self.is_closed = True


def test_the_address_with_most_connections_loses_one_that_waits() -> None:
    others = protocol.Connections(4)
    other = Waiting("192.0.2.1")
    flood = [Waiting("192.0.2.2", waits) for waits in (False, True, True)]
    last = Waiting("192.0.2.3")
    for connection in (other, *flood, last):
        others.join(connection)  # type: ignore[arg-type]
    assert [connection.is_closed for connection in (other, *flood, last)] == [False, False, True, False, False]
    for connection in flood:
        connection.waits = False
    late = Waiting("192.0.2.2")
    others.join(late)  # type: ignore[arg-type]
    assert late.is_closed and not any(connection.is_closed for connection in (other, flood[0], flood[2], last))
    others.leave(other)  # type: ignore[arg-type]
    others.leave(other)  # type: ignore[arg-type]
    others.join(fifth := Waiting("192.0.2.4"))  # type: ignore[arg-type]
    assert not fifth.is_closed, "there is room again"


def test_large_bodies_leave_room_for_small_ones(settings: Settings) -> None:
    """One client's bodies, however slowly they come, do not have all others refused where there are no keys."""
    with serving(settings.model_copy(update={"max_bodies_bytes": 100_000})) as client, connected(client) as first:
        head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}"
        first.sendall(f"{head}Expect: 100-continue\r\nContent-Length: 100000\r\n\r\n".encode())
        assert first.recv(65_536).startswith(b"HTTP/1.1 100"), "it has all the room"
        large = client.post("/embed", json={"inputs": ["red" + " " * 100]})
        assert (large.status_code, large.json()["code"]) == (429, "overloaded")
        assert client.post("/embed", json={"inputs": ["red"]}).status_code == 200
        chunked = client.post("/embed", content=iter([b'{"inputs":["red"]}']), headers={"Content-Type": JSON[14:-2]})
        assert chunked.status_code == 200


def test_bodies_are_refused_unread_where_there_are_too_many(settings: Settings) -> None:
    some = settings.model_copy(update={"max_bodies_bytes": 1_500})
    with serving(some) as client, connected(client) as first, connected(client) as second:
        head = f"POST /embed HTTP/1.1\r\nHost: localhost\r\n{JSON}"
        body = b'{"inputs":["red"]}' + b" " * 982
        first.sendall(f"{head}Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n".encode())
        assert first.recv(65_536).startswith(b"HTTP/1.1 100"), "it has its room, and is asked for the body"
        first.sendall(body[:500])
        second.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode())  # not a byte of its body
        status, told = answer(second)
        assert (status, told["code"]) == (429, "overloaded")
        response = client.post("/embed", content=iter([b" " * 600]), headers={"Content-Type": "application/json"})
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        first.sendall(body[500:])
        assert first.recv(65_536).startswith(b"HTTP/1.1 200")
        assert client.post("/embed", content=body, headers={"Content-Type": "application/json"}).status_code == 200


def test_the_bodies_of_one_key_leave_room_for_anothers(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    one, other = (create_key(file, name, ["read"])[1] for name in ("one", "other"))
    some = settings.model_copy(update={"max_bodies_bytes": 4_000, "keys": file})
    body = b'{"inputs":["red"]}' + b" " * 982

    def head(key: str) -> bytes:
        return f"POST /embed HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n{JSON}".encode()

    with serving(some) as client, ExitStack() as opened:

        def begun(key: str) -> socket.socket:
            """A request of 1,000 bytes, of which none has come."""
            connection = opened.enter_context(connected(client))
            connection.sendall(head(key) + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n")
            return connection

        def taken(key: str) -> socket.socket:
            """One that has its room: the server asks for the body."""
            connection = begun(key)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 100")
            return connection

        flood = [taken(one) for _ in range(2)]
        status, told = answer(begun(one))
        assert (status, told["code"]) == (429, "overloaded"), "2,000 are left, and it has 2,000"
        chunked = opened.enter_context(connected(client))
        chunked.sendall(head(one) + b"Transfer-Encoding: chunked\r\n\r\n3E8\r\n" + body + b"\r\n")
        assert answer(chunked)[0] == 429, "nor where its length is not said"
        headers = {"Authorization": f"Bearer {one}"}
        assert client.get("/models", headers=headers).status_code == 200, "what has no body needs no room"

        def ended(connection: socket.socket) -> None:
            connection.sendall(body)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")

        ended(taken(other))
        ended(flood[0])
        client.get("/healthz")  # by now it has let go of what was answered
        ended(taken(one))
        ended(flood[1])


def test_one_large_body_is_read_whatever_the_limit_of_all(settings: Settings) -> None:
    with serving(settings.model_copy(update={"max_bodies_bytes": 10})) as client:
        assert client.post("/embed", json={"inputs": ["red"]}).status_code == 200


@pytest.mark.parametrize("path", ["/items", "/collections/a", "/label-sets/a"])
def test_a_wrong_method_is_told_all_the_right_ones(shared_client: httpx.Client, path: str) -> None:
    response = shared_client.request("PATCH", path)
    assert response.status_code == 405
    one = "DELETE, GET, HEAD, PUT"
    expected = {"/items": "GET, HEAD, POST", "/collections/a": one, "/label-sets/a": one}
    assert response.headers["allow"] == expected[path]
