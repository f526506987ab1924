"""The socket that requests come in by: refused before it is listened to, and nobody lost when it is closed."""

import socket
from collections.abc import Sequence

import pytest

from service.commands.serve import bind
from service.settings import Settings
from tests.conftest import served


def test_nobody_is_kept_waiting_before_the_server_is_ready() -> None:
    with bind("127.0.0.1", 0) as bound:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(bound.getsockname())
        bound.listen()
        with socket.create_connection(bound.getsockname()):
            pass


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_in_use_is_refused_at_once(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken, pytest.raises(OSError, match="in use"):
        bind(host, taken.getsockname()[1])


def test_who_waits_at_the_end_is_answered_and_who_comes_later_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = [socket.socket() for _ in range(20)]
    with served(settings) as (server, client):
        address = (client.base_url.host, client.base_url.port)
        stop_listening = server._stop_listening

        async def crowded(sockets: Sequence[socket.socket]) -> None:
            for connection in waiting:  # in the same step of the event loop, which so has accepted none of them
                connection.connect(address)
                connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await stop_listening(sockets)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)

        monkeypatch.setattr(server, "_stop_listening", crowded)
    for connection in waiting:
        with connection:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
