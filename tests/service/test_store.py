import asyncio
import json
import sqlite3
import threading
from collections import defaultdict
from contextlib import closing
from dataclasses import replace

import faiss
import numpy as np
import pytest

from service.contract.vectors import l2_normalise
from service.errors import NotReady
from service.store import (
    Effort,
    Entry,
    IndexRequest,
    Rules,
    SpaceMismatch,
    SqliteStore,
    StoreDamaged,
    StoreError,
    StoreInUse,
    VectorSearch,
    kinds,
    parse,
    rows,
    snapshot,
)
from service.store.carry_over import OldStore
from service.store.filters import passes
from service.store.kinds import IndexSnapshot, IndexSpec
from tests.service.fakes import DIMENSIONS, fake_manifest, vector_of
from tests.service.stores import in_sqlite as in_store


def entry(id, metadata=None, *, collection="default", modality="text", of=None):
    return Entry(collection, id, modality, metadata or {}, vector_of(of or id))


SMALL = Rules(flat_up_to=20, trained_from=40, graph_from=20, rest_at_least=10)
"""Indexes of a few vectors."""


def ids(hits):
    return [hit.item.id for hit in hits]


async def everything(store):
    items, more = await store.page(None, None, None, 10_000)
    assert more is None
    return {(item.collection, item.id): (item.modality, item.metadata) for item in items}


def many(count, start=0):
    return [entry(f"{number}", {"n": number}) for number in range(start, start + count)]


async def written(store):
    """A collection with a graph of 60, of which some are gone, and a rest that is in no index."""
    await store.upsert(many(60))
    assert await store.indexed(300)
    await store.upsert([*many(3, start=60), entry("7", {"n": 7}, of="seven")])
    await store.delete("default", ["0", "1"])


async def read_back(store):
    """Assert that what written() left is found, each by its own vector, and that the filter knows it."""
    for number in range(63):
        query = vector_of("seven" if number == 7 else f"{number}")[None]
        hits = (await store.search(VectorSearch("default", query, 61)))[0]
        assert len(hits) == 61
        assert (hits[0].item.id == f"{number}" and abs(hits[0].score - 1) < 1e-6) == (number > 1)
        hits = (await store.search(VectorSearch("default", query, 5, filter=parse({"n": number}))))[0]
        assert ids(hits) == ([f"{number}"] if number > 1 else [])


async def part(store):
    [only] = await store.parts("default")
    return only.kind, only.count, only.indexed


def test_an_index_is_taken_from_its_snapshot_and_brought_up_to_the_rows(tmp_path):
    async def run(store):
        assert await part(store) == ("hnsw", 61, 57)  # before anything is built anew
        await read_back(store)

    in_store(tmp_path, written, rules=SMALL)
    in_store(tmp_path, run, rules=Rules(flat_up_to=20, rest_at_least=1_000))


def test_what_names_a_few_items_costs_the_same_however_many_there_are(tmp_path):
    """Counted in steps of SQLite's virtual machine: a plan that walks a whole index would make ten times as many."""
    slots = np.arange(100, 110)
    ids = [f"{slot}" for slot in slots]
    calls = {
        "slots of ids": lambda connection, key: rows.slots_of_ids(connection, key, ids),
        "slots of prefixes": lambda connection, key: rows.slots_of_prefixes(connection, key, ["100\x1f"]),
        "keys of slots": lambda connection, key: rows.keys_of_slots(connection, key, slots),
        "ids of slots": lambda connection, key: rows.ids_of_slots(connection, key, slots),
        "items by slot": lambda connection, key: rows.items_by_slot(connection, key, "default", set(slots), True),
        "vectors": lambda connection, key: rows.vectors(connection, key, ids),
        "upsert": lambda connection, key: rows.upsert(connection, key, [entry(id) for id in ids], 1_000_000),
        "delete": lambda connection, key: rows.delete(connection, key, slots + 20),
    }

    async def steps(store):
        connection, counts, steps = store._connections[0], {}, [0]  # the writer's, which has nothing to do
        key = rows.existing_collection_key(connection, "default")

        def step():
            steps[0] += 1

        connection.set_progress_handler(step, 1)
        for name, call in calls.items():
            connection.execute("BEGIN")
            steps[0] = 0
            call(connection, key)
            counts[name] = steps[0]
            connection.execute("ROLLBACK")
        connection.set_progress_handler(None, 0)
        return counts

    async def run(store):
        await store.upsert(many(300, start=1))
        before = await steps(store)
        await store.upsert(many(3_000, start=301))
        for name, count in (await steps(store)).items():
            assert count < 1.5 * before[name], name

    in_store(tmp_path, run)


