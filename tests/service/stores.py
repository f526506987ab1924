"""Both stores, for the tests of what holds of either: `@both` with `@on_a_store()`, or with `in_store(…)`."""

import asyncio
import inspect

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


def on_a_store(kind=None):
    """Run an asynchronous test with `store`: an open one of the kind that @both names, unless a kind is given."""

    def decorate(test):
        asked = inspect.signature(test).parameters
        fixtures = {*asked, "tmp_path", *([] if kind else ["open_store"])} - {"store"}
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in sorted(fixtures)]

        def run(**made):
            def use(store):
                return test(**{name: store if name == "store" else made[name] for name in asked})

            in_store(kind or made["open_store"], made["tmp_path"], use)

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        run.__signature__ = inspect.Signature(parameters)
        return run

    return decorate


def in_sqlite(path, use, manifest=None, rules=None):
    """Do the same with a SQLite store in this folder."""
    return in_store(lambda path, manifest: SqliteStore.open(path, manifest, rules), path, use, manifest)
