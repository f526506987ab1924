"""URLs are inputs where ISTHMUS_FETCH is set, and then only of the public Internet unless more is allowed.

A client chooses the URL, and the server's place in its network must not be lent to it (server-side request forgery):

- the URL is read once, strictly, and put together again from its parts: no second parser may see another host in it;
- each hop's name is resolved once, every address that it has is checked, and the connection goes to a checked address,
  with the name in TLS and in Host: a name that resolves to something else a moment later changes nothing;
- redirects are hops like the first; nothing of this process goes along: no cookies, no credentials, no proxy;
- one clock runs over name, connection, headers, redirects and body; bytes are counted as they come.
"""

import asyncio
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Literal, Self, cast
from urllib.parse import urljoin

import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.rdatatype
import dns.resolver
import httpcore2
from dns.rdtypes.IN.A import A
from dns.rdtypes.IN.AAAA import AAAA

from service import __version__
from service.contract.errors import InputError, MediaTooLarge
from service.engine.addresses import Address, Network, inside, public
from service.errors import FetchFailed, FetchRefused, Overloaded
from service.runtime.deadline import within
from service.runtime.fair import FairSemaphore
from service.runtime.quotas import Meter
from service.runtime.timings import timed
from service.settings import Settings, SettingsError

log = logging.getLogger(__name__)

_MOST_CHARS = 2_048
_MOST_REDIRECTS = 3
_REDIRECT = frozenset({301, 302, 303, 307, 308})
_CONNECT_S = 3.0
"""Seconds to connect to each address of a name."""
_TIMEOUT_S = 10.0
"""Seconds to fetch one URL, from resolving its name to its last byte."""
_URLS_AT_ONCE = 16
"""Number of URLs fetched at once for requests; for jobs, another quarter of it."""
_PORTS = {"http": 80, "https": 443}
_TEMPORARY = frozenset({408, 425, 429, *range(500, 600)})
"""HTTP statuses after which a later try may succeed."""