def test_a_write_waits_while_too_many_vectors_wait_for_an_index(tmp_path, monkeypatch):
    """It gives the builder time, and no more than its items are worth: nothing is held up for ever."""
    let, build = threading.Event(), kinds.build

    async def run(store):
        await store.upsert(many(30))
        assert await part(store) == ("flat", 30, 0)  # its time is over, and nothing is built yet
        writing = asyncio.create_task(store.upsert(many(5_000, start=30)))
        while (await part(store))[1] < 5_030:
            assert not writing.done()
        assert not writing.done()
        let.set()
        await writing
        assert (await part(store))[2] >= 5_000

    monkeypatch.setattr(kinds, "build", lambda *arguments: let.wait(60) and build(*arguments))
    in_store(tmp_path, run, rules=replace(SMALL, waiting_at_most=25))


def test_what_a_search_says_of_an_item_is_what_is_stored(tmp_path):
    """A list may be short enough to be held in memory or not, and it and the index around it may have changed."""

    def long_and_short(count, of):
        return [entry(f"{n}é", {"of": of, "text": "long\n" * (300 * (n % 2))}) for n in range(count)]

    async def all_there(store):
        hits = (await store.search(VectorSearch("default", vector_of("x")[None], 100)))[0]
        assert len(hits) == 60
        for hit in hits:
            assert hit.item == await store.get("default", hit.item.id)
        return {hit.item.id: hit.item for hit in hits}

    async def run(store):
        await store.upsert(long_and_short(60, "first"))
        before = await all_there(store)
        assert await store.indexed(300)
        await all_there(store)
        await store.upsert(long_and_short(40, "second"))
        after = await all_there(store)
        assert await store.indexed(300)  # built anew, without the forty that are dead
        assert await part(store) == ("hnsw", 60, 60)
        assert await all_there(store) == after
        assert all(after[id].created == before[id].created for id in before)
        assert {item.metadata["of"] for item in after.values()} == {"first", "second"}

    in_store(tmp_path, run, rules=SMALL)
    in_store(tmp_path, all_there, rules=SMALL)


def test_a_start_takes_metadata_from_the_snapshot_and_what_came_since_from_the_rows(tmp_path, monkeypatch):
    """There are two parts, one without an index; items of both are deleted, replaced and added after the snapshot."""

    def described(first, last, modality="text", of="old"):
        return [entry(f"{modality} {n}", {"n": n, "of": of}, modality=modality) for n in range(first, last)]

    async def write(store):
        await store.upsert(described(0, 60))
        await store.upsert(described(0, 9, "image"))
        assert await store.indexed(300)

    async def change(store):
        await store.upsert(described(60, 64) + described(9, 11, "image"))
        await store.upsert(described(3, 6, of="new") + described(3, 6, "image", of="new"))
        await store.delete("default", ["text 0", "image 0", "text 61"])
        await store.move("default", {"text 10": "moved"})
        return await everything(store)

    async def read(store):
        assert await everything(store) == expected
        for filter in ({"of": "old"}, {"of": "new"}, {"n": {"$lt": 12}}):
            hits = (await store.search(VectorSearch("default", vector_of("x")[None], 100, filter=parse(filter))))[0]
            passing = [key for key, (_, metadata) in expected.items() if passes(parse(filter), metadata)]
            assert sorted(("default", hit.item.id) for hit in hits) == sorted(passing)
            assert all(hit.item.metadata == expected["default", hit.item.id][1] for hit in hits)

    in_store(tmp_path, write, rules=SMALL)
    never = replace(SMALL, rest_at_least=1_000)
    expected = in_store(tmp_path, change, rules=never)
    read_rows, live = [], rows.live
    monkeypatch.setattr(
        rows, "live", lambda *given: (batch for batch in live(*given) if read_rows.extend(batch[0]) is None)
    )
    in_store(tmp_path, read, rules=never)
    assert len(read_rows) < 30


