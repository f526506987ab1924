"""Both stores, for the tests of what holds of either: `@both`, and `in_store(open_store, path, use)`."""

import asyncio

import pytest

from service.store import SqliteStore
from service.store.milvus import MilvusStore
from tests.service.fakes import fake_manifest


def sqlite(path, manifest):
    return SqliteStore.open(path / "sqlite", manifest)


def milvus(path, manifest):
    """Through Milvus Lite, in this process."""
    return MilvusStore.open(str(path / "milvus.db"), None, 30, manifest)


both = pytest.mark.parametrize("open_store", [sqlite, milvus])


def in_store(open_store, path, use, manifest=None):
    """Open a store, run `use` with it, close it."""

    async def run():
        store = open_store(path, manifest or fake_manifest())
        try:
            return await use(store)
        finally:
            await store.close()

    return asyncio.run(run())


def in_sqlite(path, use, manifest=None, rules=None):
    """Do the same with a SQLite store in this folder."""
    return in_store(lambda path, manifest: SqliteStore.open(path, manifest, rules), path, use, manifest)
