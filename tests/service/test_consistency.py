"""A search sees a whole state while something is written: nothing goes missing, and nothing comes back."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from service.store import Entry, IndexRequest, KeywordSearch, Moment, Rules, SqliteStore, VectorSearch, parse
from tests.conftest import on_a_loop
from tests.service.fakes import fake_manifest, vector_of
from tests.service.stores import on_a_store, sqlite

NUMBERED = parse({"n": {"$gte": 0}})
WORDS = parse({"words": {"$contains": "harbour"}})
KINDS = {
    "vector": lambda store: store.search(VectorSearch("default", vector_of("q")[None], 5, with_vector=True)),
    "contains": lambda store: store.search(VectorSearch("default", vector_of("q")[None], 5, filter=WORDS)),
    "long metadata": lambda store: store.search(VectorSearch("default", vector_of("q")[None], 5)),
    "keywords": lambda store: store.keyword_search(
        KeywordSearch("default", "harbour", 5, filter=parse({"n": {"$gte": 0}}))
    ),
}


def entry(version):
    return Entry("default", "a", "text", {"n": version, "words": "the harbour " * 100}, vector_of(str(version)), "text")


@asynccontextmanager
async def between_commit_and_index(store, writing, shown=0):
    """Inside the block the rows are written and the indexes show so many of the changes; the others a little later."""
    committed, go_on, apply = threading.Event(), threading.Event(), store._writer._apply

    def applied(changes):
        apply(changes[:shown])
        committed.set()
        assert go_on.wait(30)
        apply(changes[shown:])

    store._writer._apply = applied
    write = asyncio.create_task(writing)
    assert await asyncio.to_thread(committed.wait, 30)
    asyncio.get_running_loop().call_later(0.05, go_on.set)
    yield
    go_on.set()
    await write
    store._writer._apply = apply


@pytest.mark.parametrize("kind", KINDS)
@on_a_store(sqlite)
async def test_what_is_replaced_is_found_between_the_commit_and_the_index(store, kind):
    await store.set_keyword_fields("default", ["words"])
    await store.upsert([entry(1)])
    async with between_commit_and_index(store, store.upsert([entry(2)])):
        found = await KINDS[kind](store)
    hits = found if kind == "keywords" else found[0]
    assert [hit.item.id for hit in hits] == ["a"]


@on_a_loop
async def test_an_index_of_codes_scores_what_it_finds_though_it_is_replaced_just_then(tmp_path):
    store = SqliteStore.open(tmp_path, fake_manifest(), Rules(trained_from=40, graph_from=20))
    await store.create_collection("default", IndexRequest("hnsw", "int8"))
    await store.upsert([Entry("default", f"{n}", "text", {}, vector_of(f"{n}")) for n in range(60)])
    assert await store.indexed(300)
    again = [Entry("default", f"{n}", "text", {}, vector_of(f"{n}")) for n in range(30)]
    async with between_commit_and_index(store, store.upsert(again)):
        hits = (await store.search(VectorSearch("default", vector_of("3")[None], 60)))[0]
    await store.close()
    assert len({hit.item.id for hit in hits}) == 60 and hits[0].item.id == "3"


@on_a_store(sqlite)
async def test_a_search_is_never_older_than_what_was_read_before_it(store):
    await store.upsert([Entry("default", "a", "text", {"n": 1}, vector_of("1"))])
    async with between_commit_and_index(store, store.upsert([Entry("default", "a", "text", {"n": 2}, vector_of("2"))])):
        read = await store.get("default", "a")
        [[hit]] = await store.search(VectorSearch("default", vector_of("q")[None], 5))
    assert hit.item.metadata["n"] >= read.metadata["n"]


def video(of, *moments, id="v"):
    found = tuple(Moment("image", n, n + 1.0, vector_of(each)) for n, each in enumerate(moments))
    return Entry("default", id, "video", {"of": of}, vector_of(of), moments=found)


@pytest.mark.parametrize("shown", [0, 1, 2])
@pytest.mark.parametrize("with_vector", [False, True])
@on_a_store(sqlite)
async def test_a_video_is_found_by_no_moment_of_another_file(store, shown, with_vector):
    await store.upsert([video("first", "a", "b")])
    async with between_commit_and_index(store, store.upsert([video("second", "c")]), shown):
        [[hit]] = await store.search(VectorSearch("default", vector_of("a")[None], 5, with_vector=with_vector))
    assert (hit.item.metadata["of"], hit.score > 0.99) in (("first", True), ("second", False))


@on_a_store(sqlite)
async def test_a_video_and_its_moments_are_written_and_deleted_in_one_commit(store):
    async def commits(writing):
        before = store._writer.sequence
        await writing
        return store._writer.sequence - before

    assert await commits(store.upsert([video("first", "a", "b"), video("x", "y", id="w")])) == 1
    assert await commits(store.upsert([video("second", "c")])) == 1
    assert len((await store.page(".moments.default", None, None, 10))[0]) == 2
    assert await commits(store.delete("default", ["v"])) == 1
    assert [item.id[0] for item in (await store.page(".moments.default", None, None, 10))[0]] == ["w"]
    assert await commits(store.delete_matching("default", parse({"of": "x"}))) == 1
    assert (await store.page(".moments.default", None, None, 10))[0] == []
    await store.upsert([video("first", "a")])
    assert await commits(store.drop_collection("default")) == 1
    assert await store.collections() == []


@on_a_store(sqlite)
async def test_of_writes_that_race_the_last_one_leaves_its_moments_alone(store):
    for turn in range(10):
        writes = [store.upsert([video(f"{turn} {n}", f"{turn} {n} a", f"{turn} {n} b")]) for n in range(4)]
        await asyncio.gather(*writes, store.delete("default", ["v"]))
        held = {item.metadata["of"] for item in (await store.page(None, None, None, 10))[0]}
        of = [item.metadata["of"] for item in (await store.page(".moments.default", None, None, 100))[0]]
        assert set(of) == held and len(of) == 2 * len(held)