@pytest.mark.parametrize("damage", ["cut", "flip", "slots", "header", "missing file", "foreign", "newer"])
def test_a_damaged_snapshot_is_rebuilt_while_exact_search_answers(tmp_path, damage):
    in_store(tmp_path, written, rules=SMALL)
    [header] = (tmp_path / "snapshot").glob("*.json")
    file = header.with_suffix(".slots.npy" if damage == "slots" else ".faiss")
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage in ("flip", "slots"):
        data[-9] ^= 0xFF
        file.write_bytes(data)
    elif damage == "header":
        header.write_text("{")
    elif damage == "missing file":
        file.unlink()
    else:
        # Of another store; of rows that have since been restored from an older copy.
        other = {"store": "0" * 32} if damage == "foreign" else {"sequence": 10**6}
        header.write_text(json.dumps(json.loads(header.read_text()) | other))

    async def run(store):
        await read_back(store)
        assert await store.indexed(300)
        assert await part(store) == ("hnsw", 61, 61)
        await read_back(store)

    # No index is built in this one: what was damaged is gone, and searched vector by vector.
    in_store(tmp_path, read_back, rules=Rules(flat_up_to=1_000))
    assert list((tmp_path / "snapshot").iterdir()) == []
    in_store(tmp_path, run, rules=SMALL)
    assert len(list((tmp_path / "snapshot").iterdir())) == 4


def test_a_snapshot_from_the_future_of_restored_rows_is_not_used(tmp_path):
    async def first(store):
        await store.upsert(many(60))

    async def second(store):
        await store.upsert([entry(f"{number}", of=f"newer {number}") for number in range(60)])
        assert await store.indexed(300)

    async def read(store):
        for number in range(60):
            hits = (await store.search(VectorSearch("default", vector_of(f"{number}")[None], 1)))[0]
            assert ids(hits) == [f"{number}"] and hits[0].score > 0.999

    in_store(tmp_path, first)
    copy = (tmp_path / "store.sqlite3").read_bytes()
    in_store(tmp_path, second, rules=SMALL)
    assert list((tmp_path / "snapshot").iterdir())
    (tmp_path / "store.sqlite3").write_bytes(copy)
    in_store(tmp_path, read, rules=SMALL)


