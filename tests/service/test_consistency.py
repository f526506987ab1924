"""What a search sees while something is written: nothing goes missing, and nothing comes back."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from service.store import Entry, Rules, SqliteStore, Wanted, parse
from tests.service.fakes import fake_manifest, vector_of
from tests.service.stores import in_store, sqlite

WORDS = parse({"words": {"$contains": "harbour"}})
KINDS = {
    "vector": lambda store: store.search("default", vector_of("q")[None], 5, with_vector=True),
    "contains": lambda store: store.search("default", vector_of("q")[None], 5, filter=WORDS),
    "long metadata": lambda store: store.search("default", vector_of("q")[None], 5),
    "keywords": lambda store: store.keyword_search("default", "harbour", 5, filter=parse({"n": {"$gte": 0}})),
}


def entry(version):
    return Entry("default", "a", "text", {"n": version, "words": "the harbour " * 100}, vector_of(str(version)), "text")


@asynccontextmanager
async def between_commit_and_index(store, writing):
    """Inside the block the rows are written and the indexes do not show it; that is put right a little later."""
    committed, go_on, apply = threading.Event(), threading.Event(), store._writer._apply

    def applied(changes):
        committed.set()
        assert go_on.wait(30)
        apply(changes)

    store._writer._apply = applied
    write = asyncio.create_task(writing)
    assert await asyncio.to_thread(committed.wait, 30)
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    yield
    go_on.set()
    await write
    store._writer._apply = apply


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replaced_is_found_between_the_commit_and_the_index(tmp_path, kind):
    async def run(store):
        await store.set_keyword_fields("default", ["words"])
        await store.upsert([entry(1)])
        async with between_commit_and_index(store, store.upsert([entry(2)])):
            found = await KINDS[kind](store)
        hits = found if kind == "keywords" else found[0]
        assert [hit.item.id for hit in hits] == ["a"]

    in_store(sqlite, tmp_path, run)


def test_an_index_of_codes_scores_what_it_finds_though_it_is_replaced_just_then(tmp_path):
    async def run():
        store = SqliteStore.open(tmp_path, fake_manifest(), Rules(trained_from=40, graph_from=20))
        await store.create_collection("default", Wanted("hnsw", "int8"))
        await store.upsert([Entry("default", f"{n}", "text", {}, vector_of(f"{n}")) for n in range(60)])
        assert await store.indexed(300)
        again = [Entry("default", f"{n}", "text", {}, vector_of(f"{n}")) for n in range(30)]
        async with between_commit_and_index(store, store.upsert(again)):
            hits = (await store.search("default", vector_of("3")[None], 60))[0]
        await store.close()
        assert len({hit.item.id for hit in hits}) == 60 and hits[0].item.id == "3"

    asyncio.run(run())


def test_a_search_is_never_older_than_what_was_read_before_it(tmp_path):
    async def run(store):
        await store.upsert([Entry("default", "a", "text", {"n": 1}, vector_of("1"))])
        async with between_commit_and_index(
            store, store.upsert([Entry("default", "a", "text", {"n": 2}, vector_of("2"))])
        ):
            read = await store.get("default", "a")
            [[hit]] = await store.search("default", vector_of("q")[None], 5)
        assert hit.item.metadata["n"] >= read.metadata["n"]

    in_store(sqlite, tmp_path, run)
