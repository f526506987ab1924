"""A call to Milvus has a deadline, does not block the event loop, and fails with one of three exceptions."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from service.errors import NotReady
from service.store.errors import StoreError

_CALLS = 16
"""Largest number of calls that a process has under way."""
_GRACE_S = 1.0
"""Seconds that a call gets to notice its own deadline before its waiter is answered without it."""
_NO_COLLECTION, _NOT_LOADED = (100, 4), 101
"""Error codes of Milvus, of current versions and of those before 2.3."""
NO_ANSWER = "the store does not answer"

_log = logging.getLogger(__name__)


class NoCollection(Exception):
    """Raised where Milvus has no such collection."""


class NotLoaded(Exception):
    """Raised where Milvus has the collection on disk but not in memory, because it was restarted."""


class Connection:
    def __init__(self, uri: str, token: str | None, timeout_s: float) -> None:
        """Raises StoreError where pymilvus is not installed, or no Milvus answers there in time."""
        try:
            from pymilvus import MilvusClient
        except ImportError:
            raise StoreError(
                "ISTHMUS_STORE is milvus, and pymilvus is not installed: pip install 'isthmus[milvus]'"
            ) from None
        # Failures are logged here, in one line.
        for name in ("pymilvus", "pymilvus.milvus_client"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        if uri.endswith(".db"):
            logging.getLogger("grpc._server").setLevel(logging.CRITICAL)
        self._timeout_s = timeout_s
        self._closed = False
        self.embedded = uri if uri.endswith(".db") else None
        """The directory of a Milvus Lite in this process."""
        self._threads = ThreadPoolExecutor(_CALLS, thread_name_prefix="milvus")
        # Milvus Lite is not safe for concurrent writers.
        self._writers = asyncio.Semaphore(1 if self.embedded else _CALLS)
        try:
            self._client = MilvusClient(uri, token=token or "", timeout=timeout_s, dedicated=True)
        except Exception as error:
            reason = "cannot be opened" if self.embedded else "does not answer"
            raise StoreError(f"ISTHMUS_MILVUS_URI {_shown(uri)!r}: the Milvus there {reason}: {error}") from None

    @property
    def client(self) -> Any:
        """Return the client for work without a deadline: schemas and index parameters are put together in memory."""
        return self._client

    async def read(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of pymilvus.MilvusClient. Raises NoCollection, NotLoaded, NotReady."""
        return await self._in_thread(partial(self.call_now, method, *args, **options))

    async def write(self, method: str, *args: Any, **options: Any) -> Any:
        async with self._writers:
            return await self.read(method, *args, **options)

    async def next(self, iterator: Any) -> Sequence[dict[str, Any]]:
        """Return the next rows of what `query_iterator` gave; empty at the end."""
        return list(await self._in_thread(partial(self._guarded, iterator.next)))

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=True)
        self._client.close()
        if self.embedded:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.embedded)

    async def _in_thread(self, work: Any) -> Any:
        if self._closed:
            raise NotReady("the store is closed")
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            # The call has its own deadline; this one is for the case that all threads wait for a silent Milvus.
            return await asyncio.wait_for(running, self._timeout_s + _GRACE_S)
        except TimeoutError:
            _log.error("Milvus has not answered for %s s", self._timeout_s)
            raise NotReady(NO_ANSWER) from None

    def call_now(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of pymilvus.MilvusClient and block. Raises NoCollection, NotLoaded, NotReady."""
        return self._guarded(partial(getattr(self._client, method), *args, timeout=self._timeout_s, **options))

    def _guarded(self, work: Any) -> Any:
        import grpc  # type: ignore[import-untyped]
        from pymilvus import MilvusException

        try:
            return work()
        except MilvusException as error:
            if error.code in _NO_COLLECTION or error.compatible_code in _NO_COLLECTION:
                raise NoCollection from None
            if error.code == _NOT_LOADED:
                raise NotLoaded from None
            _log.error("Milvus: %s", error)
            raise NotReady(NO_ANSWER) from None
        except grpc.RpcError as error:
            _log.error("Milvus: %r", error)
            raise NotReady(NO_ANSWER) from None


def _shown(uri: str) -> str:
    """Return the address without a password."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