class TestIndexes:
    def test_auto_takes_a_graph_past_its_size_and_gives_it_up_below_half(self, tmp_path):
        async def run(store):
            await store.upsert(many(20))
            assert await store.indexed(300) and await part(store) == ("flat", 20, 0)
            await store.upsert(many(1, start=20))
            assert await store.indexed(300) and await part(store) == ("hnsw", 21, 21)
            await store.upsert(many(9, start=21))
            assert await store.indexed(300) and await part(store) == ("hnsw", 30, 21)
            await store.upsert(many(1, start=30))
            assert await store.indexed(300) and await part(store) == ("hnsw", 31, 31)  # the rest is taken in
            await store.delete("default", [f"{number}" for number in range(20)])
            assert await store.indexed(300) and await part(store) == ("hnsw", 11, 11)
            await store.delete("default", ["20"])
            assert await store.indexed(300) and await part(store) == ("flat", 10, 0)
            hits = (await store.search(VectorSearch("default", vector_of("25")[None], 20)))[0]
            assert hits[0].item.id == "25" and len(hits) == 10
            assert list((tmp_path / "snapshot").iterdir()) == []

        in_store(tmp_path, run, rules=SMALL)

    def test_auto_takes_codes_where_memory_is_short(self):
        assert Rules(memory=10**9).choose(IndexRequest(), 200_000, 384).precision == "float32"
        assert Rules(memory=10**9).choose(IndexRequest(), 900_000, 384).precision == "int8"
        assert Rules(memory=10**9).choose(IndexRequest(), 2_000_000, 384).kind == "ivf_pq"

    @pytest.mark.parametrize(
        "wanted",
        [
            IndexRequest("hnsw", "float16"),
            IndexRequest("hnsw", "int8"),
            IndexRequest("ivf_pq"),
            IndexRequest("flat"),
        ],
        ids=lambda wanted: f"{wanted.kind} {wanted.precision}",
    )
    def test_a_collection_is_switched_while_it_changes(self, tmp_path, wanted):
        async def run(store):
            await store.upsert(many(400))
            assert await store.indexed(300)
            await store.create_collection("default", wanted)
            changes = [store.upsert([entry(f"{number}", {"n": number}, of=f"new {number}")]) for number in range(40)]
            await asyncio.gather(*changes, store.delete("default", ["50", "51"]))
            assert await store.indexed(300)
            [only] = await store.parts("default")
            assert only.kind == wanted.kind and only.count == 398
            # A tenth may be left to be searched one by one.
            assert only.indexed == 0 if wanted.kind == "flat" else only.indexed > 350
            for number in (0, 39, 40, 399, 50):
                query = vector_of(f"new {number}" if number < 40 else f"{number}")
                # As hard as can be: what is measured elsewhere is how much less will do.
                hits = (
                    await store.search(VectorSearch("default", query[None], 10, effort=Effort(exact=True, rescore=398)))
                )[0]
                assert (hits[0].item.id == f"{number}") == (number != 50)
                scores = {
                    f"{each}": vector_of(f"new {each}" if each < 40 else f"{each}") @ query for each in range(400)
                }
                best = sorted(scores.keys() - {"50", "51"}, key=lambda id: -scores[id])[:10]
                assert ids(hits) == best
                for hit in hits:
                    assert abs(hit.score - scores[hit.item.id]) < 1e-6  # of the stored vector, whatever the codes say
            near = await store.search(VectorSearch("default", vector_of("100")[None], 1))
            assert ids(near[0]) == ["100"]
            with_filter = await store.search(
                VectorSearch("default", vector_of("x")[None], 10, filter=parse({"n": {"$lt": 5}}))
            )
            assert sorted(ids(with_filter[0])) == ["0", "1", "2", "3", "4"]

        async def again(store):
            assert (await part(store))[0] == wanted.kind
            assert ids((await store.search(VectorSearch("default", vector_of("new 7")[None], 1)))[0]) == ["7"]

        in_store(tmp_path, run, rules=SMALL)
        in_store(tmp_path, again, rules=SMALL)

    @pytest.mark.parametrize(
        ("kind", "precision", "factory", "instead"),
        [
            ("ivf_flat", None, "IVF4,Flat", IndexRequest("hnsw")),
            ("ivf_flat", "float16", "IVF4,SQfp16", IndexRequest("hnsw", "float16")),
            ("ivf_opq", None, "OPQ1,IVF4,PQ1np", IndexRequest("ivf_pq")),
            ("sq", None, "SQ8", IndexRequest("hnsw", "int8")),
            ("sq", "float16", "SQfp16", IndexRequest("hnsw", "float16")),
            ("binary", None, "RR8,IVF4,RaBitQ", IndexRequest("ivf_pq")),
        ],
    )
    def test_a_kind_of_index_that_is_gone_is_replaced(self, tmp_path, caplog, kind, precision, factory, instead):
        """A store as an earlier version left it: the kind in its row, and the index in its snapshot."""
        entries, snapshots = many(300), tmp_path / "snapshot"

        async def fill(store):
            await store.upsert(entries)
            return store._id, store._writer.sequence, store._indexes[1].views()["text"].slots[:280].copy()

        async def check(store):
            assert (await store.collection("default")).index_request == instead
            for number in (0, 150, 299):
                near = await store.search(
                    VectorSearch("default", vector_of(f"{number}")[None], 1, effort=Effort(exact=True))
                )
                assert ids(near[0]) == [f"{number}"] and abs(near[0][0].score - 1) < 1e-6

        async def converted(store):
            await check(store)  # by the old index, or by none, or by the new one already
            assert await store.indexed(300)
            await check(store)
            [only] = await store.parts("default")
            assert (only.kind, only.count) == (instead.kind, 300) and only.indexed >= 280

        store, sequence, slots = in_store(tmp_path, fill)
        index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
        vectors = np.stack([each.vector for each in entries[:280]])
        index.train(vectors)
        index.add(vectors)
        chosen = IndexSpec(kind, precision or {"ivf_flat": "float32", "sq": "int8"}.get(kind))
        snapshot.save(snapshots, store, sequence, snapshot.Saved(1, "text", IndexSnapshot(chosen, index, 280), slots))
        with closing(sqlite3.connect(tmp_path / "store.sqlite3")) as connection, connection:
            connection.execute("UPDATE collections SET kind = ?, precision = ?", (kind, precision))
        with closing(OldStore(tmp_path, alone=False)) as old:
            assert [each.index_request for each, _ in old.collections()] == [instead]
        in_store(tmp_path, converted, rules=SMALL)
        assert f"1 collections have an index of kind {kind}, which there is no more: {instead.kind}" in caplog.text
        caplog.clear()
        in_store(tmp_path, converted, rules=SMALL)
        assert "which there is no more" not in caplog.text, "it is said once"

    def test_codes_are_not_asked_where_a_filter_lets_few_through(self, tmp_path):
        rng = np.random.default_rng(0)
        vectors = l2_normalise(rng.standard_normal((2_000, 32)))
        queries = l2_normalise(rng.standard_normal((20, 32)))

        async def run(store):
            await store.create_collection("default", IndexRequest("ivf_pq"))
            entries = [Entry("default", f"{n}", "image", {"n": n % 20}, vector) for n, vector in enumerate(vectors)]
            await store.upsert(entries)
            assert await store.indexed(300)
            found = await store.search(
                VectorSearch("default", queries, 10, filter=parse({"n": 7}), effort=Effort(nprobe=1))
            )
            best = 7 + 20 * np.argsort(-(queries @ vectors[7::20].T), axis=1)[:, :10]
            assert [ids(hits) for hits in found] == best.astype(str).tolist()

        in_store(tmp_path, run, fake_manifest(dimensions=32), rules=SMALL)

    def test_what_comes_while_an_index_is_trained_is_indexed_and_found(self, tmp_path, monkeypatch):
        """The old index takes in what comes meanwhile, so that little is searched one by one, and nothing is lost."""
        rng = np.random.default_rng(0)
        vectors = l2_normalise(rng.standard_normal((1_000, 32)))
        training, taken_in, go_on = threading.Event(), threading.Event(), threading.Event()
        build, extend = kinds.build, kinds.extend
        users = defaultdict(set)

        def held(*arguments):
            training.set()
            assert go_on.wait(60)
            return build(*arguments)

        def extending(*arguments, **options):
            taken_in.set()
            return extend(*arguments, **options)

        def entries(first, last):
            return [Entry("default", f"{n}", "image", {"n": n}, vectors[n]) for n in range(first, last)]

        async def run(store):
            await store.create_collection("default", IndexRequest("ivf_pq"))
            await store.upsert(entries(0, 500))
            assert await store.indexed(300)
            monkeypatch.setattr(kinds, "build", held)
            monkeypatch.setattr(kinds, "extend", extending)
            for connection in store._connections:
                connection.set_trace_callback(lambda _, users=users[connection]: users.add(threading.current_thread()))
            await store.delete("default", [f"{n}" for n in range(150)])  # more than the share: it is built anew
            assert await asyncio.to_thread(training.wait, 60)
            await store.upsert(entries(500, 1_000))
            await store.delete("default", ["500", "999"])
            assert await asyncio.to_thread(taken_in.wait, 60)
            go_on.set()
            assert await store.indexed(300)
            [part] = await store.parts("default")
            assert (part.count, part.indexed) == (848, 848)
            found = await store.search(
                VectorSearch("default", vectors[[150, 300, 998]], 1, filter=parse({"n": {"$gte": 60}}))
            )
            assert [ids(hits) for hits in found] == [["150"], ["300"], ["998"]]
            assert not (await store.search(VectorSearch("default", vectors[[999]], 1, filter=parse({"n": 999}))))[0]
            # Python 3.12 gives threads that share a connection rows of each other.
            assert all(len({thread.name for thread in threads}) <= 1 for threads in users.values()), users
            assert any(thread.name == "store-training" and thread.daemon for [thread, *_] in map(list, users.values()))

        in_store(tmp_path, run, fake_manifest(dimensions=32), rules=SMALL)

    def test_no_index_that_waits_to_be_saved_outlives_its_part(self, tmp_path, monkeypatch):
        """It grew by little, so that it is saved later; by then its part has no index, and its rows other numbers."""
        building, go_on, build = threading.Event(), threading.Event(), kinds.build

        def held(*arguments):
            building.set()
            assert go_on.wait(60)
            return build(*arguments)

        def of(collection, *numbers):
            return [Entry(collection, f"{n}", "text", {"n": n}, vector_of(f"{n}")) for n in range(*numbers)]

        async def run(store):
            await store.upsert(of("grown", 320))
            assert await store.indexed(300)
            await store.delete("grown", ["0", "1"])
            monkeypatch.setattr(kinds, "build", held)
            await store.upsert([*of("grown", 320, 330), *of("default", 60)])
            assert await asyncio.to_thread(building.wait, 60)
            await store.upsert(of("grown", 330, 335))
            await store.create_collection("grown", IndexRequest("flat"))
            go_on.set()
            assert await store.indexed(300)

        async def read(store):
            for n in range(2, 335, 37):
                [hits] = await store.search(VectorSearch("grown", vector_of(f"{n}")[None], 1, filter=parse({"n": n})))
                assert ids(hits) == [f"{n}"]

        in_store(tmp_path, run, rules=replace(SMALL, rest_at_most=10))
        in_store(tmp_path, read, rules=SMALL)

    def test_effort_travels_with_the_call(self, tmp_path):
        """A search with little effort misses what one with much finds, also while both run at once."""
        rng = np.random.default_rng(0)
        vectors = l2_normalise(rng.standard_normal((1_000, 32)))
        queries = l2_normalise(rng.standard_normal((40, 32)))
        best = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]

        async def recall(store, effort):
            found = await store.search(VectorSearch("default", queries, 10, effort=effort))
            return np.mean(
                [len(set(ids(hits)) & set(map(str, row))) / 10 for hits, row in zip(found, best, strict=True)]
            )

        async def run(store):
            await store.create_collection("default", IndexRequest("ivf_pq"))
            await store.upsert([Entry("default", f"{n}", "image", {}, vector) for n, vector in enumerate(vectors)])
            assert await store.indexed(300)
            little, much = Effort(nprobe=1, rescore=1_000), Effort(nprobe=1_000, rescore=1_000)
            found = await asyncio.gather(*(recall(store, effort) for effort in (little, much) * 4))
            assert found[1::2] == [1.0] * 4 and len(set(found[::2])) == 1 and found[0] < 0.8
            await store.create_collection("default", IndexRequest("hnsw"))
            assert await store.indexed(300)
            assert await recall(store, Effort(ef_search=10)) < await recall(store, Effort(ef_search=500))

        in_store(tmp_path, run, fake_manifest(dimensions=32), rules=SMALL)


