"""Cache of embeddings by content: Redis when configured, else a bounded map in the process. A broken cache is a
miss."""

import asyncio
import hashlib
import logging
import re
import struct
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
import redis.asyncio
from redis.exceptions import AuthenticationError, AuthorizationError, InvalidResponse, RedisError, ResponseError

from service.contract.bundle import Modality
from service.engine.inputs import Decoded, Embedded, Media, Single, Text, TokenIds
from service.settings import SettingsError

log = logging.getLogger(__name__)

_UNIT_TOLERANCE = 1e-3
_SHARES = 10_000
"""Parts of 1 in which the share of unknown tokens is stored."""
_ENTRY_OVERHEAD = 256
"""Bytes that an entry of the map takes besides its vector, about."""


class Cache(Protocol):
    """A cache. No method raises: an unreadable entry is a miss, and an entry that cannot be written is dropped."""

    async def get_many(self, modalities: Mapping[str, Modality]) -> dict[str, Embedded]:
        """Return the entries that are there, by key. `modalities`: that of the input by its key."""
        ...

    async def put_many(self, entries: Mapping[str, Embedded]) -> None: ...
    async def alive(self) -> bool: ...
    async def close(self) -> None: ...


def keys_of(space: str, precisions: Mapping[Modality, str], inputs: Sequence[Single]) -> list[str]:
    """Return the keys of inputs' vectors. A text and a file that holds the same bytes have different ones.

    The space hashes the preprocessing, the weights and the dimensions. It does not say the precision, in which the bits
    of a vector differ.
    """
    keys = []
    modality: Modality
    kind: str
    for given in inputs:
        match given:
            case Text(text, role, modality):
                content = text.encode("utf-8", "surrogatepass")
                kind = "text" if role == "query" else role
                kind = kind if modality == "text" else f"{modality} {kind}"
            case TokenIds(ids):
                modality, kind, content = "text", "ids", ",".join(map(str, ids)).encode()
            case Media():
                modality, content = given.modality, given.data
                kind = modality if given.front_end is None else f"{modality} {given.front_end}"
            case Decoded():
                modality, kind, content = given.modality, f"{given.modality} {given.value.shape}", given.value.tobytes()
        precision = precisions.get(modality, "none")
        keys.append(f"isthmus:3:{space}:{precision}:{kind}:{hashlib.sha256(content).hexdigest()}")
    return keys


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
        self._entries: OrderedDict[str, Embedded] = OrderedDict()

    async def get_many(self, modalities: Mapping[str, Modality]) -> dict[str, Embedded]:
        entries = {key: self._entries[key] for key in modalities if key in self._entries}
        for key in entries:
            self._entries.move_to_end(key)
        return entries

    async def put_many(self, entries: Mapping[str, Embedded]) -> None:
        for key, entry in entries.items():
            old = self._entries.pop(key, None)
            self._bytes += _size(entry) - (_size(old) if old else 0)
            self._entries[key] = replace(entry, cached=True)
        while self._bytes > self._max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self._bytes -= _size(evicted)

    def size(self) -> int:
        """Return how many bytes it takes."""
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
        self,
        url: str,
        *,
        dimensions: int,
        ttl_s: int,
        timeout_s: float,
        failed: Callable[[], None],
        pause_s: float = 1.0,
    ) -> None:
        """Open a client. `failed` is called for each command that fails and each entry that cannot be read."""
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None, decode_responses=False
        )
        self._dimensions, self._ttl_s, self._timeout_s, self._pause_s = dimensions, ttl_s, timeout_s, pause_s
        self._failed = failed
        self._paused_until = 0.0

    async def get_many(self, modalities: Mapping[str, Modality]) -> dict[str, Embedded]:
        if not modalities or time.monotonic() < self._paused_until:
            return {}
        try:
            async with asyncio.timeout(self._timeout_s):
                values = await self._redis.mget(list(modalities))
            if not isinstance(values, list) or len(values) != len(modalities):
                raise ValueError("not a value for each key")
        except Exception:  # what is no Redis answers anything, and its client then raises anything
            await self._fail()
            return {}
        entries = {}
        for (key, modality), value in zip(modalities.items(), values, strict=True):
            if entry := decode(value, self._dimensions, modality):
                entries[key] = entry
            elif value is not None:
                self._failed()
        return entries

    async def put_many(self, entries: Mapping[str, Embedded]) -> None:
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
        self._failed()
        self._paused_until = time.monotonic() + self._pause_s
        await self._disconnect()

    async def _disconnect(self) -> None:
        # An abandoned connection would give the rest of its answer to the next question.
        with suppress(Exception):
            await self._redis.connection_pool.disconnect()


def encode(entry: Embedded) -> bytes:
    """Encode float32 (D,), then as uint32 tokens × 2 + truncated and 10,000 × the unknown share; all little-endian."""
    numbers = struct.pack("<II", entry.tokens << 1 | entry.truncated, round(_SHARES * entry.unknown))
    return entry.vector.astype("<f4").tobytes() + numbers


def decode(value: object, dimensions: int, modality: Modality) -> Embedded | None:
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
    return Embedded(vector, modality, bool(trailer & 1), True, trailer >> 1, unknown / _SHARES)


def _size(entry: Embedded) -> int:
    return entry.vector.nbytes + _ENTRY_OVERHEAD
