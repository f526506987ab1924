"""The socket that requests come in by: bound at once, listened to once the server is ready, closed when it is empty."""

import ctypes
import socket
import struct

_SO_ATTACH_FILTER = 26
"""Of Linux; Python's socket does not name it."""


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a bad address stops the start, and not listened to: until the models are open, a
    client or a proxy is refused at once and asks another replica, instead of waiting for this one. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


def admit_nobody(listening: socket.socket) -> None:
    """No new connection gets past the kernel from now on; those that are made can still be accepted.

    Closing a listening socket resets connections that wait to be accepted, requests and all. So the kernel first drops
    what would begin another (a classic BPF program on the TCP header: SYN without ACK), and the socket is closed when
    the last that was made is accepted. Who knocks meanwhile knocks again a second later, and is then refused unheard,
    which any proxy answers by asking another replica.
    """
    load_flags, mask, is_syn = (0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02)
    drop, keep = (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF_FFFF)
    program = [load_flags, mask, is_syn, drop, keep]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    filter = struct.pack("@HP", len(program), ctypes.addressof(code))
    listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter)