# What RFC 3986 calls URI, of the schemes at hand, without userinfo; a fragment is not sent. The host is a name or an
# address as it is written since: a backslash, a zone, an escape or a letter that is not ASCII in it is no host.
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>(?:/[!-\"$->@-\[\]-~]*)?(?:\?[!-\"$-\[\]-~]*)?)(?:#[!-\[\]-~]*)?",
    re.ASCII | re.IGNORECASE,
)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


@dataclass(frozen=True)
class Url:
    """Holds the parts of a URL that a request is made of. Each part is checked; nothing else of the text is kept."""

    scheme: Literal["http", "https"]
    host: str
    """A name in lower case, or an address as `ipaddress` writes it."""
    address: Address | None
    """The host's address, where the host is written as one."""
    port: int
    target: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises FetchRefused."""
        match = _URL.fullmatch(text) if len(text) <= _MOST_CHARS else None
        if match is None:
            raise FetchRefused(
                f"not a URL that is fetched: https://host/path, at most {_MOST_CHARS} ASCII characters, without a user"
            )
        scheme = cast('Literal["http", "https"]', match["scheme"].lower())
        host, address = _host(match["host"].lower())
        port = int(match["port"] or _PORTS[scheme])
        target = match["target"]
        return cls(scheme, host, address, port, target if target.startswith("/") else f"/{target}")

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def _host(text: str) -> tuple[str, Address | None]:
    """Raises FetchRefused for what is neither a name nor an address in its one usual spelling."""
    try:
        if text.startswith("["):
            address: Address = IPv6Address(text[1:-1])
            return str(address), address
        name = text.removesuffix(".")
        labels = name.split(".")
        if _NUMERIC.fullmatch(labels[-1]):
            # Not 127.1, 2130706433, 0x7f000001 or 0177.0.0.1, which C libraries read as addresses too.
            address = IPv4Address(name)
            return str(address), address
    except ValueError:
        raise FetchRefused("the URL's host is an address in a spelling that is not read here") from None
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise FetchRefused("the URL's host is not a name")
    return name, None


@dataclass(frozen=True)
class Rules:
    """Says which hosts and addresses may be fetched from."""

    schemes: frozenset[str]
    ports: frozenset[int]
    names: tuple[str, ...] = ()
    """Names that may be fetched from; empty: any."""
    networks: tuple[Network, ...] = ()
    """Networks that are allowed besides the public Internet."""
    denied_names: tuple[str, ...] = ()
    denied_networks: tuple[Network, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Raises SettingsError."""
        schemes = {"off": (), "https": ("https",), "http": ("http", "https")}[settings.fetch]
        names, networks = _entries("ISTHMUS_FETCH_ALLOW", settings.fetch_allow)
        denied_names, denied_networks = _entries("ISTHMUS_FETCH_DENY", settings.fetch_deny)
        ports = frozenset(settings.fetch_ports or (_PORTS[scheme] for scheme in schemes))
        return cls(frozenset(schemes), ports, names, networks, denied_names, denied_networks)

    @classmethod
    def of_upstream(cls, settings: Settings, url: Url) -> Self:
        """Return the rules by which the one server that the operator named is asked. Raises SettingsError."""
        _, networks = _entries("ISTHMUS_FETCH_ALLOW", settings.fetch_allow)
        denied_names, denied_networks = _entries("ISTHMUS_FETCH_DENY", settings.fetch_deny)
        return cls(frozenset({url.scheme}), frozenset({url.port}), (), networks, denied_names, denied_networks)

    def check(self, url: Url) -> None:
        """Raises FetchRefused."""
        if url.scheme not in self.schemes:
            raise FetchRefused("this server does not fetch over http: only https is allowed")
        if url.port not in self.ports:
            raise FetchRefused("this server does not fetch from that port")
        is_listed = not self.names or _matches(url.host, self.names)
        if url.address is not None:
            is_allowed = self.admits(url.address) and (is_listed or inside(url.address, self.networks))
        else:
            is_allowed = is_listed
        if not is_allowed or _matches(url.host, self.denied_names):
            raise FetchRefused("this server does not fetch from that host")

    def admits(self, address: Address) -> bool:
        if inside(address, self.denied_networks):
            return False
        return inside(address, self.networks) or public(address)


def _entries(setting: str, entries: Iterable[str]) -> tuple[tuple[str, ...], tuple[Network, ...]]:
    names, networks = [], []
    for entry in entries:
        try:
            networks.append(ip_network(entry))
            continue
        except ValueError as error:
            name = entry.lower().removesuffix(".")
            labels = name.removeprefix("*.").split(".")
            if "/" in entry or not all(map(_LABEL.fullmatch, labels)) or _NUMERIC.fullmatch(labels[-1]):
                raise SettingsError(f"{setting}: {entry!r} is no name, *.name, address or network: {error}") from None
        names.append(name)
    return tuple(names), tuple(networks)


def _matches(host: str, names: Iterable[str]) -> bool:
    return any(host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in names)


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to the addresses that were checked, whatever name the request has; the name stays in TLS and in Host."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 — httpcore2's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        failure: Exception = httpcore2.ConnectError("no address")
        for address in self._addresses:
            try:
                return await self._network.connect_tcp(str(address), port, timeout=_CONNECT_S)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


Count = Callable[[int], None]
Headers = dict[bytes | str, bytes | str]


@dataclass(frozen=True)
class FetchConfig:
    """Holds rules, certificates and resolver for fetching, as the settings have them."""

    rules: Rules
    tls: ssl.SSLContext
    resolver: dns.asyncresolver.Resolver


def fetch_config(settings: Settings) -> FetchConfig | None:
    """Return the configuration of fetching; None where fetching is off. Raises SettingsError."""
    if settings.fetch == "off":
        return None
    return FetchConfig(Rules.of(settings), _tls(settings.fetch_ca), _resolver(settings.fetch_dns))


def upstream_config(settings: Settings, name: str = "immich_upstream") -> FetchConfig | None:
    """Return the configuration of asking the server that a setting names; None where it is unset. Raises
    SettingsError."""
    address: str | None = getattr(settings, name)
    if address is None:
        return None
    try:
        url = Url.parse(address)
        rules = Rules.of_upstream(settings, url)
        rules.check(url)
    except FetchRefused as error:
        raise SettingsError(f"ISTHMUS_{name.upper()}: {address}: {error}") from None
    return FetchConfig(rules, _tls(settings.fetch_ca), _resolver(settings.fetch_dns))


class Fetcher:
    """Fetches for all requests, a limited number at a time; in the `background` a quarter of it. Lives on one event
    loop. `fetched` is told the outcome and the bytes of each fetch."""

    def __init__(
        self,
        config: FetchConfig,
        settings: Settings,
        fetched: Callable[[str, int], None],
        *,
        background: bool = False,
        timeout_s: float = _TIMEOUT_S,
        places: int = _URLS_AT_ONCE,
    ) -> None:
        self.rules, self._tls, self._resolver = config.rules, config.tls, config.resolver
        limits = settings.limits
        self.most = {"image": limits.image_bytes, "audio": limits.audio_bytes}
        self.most_of_a_request = limits.body_bytes
        self.deadline_s = settings.request_deadline_s
        self._timeout_s = timeout_s
        places = max(1, places // 4) if background else places
        # Who answers slowly holds a place for as long as `timeout_s`: one caller never has them all.
        self._places = FairSemaphore(places + 1, per_caller=places)
        self._fetched = fetched

    async def fetch(self, text: str, most: int, count: Count = lambda size: None) -> bytes:
        """Return the content at the URL, at most `most` bytes of it; `count` receives the sizes as they come, and may
        raise.

        Raises FetchRefused, MediaTooLarge, or FetchFailed, which says nothing of why: neither what a name resolves to
        nor what answers at a port is the client's to learn.
        """
        result, size = "failed", 0
        try:
            async with self._places, asyncio.timeout(self._timeout_s):
                data = await self._follow(text, most, count)
            result, size = "fetched", len(data)
            return data
        except InputError as error:
            result = {FetchRefused: "refused", MediaTooLarge: "too_large"}.get(type(error), "failed")
            raise
        except Exception as error:  # of names, sockets, TLS, HTTP; and the time
            log.debug("a URL was not fetched: %r", error)
            raise FetchFailed("the URL could not be fetched", temporary=True) from None
        finally:
            self._fetched(result, size)

    async def _follow(self, text: str, most: int, count: Count) -> bytes:
        url = Url.parse(text)
        for _ in range(1 + _MOST_REDIRECTS):
            self.rules.check(url)
            answer = await self._get(url, most, count)
            if isinstance(answer, bytes):
                return answer
            url = Url.parse(urljoin(str(url), answer))
        raise FetchFailed("the URL could not be fetched: too many redirects")

    async def _addresses(self, url: Url) -> Sequence[Address]:
        """Return the addresses to connect to; raise FetchFailed where a name has one that is not allowed: an attack."""
        if url.address is not None:
            return [url.address]
        answers = await asyncio.gather(*(self._resolve(url.host, kind) for kind in ("A", "AAAA")))
        addresses = [address for answer in answers for address in answer]
        if not addresses or not all(map(self.rules.admits, addresses)):
            log.debug("a URL's name has no address that is fetched from, or one that is not")
            raise FetchFailed("the URL could not be fetched")
        return addresses

    async def _resolve(self, host: str, kind: str) -> list[Address]:
        try:
            # Resolve the name as it stands: with the search list it might be one of the inner network.
            answer = await self._resolver.resolve(f"{host}.", kind, search=False, raise_on_no_answer=False)
        except dns.resolver.NXDOMAIN:
            return []
        return [ip_address(record.address) for record in answer if isinstance(record, A | AAAA)]

    async def post(self, url: Url, headers: Headers, content: bytes, most: int) -> tuple[int, bytes, bytes]:
        """Send a body to a URL; return the answer's status, body (at most `most` bytes) and Retry-After. No redirect
        is followed.

        Raises Overloaded, and FetchFailed, which says nothing of why.
        """
        result, size = "failed", 0
        try:
            async with self._places, asyncio.timeout(self._timeout_s):
                self.rules.check(url)
                sent = {**headers, "Content-Length": str(len(content))}
                async with self._request("POST", url, sent, content) as (answer, answer_headers):
                    body = await _body(answer, answer_headers, most, lambda size: None)
            result, size = "fetched", len(body)
            return answer.status, body, answer_headers.get(b"retry-after", b"")
        except Overloaded:
            raise
        except Exception as error:  # of names, sockets, TLS, HTTP; and the time
            log.debug("an upstream did not answer: %r", error)
            raise FetchFailed("the upstream does not answer", temporary=True) from None
        finally:
            self._fetched(result, size)

    async def _get(self, url: Url, most: int, count: Count) -> bytes | str:
        """Return the body, or where to go on."""
        async with self._request("GET", url, {}) as (response, headers):
            if response.status in _REDIRECT:
                return _location(headers.get(b"location", b""))
            if response.status != 200 or headers.get(b"content-encoding", b"identity").lower() != b"identity":
                raise FetchFailed("the URL could not be fetched", temporary=response.status in _TEMPORARY)
            body = await _body(response, headers, most, count)
            if not body:
                raise FetchFailed("the URL could not be fetched: nothing is there")
            return body

    @asynccontextmanager
    async def _request(
        self, method: str, url: Url, headers: Headers, content: bytes | None = None
    ) -> AsyncIterator[tuple[httpcore2.Response, dict[bytes, bytes]]]:
        """Yield the response of one of the URL's addresses to a request, not read yet, and its headers."""
        scheme, host, target = url.scheme.encode(), url.host.encode(), url.target.encode()
        backend = _Pinned(await self._addresses(url))
        origin = httpcore2.Origin(scheme, host, url.port)
        connection = httpcore2.AsyncHTTPConnection(origin, ssl_context=self._tls, network_backend=backend)
        place = httpcore2.URL(scheme=scheme, host=host, port=url.port, target=target)
        sent = {**_headers(url), **headers}
        async with aclosing(connection), connection.stream(method, place, headers=sent, content=content) as response:
            yield response, {name.lower(): value for name, value in response.headers}


def _headers(url: Url) -> Headers:
    return {
        "Host": url.authority,
        "User-Agent": f"isthmus/{__version__}",
        "Accept": "*/*",
        "Accept-Encoding": "identity",  # counted as it comes: nothing may grow in our hands
        "Connection": "close",
    }


async def _body(response: httpcore2.Response, headers: Mapping[bytes, bytes], most: int, count: Count) -> bytes:
    """Read at most `most` bytes of a body. Raises MediaTooLarge."""
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > most:
        raise MediaTooLarge(f"what is at the URL is larger than {most} bytes")
    body = bytearray()
    async for chunk in response.aiter_stream():
        body += chunk
        count(len(chunk))
        if len(body) > most:
            raise MediaTooLarge(f"what is at the URL is larger than {most} bytes")
    return bytes(body)


def _location(value: bytes) -> str:
    """Raises FetchRefused for what a lenient parser would tidy up before it reads it."""
    if not re.fullmatch(rb"[!-\[\]-~]+", value):
        raise FetchRefused("the URL leads on to something that is no URL")
    return value.decode("ascii")


def _tls(authorities: Path | None) -> ssl.SSLContext:
    """Return a context that verifies certificates by the public authorities and by those of the operator."""
    context = httpcore2.default_ssl_context()
    if authorities is not None:
        try:
            context.load_verify_locations(authorities)
        except OSError as error:  # ssl.SSLError is one
            raise SettingsError(f"ISTHMUS_FETCH_CA: {authorities} cannot be read: {error}") from None
    return context


def _resolver(server: str | None) -> dns.asyncresolver.Resolver:
    if server is None:
        try:
            return dns.asyncresolver.Resolver()
        except dns.exception.DNSException as error:
            raise SettingsError(f"ISTHMUS_FETCH_DNS is not set, and the system names no name server: {error}") from None
    resolver = dns.asyncresolver.Resolver(configure=False)
    host, _, port = (
        server.rpartition(":") if re.fullmatch(r"[0-9.]+:[0-9]+|\[.*\]:[0-9]+", server) else (server, "", "53")
    )
    try:
        address = str(ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise SettingsError(f"ISTHMUS_FETCH_DNS: {server!r} is no ADDRESS or ADDRESS:PORT") from None
    resolver.nameservers = [dns.nameserver.Do53Nameserver(address, int(port))]
    return resolver


@dataclass
class Fetches:
    """The fetches of one request: each URL is fetched once, and all bytes together are limited like a request's body.

    `of_a_job`: of one item of a job, for which nobody waits: there is no deadline.
    """

    fetcher: Fetcher
    meter: Meter | None = None
    """Meter of the request's key: fetched bytes are charged before they are used."""
    of_a_job: bool = False
    _left: int = field(init=False)
    _made: dict[tuple[str, str], "asyncio.Task[bytes | InputError]"] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._left = self.fetcher.most_of_a_request

    async def all(self, urls: Sequence[tuple[Literal["image", "audio"], str]]) -> list[bytes | InputError]:
        """Fetch URLs by kind; return each content or its error, in order. Raises RateLimited, DeadlineExceeded."""
        if self.meter is not None:
            await self.meter.prepay(sum(key not in self._made for key in urls))
        for kind, url in urls:
            if (kind, url) not in self._made:
                self._made[kind, url] = asyncio.create_task(self._one(url, self.fetcher.most[kind]))
        tasks = [self._made[key] for key in urls]
        try:
            with timed("fetch"):
                async with within(None if self.of_a_job else self.fetcher.deadline_s):
                    await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()  # nothing, where it is done
        return [task.result() for task in tasks]

    async def _one(self, url: str, most: int) -> bytes | InputError:
        try:
            return await self.fetcher.fetch(url, most, self._count)
        except InputError as error:
            return error

    def _count(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise MediaTooLarge(f"what is at the URLs is larger together than {self.fetcher.most_of_a_request} bytes")
