"""The gate refuses requests without the key that they need: here is the only list of routes that need none.

Without ISTHMUS_KEYS anybody who reaches the port may read and write; pages of other sites, in the browser
of somebody who reaches it, may not (see `_check_browser`). With it, only what stands in OPEN is open.
"""

import ipaddress
from collections.abc import Collection, Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import keys
from service.api.keys import Key, Keyring
from service.api.middleware import OfRequests, refuse, stated_length
from service.api.problems import respond
from service.api.protocols import registry
from service.api.state import State
from service.errors import CrossOrigin, Forbidden, IsthmusError, Misdirected, Unauthenticated
from service.runtime.logs import caller
from service.runtime.quotas import Meter
from service.settings import Settings, is_loopback

OPEN = frozenset({"/healthz", "/readyz", "/", "/docs"})
"""Paths whose GET needs no key: probes, and pages, which hold no data and ask for a key themselves."""
OPEN_FOLDER = "/playground/"
"""Static files of that page."""
READS = frozenset({"/embed", "/search", "/search/batch", "/search/script", "/classify", "/score"}) | registry.READS
"""Paths whose POST stores nothing."""

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_UNREAD_BYTES = 65_536  # bytes of a refused request's body that are quicker to read than a new connection is to make


def scope_of(method: str, path: str) -> keys.Scope | None:
    """Return the scope that a request needs; None where it needs no key, as only listed paths do."""
    if method in {"GET", "HEAD"} and (path in OPEN or path.startswith(OPEN_FOLDER)):
        return None
    if method in _SAFE or (method == "POST" and path.removesuffix("/") in READS):
        return "read"
    return "write"


class Gate(OfRequests):
    """Refuses a request without a key for what it asks, before a byte of its body is read; then counts it."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str], hosts: Collection[str] | None) -> None:
        """Guard the app. `hosts` None: any host."""
        super().__init__(app)
        self.origins, self.hosts = origins, hosts

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        services: State = scope["state"]["services"]
        headers = Headers(scope=scope)
        meter = None
        try:
            needed_scope = scope_of(scope["method"], scope["path"])
            if services.keys is None:
                self._check_browser(scope["method"], headers)
            elif needed_scope is not None:
                key = await self._key(services.keys, services.settings, scope, headers)
                caller.set(key.id)
                if needed_scope not in key.scopes:
                    raise Forbidden(f"this needs a key with the scope {needed_scope}")
                if key.limits:
                    meter = Meter(services.limiter, key.id, key.limits)
                    await meter.take({"requests": 1})
                    scope["state"]["meter"] = meter
        except IsthmusError as error:
            await self._refuse(scope, receive, send, error, meter)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(meter.headers() if meter else {})
            await send(message)

        await self.app(scope, receive, sending if meter else send)

    async def _key(self, keyring: Keyring, settings: Settings, scope: Scope, headers: Headers) -> Key:
        """Return the key that a request shows, or that its protocol has for clients that can show none. Raises
        Unauthenticated, and Misdirected or CrossOrigin for a browser's request without a key."""
        protocol = registry.protocol_of(scope["path"])
        identity = settings.key_ids.get(protocol.name) if protocol else None
        if identity is None or "authorization" in headers:
            return await keyring.find(_bearer(headers))
        self._check_browser(scope["method"], headers)
        return await keyring.get(identity)

    async def _refuse(
        self, scope: Scope, receive: Receive, send: Send, error: IsthmusError, meter: Meter | None
    ) -> None:
        response = respond(scope["path"], error)
        response.headers.update(meter.headers() if meter else {})
        headers = Headers(scope=scope)
        if "transfer-encoding" not in headers and (stated_length(headers) or 0) <= _UNREAD_BYTES:
            await response(scope, receive, send)
        else:
            await refuse(response, scope, receive, send)

    def _check_browser(self, method: str, headers: Headers) -> None:
        """Refuse other sites' pages: without keys, a browser's place in the network is all that a caller needs.

        A page of another site may send a form, or JSON without a content type, to whatever its reader's machine
        reaches: its browser says whose page it is (Origin). A page that has its own name resolve to this machine (DNS
        rebinding) passes for a page of this server: only the name that is asked for (Host) tells.
        """
        if self.hosts is not None and not _is_known_host(headers.get("host", ""), self.hosts):
            raise Misdirected("this server does not answer to that name: ISTHMUS_HOSTS lists those it answers to")
        origin = headers.get("origin")
        if method in _SAFE or origin is None or origin in self.origins:
            return
        if origin.partition("://")[2].lower() != headers.get("host", "").lower():
            raise CrossOrigin("pages of that origin may not call this server: ISTHMUS_ORIGINS lists those that may")


def local_names(hosts: Iterable[str], host: str, keyed: bool) -> Collection[str] | None:
    """Return the names that a server answers to, None for any: without a list those of this machine, if only it can
    ask."""
    if listed := frozenset(host.lower() for host in hosts):
        return listed
    return frozenset() if not keyed and is_loopback(host) else None


def _is_known_host(host: str, hosts: Collection[str]) -> bool:
    """Return whether the host is known, as addresses and localhost are: nobody can make them resolve to another."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
    name = name.lower().removesuffix(".")
    if name == "localhost" or name.endswith(".localhost") or name in hosts:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _bearer(headers: Headers) -> str:
    """Raises Unauthenticated."""
    values = headers.getlist("authorization")
    scheme, _, clear = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not clear.strip():
        raise Unauthenticated("this needs an API key: Authorization: Bearer isthmus_…", code="missing_api_key")
    return clear.strip()
