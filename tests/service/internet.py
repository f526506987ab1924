"""A small internet on the loopback network: a name server, and web servers on 127.0.0.x, all real and on sockets."""

import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dns.message
import dns.rdatatype
import dns.rrset
import trustme


class Names:
    """A name server. A name has answers for one question after another; the last is for all that follow."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Sequence[str]]] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def set(self, name: str, *rounds: Sequence[str]) -> None:
        """The addresses that the name has when it is asked for the first time, for the second …"""
        self.answers[name] = list(rounds)

    def close(self) -> None:
        self.socket.sendto(b"", self.socket.getsockname())
        self._thread.join(10)
        self.socket.close()

    def _serve(self) -> None:
        while True:
            wire, client = self.socket.recvfrom(4096)
            if not wire:
                return
            question = dns.message.from_wire(wire)
            response = dns.message.make_response(question)
            asked = question.question[0]
            name, kind = str(asked.name).rstrip("."), dns.rdatatype.to_text(asked.rdtype)
            rounds = self.answers.get(name)
            if rounds is None:
                response.set_rcode(dns.rcode.NXDOMAIN)
            else:
                addresses = rounds[min(self.asked[name, kind], len(rounds) - 1)]
                self.asked[name, kind] += 1
                own = [each for each in addresses if (":" in each) == (kind == "AAAA")]
                if own:
                    response.answer.append(dns.rrset.from_text(asked.name, 1, "IN", kind, *own))
            self.socket.sendto(response.to_wire(), client)


class Site:
    """A web server: what it answers at each path, and what it was asked."""

    def __init__(self, address: str, port: int, tls: ssl.SSLContext | None) -> None:
        self.pages: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        """Paths and headers."""
        self.names: list[str | None] = []
        """That TLS was asked for (SNI)."""
        self.ended = threading.Event()
        self._lock = threading.Lock()
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with site._lock:
                    site.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                try:
                    site.pages[self.path](self)
                except (OSError, KeyError):
                    self.close_connection = True

            def log_message(self, *_: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...

        self.server = Server((address, port), Handler)
        self.address, self.port = address, self.server.server_address[1]
        if tls is not None:
            tls.sni_callback = lambda _, name, __: self.names.append(name)
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(10)

    # What a page may be.

    def give(self, path: str, body: bytes, status: int = 200, **headers: str) -> None:
        def page(request: BaseHTTPRequestHandler) -> None:
            request.send_response(status)
            given = {"Content-Type": "text/html", "Content-Length": str(len(body))} | {
                name.replace("_", "-"): value for name, value in headers.items()
            }
            for name, value in given.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(body)

        self.pages[path] = page

    def lead(self, path: str, to: str, status: int = 302) -> None:
        self.give(path, b"", status, Location=to, Set_Cookie="secret=1")

    def say(self, path: str, raw: bytes) -> None:
        """Bytes as they are, then the end of the connection."""

        def page(request: BaseHTTPRequestHandler) -> None:
            request.wfile.write(raw)
            request.close_connection = True

        self.pages[path] = page

    def drip(self, path: str, first: bytes, drop: bytes) -> None:
        """`first`, then a drop again and again, for ever."""

        def page(request: BaseHTTPRequestHandler) -> None:
            request.wfile.write(first)
            while not self.ended.wait(0.02):
                request.wfile.write(drop)

        self.pages[path] = page


class Internet:
    """Names, an authority, and sites; `media.test` is at 127.0.0.2, which the tests allow, and no other address is."""

    def __init__(self, folder: Path) -> None:
        self.names = Names()
        self.authority = trustme.CA()
        self.authorities = folder / "authority.pem"
        self.authority.cert_pem.write_to_path(str(self.authorities))
        self.sites: list[Site] = []
        self.media = self.site("127.0.0.2")
        self.port = self.media.port
        self.inner = self.site("127.0.0.1", self.port)
        """What nobody may reach through the service."""
        self.names.set("media.test", ["127.0.0.2"])
        self.names.set("inner.test", ["127.0.0.1"])

    def site(self, address: str, port: int = 0, *, tls: bool = True, names: Sequence[str] = ()) -> Site:
        context = None
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            issued = self.authority.issue_cert(*(names or ("media.test", "*.media.test", "inner.test", address)))
            issued.configure_cert(context)
        self.sites.append(Site(address, port, context))
        return self.sites[-1]

    def url(self, path: str, host: str = "media.test") -> str:
        return f"https://{host}:{self.port}{path}"

    def close(self) -> None:
        for site in self.sites:
            site.close()
        self.names.close()


@contextmanager
def internet(folder: Path) -> Iterator[Internet]:
    made = Internet(folder)
    try:
        yield made
    finally:
        made.close()


def options(net: Internet, **more: Any) -> dict[str, Any]:
    """Settings of a service that fetches from it."""
    return {
        "fetch": "https",
        "fetch_allow": ("127.0.0.2",),
        "fetch_ports": (net.port,),
        "fetch_dns": net.names.address,
        "fetch_ca": net.authorities,
    } | more
