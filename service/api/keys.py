"""API keys: a JSON file of each key's rights, without the keys themselves; `python -m service keys` writes it.

A key is `isthmus_<id>_<secret>`. The id finds it and may be logged. The secret is 32 random bytes: there is nothing to
guess, so one SHA-256 of the whole is kept, and no slow hash of passwords, which every request would have to pay for.
"""

import asyncio
import datetime
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, model_validator

from service.contract.bundle import Sha256
from service.contract.files import read_file
from service.errors import NotReady, Unauthenticated, words_of
from service.runtime.quotas import Limit
from service.runtime.workers import OwnThread

log = logging.getLogger(__name__)

Scope = Literal["read", "write"]
_KEY = re.compile(r"isthmus_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_RECHECKED_S = 1.0
_PATIENCE_S = 2.0
"""Seconds to wait for a disk, or a mount, that does not answer."""


class KeysError(ValueError):
    """Raised where the file of keys cannot be read or changed: the message names it."""


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(min_length=1, max_length=100)
    """A name for people."""
    sha256: Sha256
    scopes: frozenset[Scope] = Field(min_length=1)
    limits: tuple[
        Annotated[Limit, PlainValidator(lambda value: Limit.parse(str(value))), PlainSerializer(str)], ...
    ] = ()
    created: datetime.datetime
    expires: datetime.datetime | None = None
    revoked: datetime.datetime | None = None

    @model_validator(mode="after")
    def _each_limit_once(self) -> "Key":
        if len({limit.name for limit in self.limits}) < len(self.limits):
            raise ValueError("a limit is there twice")
        return self

    def state(self, now: datetime.datetime) -> Literal["valid", "expired", "revoked"]:
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> "_File":
        if len({key.id for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have one id")
        return self


def read_keys(path: Path) -> tuple[Key, ...]:
    """Return every key of the file, including revoked ones, in the order they were made. Raises KeysError."""
    try:
        return _File.model_validate_json(read_file(path)).keys
    except OSError as error:
        raise KeysError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise KeysError(f"{path}: {where}: {first['msg']}") from None


def create_key(
    path: Path, name: str, scopes: Sequence[Scope], limits: Sequence[Limit] = (), days: int | None = None
) -> tuple[Key, str]:
    """Add a key to the file, which need not be there yet; the key in the clear is returned once and kept nowhere.

    Raises KeysError.
    """
    identity = secrets.token_hex(6)
    clear = f"isthmus_{identity}_{secrets.token_urlsafe(32)}"
    now = _now()
    with _changing(path) as keys:
        try:
            key = Key(
                id=identity,
                name=name,
                sha256=_digest(clear),
                scopes=frozenset(scopes),
                limits=tuple(limits),
                created=now,
                expires=None if days is None else now + datetime.timedelta(days=days),
            )
        except ValidationError as error:
            raise KeysError(words_of(error.errors()[0])) from None
        keys.append(key)
    return key, clear


def revoke_key(path: Path, identity: str) -> Key:
    """Revoke a key and return it. Raises KeysError where there is no such key, or it is revoked already."""
    with _changing(path) as keys:
        place = next((place for place, key in enumerate(keys) if key.id == identity), None)
        if place is None:
            raise KeysError(f"{path} has no key {identity!r}: `keys list` shows what there is")
        if keys[place].revoked is not None:
            raise KeysError(f"the key {identity} is revoked already")
        keys[place] = keys[place].model_copy(update={"revoked": _now()})
        return keys[place]


class Keyring:
    """Keeps the keys of a file as they are on disk: it looks at the file again a second after the last time.

    While it cannot be read, or its disk does not answer, nobody is let in: the last known keys might be ones that were
    just revoked.
    """

    def __init__(self, path: Path, keys: Sequence[Key] | None = None) -> None:
        self.path = path
        self._keys: Mapping[str, Key] | None = None if keys is None else {key.id: key for key in keys}
        self._seen: tuple[int, ...] | None = None
        self._checked = -_RECHECKED_S
        self._checking = asyncio.Lock()
        self._thread = OwnThread("keys")

    @classmethod
    def open(cls, path: Path) -> "Keyring":
        """Raises KeysError."""
        return cls(path, read_keys(path))

    @property
    def ids(self) -> Collection[str]:
        """Return the IDs of the keys as they were last read."""
        return (self._keys or {}).keys()

    async def find(self, clear: str) -> Key:
        """Return the key that a client shows. Raises Unauthenticated, or NotReady while the file cannot be read."""
        keys = await self._current()
        match = _KEY.fullmatch(clear)
        key = keys.get(match[1]) if match else None
        # Takes the same time for an unknown id as for a known one.
        same = hmac.compare_digest(_digest(clear[:128]), key.sha256 if key else "0" * 64)
        if key is None or not same or key.state(_now()) != "valid":
            raise Unauthenticated("the API key is not valid", code="invalid_api_key")
        return key

    async def get(self, identity: str) -> Key:
        """Return the key with an ID, for a client that cannot show it. Raises Unauthenticated, NotReady."""
        key = (await self._current()).get(identity)
        if key is None or key.state(_now()) != "valid":
            raise Unauthenticated("the API key of this protocol is not valid any more", code="invalid_api_key")
        return key

    async def readable(self) -> bool:
        try:
            await self._current()
        except NotReady:
            return False
        return True

    async def _current(self) -> Mapping[str, Key]:
        if time.monotonic() - self._checked >= _RECHECKED_S:
            async with self._checking:
                if time.monotonic() - self._checked >= _RECHECKED_S:
                    try:
                        await self._thread.run(self._refresh, _PATIENCE_S)
                    except TimeoutError:
                        raise NotReady("the keys cannot be read: their disk does not answer") from None
                    self._checked = time.monotonic()
        if self._keys is None:
            raise NotReady("the keys cannot be read")
        return self._keys

    def _refresh(self) -> None:
        try:
            status = os.stat(self.path)
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp == self._seen:
                return
            self._keys = {key.id: key for key in read_keys(self.path)}
            self._seen = stamp
        except (KeysError, OSError) as error:
            if self._keys is not None or self._seen is not None:
                log.error("nobody is let in until the keys can be read: %s", error)
            self._keys = self._seen = None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _digest(clear: str) -> str:
    return hashlib.sha256(clear.encode("utf-8", "surrogatepass")).hexdigest()


@contextmanager
def _changing(path: Path) -> Iterator[list[Key]]:
    """Yield the file's keys, to be changed; the file is replaced as a whole, by one process at a time."""
    try:
        with (path.parent / f".{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = list(read_keys(path)) if path.exists() else []
            yield keys
            handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)  # readable by its owner alone
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(_File(keys=tuple(keys)).model_dump_json(indent=1, exclude_none=True) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                if path.exists():
                    _keep_owner(path, name)
                os.replace(name, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(name)
                raise
    except OSError as error:
        raise KeysError(f"{path} cannot be changed: {error.strerror}") from None


def _keep_owner(path: Path, name: str) -> None:
    """Keep a file that a service of another user reads readable to it."""
    status = path.stat()
    os.chmod(name, status.st_mode & 0o777)
    with suppress(PermissionError):
        os.chown(name, status.st_uid, status.st_gid)