def test_a_refused_store_is_left_as_it_was(tmp_path):
    async def write(store):
        await store.upsert([entry("a")])

    in_store(tmp_path, write)
    with pytest.raises(SpaceMismatch, match="Nothing in it was changed or deleted") as refusal:
        SqliteStore.open(tmp_path, fake_manifest("another"))
    assert str(tmp_path) in str(refusal.value)
    assert in_store(tmp_path, everything) == {("default", "a"): ("text", {})}


class TestOpening:
    def test_twice_at_once_is_refused(self, tmp_path):
        async def again(store):
            with pytest.raises(StoreInUse, match="open in another process"):
                SqliteStore.open(tmp_path, fake_manifest())

        in_store(tmp_path, again)

    def test_a_file_that_is_no_database(self, tmp_path):
        (tmp_path / "store.sqlite3").write_bytes(b"not a database" * 1000)
        with pytest.raises(StoreDamaged, match="cannot be read"):
            SqliteStore.open(tmp_path, fake_manifest())

    def test_a_path_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="cannot be written"):
            SqliteStore.open(tmp_path / "file", fake_manifest())

    def test_another_schema_version(self, tmp_path):
        in_store(tmp_path, everything)
        connection = sqlite3.connect(tmp_path / "store.sqlite3")
        with connection:
            connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
        connection.close()
        with pytest.raises(StoreDamaged, match="schema version 99"):
            SqliteStore.open(tmp_path, fake_manifest())

    def test_a_stored_vector_of_another_length(self, tmp_path):
        async def write(store):
            await store.upsert([entry("a")])

        in_store(tmp_path, write)
        connection = sqlite3.connect(tmp_path / "store.sqlite3")
        with connection:
            connection.execute("UPDATE vectors SET vector = x'00'")
        connection.close()
        with pytest.raises(StoreDamaged, match=f"{DIMENSIONS} dimensions"):
            SqliteStore.open(tmp_path, fake_manifest())


