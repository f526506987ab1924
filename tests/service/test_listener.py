"""The socket that requests come in by: refused before it is listened to, and nobody lost when it is closed."""

import socket
import sys

import pytest

from service.api import listener


def test_nobody_is_kept_waiting_before_the_server_is_ready() -> None:
    with listener.bind("127.0.0.1", 0) as bound:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(bound.getsockname())
        bound.listen()
        with socket.create_connection(bound.getsockname()):
            pass


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_address_in_use_is_refused_at_once(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as taken, pytest.raises(OSError, match="in use"):
        listener.bind(host, taken.getsockname()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the filter is Linux's")
def test_who_is_in_is_served_and_who_comes_later_is_not_let_in() -> None:
    with listener.bind("127.0.0.1", 0) as bound, socket.socket() as late:
        bound.listen()
        with socket.create_connection(bound.getsockname()) as early:
            early.sendall(b"a request")
            listener.admit_nobody(bound)
            late.setblocking(False)
            with pytest.raises(BlockingIOError):
                late.connect(bound.getsockname())
            # On loopback a connection that may be made is made by then.
            accepted, _ = bound.accept()
            with accepted:
                assert accepted.recv(100) == b"a request"
                early.sendall(b"and more")
                accepted.sendall(b"an answer")
                assert (accepted.recv(100), early.recv(100)) == (b"and more", b"an answer")
            bound.setblocking(False)
            with pytest.raises(BlockingIOError):
                bound.accept()
