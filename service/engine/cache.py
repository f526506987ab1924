"""Cache of embeddings by content: Redis when configured, else a bounded map in the process. A broken cache is a
miss."""

import asyncio
import hashlib
import logging
import re
import struct
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
import redis.asyncio
from numpy.typing import NDArray
from redis.exceptions import AuthenticationError, AuthorizationError, InvalidResponse, RedisError, ResponseError

from service.settings import SettingsError

log = logging.getLogger(__name__)

_UNIT_TOLERANCE = 1e-3
_SHARES = 10_000
_ENTRY_OVERHEAD = 256  # bytes a map entry takes besides its vector, about


@dataclass(frozen=True)
class Entry:
    vector: NDArray[np.float32]
    """Unit vector (D,), not writeable."""
    truncated: bool = False
    tokens: int = 0
    unknown: float = 0.0
    """The share of a text's tokens that the tokenizer does not know, of four decimals."""


class Observer(Protocol):
    def cache_error(self) -> None: ...


class Cache(Protocol):
    """A cache. No method raises: an unreadable entry is None, and an entry that cannot be written is dropped."""

    async def get_many(self, keys: Sequence[str]) -> list[Entry | None]: ...
    async def put_many(self, entries: Mapping[str, Entry]) -> None: ...
    async def alive(self) -> bool: ...
    async def close(self) -> None: ...


def key_of(space: str, precision: str, kind: str, content: bytes) -> str:
    """The key of some content in a space. `kind` keeps a text apart from a file that holds the same bytes.

    The space hashes the preprocessing, the weights and the dimensions. It does not say the precision, in which the bits
    of a vector differ.
    """
    return f"isthmus:3:{space}:{precision}:{kind}:{hashlib.sha256(content).hexdigest()}"


def check_redis(url: str) -> None:
    """Check once that Redis accepts the URL; a server that is away is no error. Blocks for a second or two.

    Raises SettingsError for what is no URL of a Redis, where Redis refuses the user, the password or the number of the
    database, and where what answers is no Redis.
    """
    parts = urlsplit(url)
    try:
        # The client of Redis would read an invalid number as 0.
        if parts.scheme != "unix" and not (parts.hostname and re.fullmatch("/?[0-9]*", parts.path)):
            raise ValueError("write redis://HOST:PORT/NUMBER")
        with redis.Redis.from_url(url, socket_timeout=1, socket_connect_timeout=1, retry=None) as connection:
            connection.ping()
    except (AuthenticationError, AuthorizationError, ResponseError) as error:
        raise SettingsError(f"ISTHMUS_REDIS_URL is refused by Redis: {error}") from None
    except InvalidResponse:
        raise SettingsError("ISTHMUS_REDIS_URL: what answers there is no Redis") from None
    except (ValueError, TypeError) as error:  # TypeError: an option that its client does not know
        raise SettingsError(f"ISTHMUS_REDIS_URL is no URL of a Redis: {error}") from None
    except (RedisError, OSError) as error:
        log.warning("Redis does not answer: %s", error)


class MemoryCache:
    """The least recently used entries, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    async def get_many(self, keys: Sequence[str]) -> list[Entry | None]:
        entries = [self._entries.get(key) for key in keys]
        for key, entry in zip(keys, entries, strict=True):
            if entry is not None:
                self._entries.move_to_end(key)
        return entries

    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        for key, entry in entries.items():
            old = self._entries.pop(key, None)
            self._bytes += _size(entry) - (_size(old) if old else 0)
            self._entries[key] = entry
        while self._bytes > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self._bytes -= _size(evicted)

    @property
    def bytes(self) -> int:
        return self._bytes

    async def alive(self) -> bool:
        return True

    async def close(self) -> None:
        self._entries.clear()


class RedisCache:
    """Stores raw little-endian float32 vectors in Redis, each with eight more bytes (see `encode`), and a time to live.

    After a failure Redis is left alone for `pause_s`, so that an outage costs one timeout and not one per request.
    """

    def __init__(
        self, url: str, *, dimensions: int, ttl_s: int, timeout_s: float, observer: Observer, pause_s: float = 1.0
    ) -> None:
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None, decode_responses=False
        )
        self._dimensions, self._ttl_s, self._timeout_s, self._pause_s = dimensions, ttl_s, timeout_s, pause_s
        self._observer = observer
        self._paused_until = 0.0

    async def get_many(self, keys: Sequence[str]) -> list[Entry | None]:
        if not keys or time.monotonic() < self._paused_until:
            return [None] * len(keys)
        try:
            async with asyncio.timeout(self._timeout_s):
                values = await self._redis.mget(keys)
            if not isinstance(values, list) or len(values) != len(keys):
                raise ValueError("not a value for each key")
        except Exception:  # what is no Redis answers anything, and its client then raises anything
            await self._fail()
            return [None] * len(keys)
        return [None if value is None else self._decode(value) for value in values]

    async def put_many(self, entries: Mapping[str, Entry]) -> None:
        if not entries or time.monotonic() < self._paused_until:
            return
        try:
            async with asyncio.timeout(self._timeout_s), self._redis.pipeline(transaction=False) as pipeline:
                for key, entry in entries.items():
                    pipeline.set(key, encode(entry), ex=self._ttl_s)
                await pipeline.execute()
        except Exception:
            await self._fail()

    async def alive(self) -> bool:
        """Return whether Redis answers, now."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return bool(await self._redis.ping())
        except Exception:
            await self._disconnect()
            return False

    async def close(self) -> None:
        await self._redis.aclose()

    async def _fail(self) -> None:
        self._observer.cache_error()
        self._paused_until = time.monotonic() + self._pause_s
        await self._disconnect()

    async def _disconnect(self) -> None:
        # An abandoned connection would give the rest of its answer to the next question.
        with suppress(Exception):
            await self._redis.connection_pool.disconnect()

    def _decode(self, value: object) -> Entry | None:
        entry = decode(value, self._dimensions)
        if entry is None:
            self._observer.cache_error()
        return entry


def encode(entry: Entry) -> bytes:
    """Encode float32 (D,), then as uint32 tokens × 2 + truncated and 10,000 × the unknown share; all little-endian."""
    numbers = struct.pack("<II", entry.tokens << 1 | entry.truncated, round(_SHARES * entry.unknown))
    return entry.vector.astype("<f4").tobytes() + numbers


def decode(value: object, dimensions: int) -> Entry | None:
    """Decode a value of `encode`; returns None for anything but a unit vector of that many dimensions."""
    if not isinstance(value, bytes) or len(value) != 4 * dimensions + 8:
        return None
    vector = np.frombuffer(value, "<f4", count=dimensions).astype(np.float32)
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not abs(length - 1.0) <= _UNIT_TOLERANCE:  # NaN compares false
        return None
    vector.setflags(write=False)
    trailer, unknown = struct.unpack("<II", value[-8:])
    if unknown > _SHARES:
        return None
    return Entry(vector, bool(trailer & 1), trailer >> 1, unknown / _SHARES)


def _size(entry: Entry) -> int:
    return entry.vector.nbytes + _ENTRY_OVERHEAD