def test_a_failing_disk_is_reported_and_the_store_lives_on(tmp_path):
    async def run(store):
        await store.upsert([entry("a")])
        blocker = sqlite3.connect(tmp_path / "store.sqlite3")
        pages = blocker.execute("PRAGMA page_count").fetchone()[0]
        blocker.close()
        writing = store._connections[0]
        writing.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own "disk full"
        with pytest.raises(NotReady, match="nothing of this request was stored"):
            await store.upsert([entry(f"{number}", {"long": "x" * 10_000}) for number in range(100)])
        writing.execute(f"PRAGMA max_page_count = {pages + 10_000}")
        await store.upsert([entry("b")])
        assert sorted(id for _, id in await everything(store)) == ["a", "b"]

    in_store(tmp_path, run)


def test_what_was_deleted_or_replaced_is_forgotten_where_there_is_no_index(tmp_path):
    async def run(store):
        for turn in range(8):
            await store.upsert([entry(f"{n}", {f"{turn} {n}": n}, of=f"{turn} {n}") for n in range(8)])
        assert await store.indexed(300)
        view = store._indexes[1].views()["text"]
        assert view.count - view.dead == 8 and view.count <= 8 + max(SMALL.graph_from, view.count * SMALL.dead_share)
        [hits] = await store.search(VectorSearch("default", vector_of("7 3")[None], 20, filter=parse({"7 3": 3})))
        assert ids(hits) == ["3"] and hits[0].score > 0.99
        await store.delete("default", [f"{n}" for n in range(8)])
        assert await store.indexed(300)
        view = store._indexes[1].views()["text"]
        assert (view.count, view.columns.nbytes(), view.blocks) == (0, 0, ())
        await store.upsert([entry("again")])
        assert ids((await store.search(VectorSearch("default", vector_of("again")[None], 5)))[0]) == ["again"]

    in_store(tmp_path, run, rules=SMALL)


def test_a_start_reads_large_metadata_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("service.store.rows._FETCHED", 4)
    monkeypatch.setattr("service.store.rows._BATCH_BYTES", 10_000)

    async def write(store):
        await store.upsert([entry(f"{n}", {"n": n, "text": "x" * 2_000}) for n in range(30)])

    async def read(store):
        batches = list(rows.live(store._connections[0], 1))
        assert [n for _, _, metadata, _ in batches for n in (held["n"] for held in metadata)] == list(range(30))
        assert max(len(metadata) for _, _, metadata, _ in batches) <= 8
        found = await store.search(VectorSearch("default", vector_of("7")[None], 1, filter=parse({"n": 7})))
        assert ids(found[0]) == ["7"]

    in_store(tmp_path, write)
    in_store(tmp_path, read)
