import asyncio
import json
import sqlite3
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.vectors import l2_normalise
from service.errors import NotFound, NotReady
from service.store import Entry, SpaceMismatch, Store, StoreDamaged, StoreError, StoreInUse
from tests.service.fakes import DIMENSIONS, fake_manifest, vector_of


def entry(id, metadata=None, *, collection="default", modality="text", of=None):
    return Entry(collection, id, modality, metadata or {}, vector_of(of or id))


def ids(hits):
    return [hit.item.id for hit in hits]


def in_store(path, use, manifest=None):
    """Open a store, run `use` with it, close it."""

    async def run():
        store = Store.open(path, manifest or fake_manifest())
        try:
            return await use(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def everything(store):
    items, more = await store.page(None, None, None, 10_000)
    assert more is None
    return {(item.collection, item.id): (item.modality, item.metadata) for item in items}


def test_what_was_written_is_there_after_a_restart(tmp_path):
    async def write(store):
        await store.upsert([entry("a", {"n": 1}), entry("b", modality="image"), entry("c", collection="other")])
        await store.upsert([entry("b", {"new": True}, of="b2")])
        await store.delete("default", ["a", "never there"])

    async def read(store):
        found = await store.search("default", vector_of("b2")[None], 10)
        assert ids(found[0]) == ["b"] and abs(found[0][0].score - 1) < 1e-6
        kept = await store.get("default", "b", with_vector=True)
        assert kept.metadata == {"new": True} and np.array_equal(kept.vector, vector_of("b2"))
        assert ids((await store.search("other", vector_of("c")[None], 10))[0]) == ["c"]
        return await everything(store)

    in_store(tmp_path, write)
    assert in_store(tmp_path, read) == {("default", "b"): ("text", {"new": True}), ("other", "c"): ("text", {})}
    (tmp_path / "snapshot" / "snapshot.json").unlink()
    assert len(in_store(tmp_path, read)) == 2


@pytest.mark.parametrize("damage", ["cut", "flip", "header", "missing file", "foreign"])
def test_a_damaged_snapshot_is_rebuilt(tmp_path, damage):
    async def write(store):
        await store.upsert([entry(f"{number}") for number in range(50)])

    async def read(store):
        return [(await store.search("default", vector_of(f"{number}")[None], 3))[0] for number in range(50)]

    in_store(tmp_path, write)
    before = in_store(tmp_path, read)
    directory = tmp_path / "snapshot"
    header = directory / "snapshot.json"
    [file] = directory.glob("*.faiss")
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)
    elif damage == "header":
        header.write_text("{")
    elif damage == "missing file":
        file.unlink()
    else:
        header.write_text(json.dumps(json.loads(header.read_text()) | {"store": "0" * 32}))
    after = in_store(tmp_path, read)
    assert [[(hit.item.id, hit.score) for hit in hits] for hits in after] == [
        [(hit.item.id, hit.score) for hit in hits] for hits in before
    ]
    assert all(hits[0].item.id == f"{number}" for number, hits in enumerate(after))


def test_rows_written_after_the_snapshot_are_replayed_over_it(tmp_path):
    """The snapshot of an older state beside newer rows, as a killed process leaves it."""

    async def first(store):
        await store.upsert([entry("kept"), entry("changed"), entry("gone")])

    async def second(store):
        await store.upsert([entry("changed", of="other"), entry("added", modality="image")])
        await store.delete("default", ["gone"])
        await store.create_collection("later")

    async def read(store):
        for name, of in (("kept", "kept"), ("changed", "other"), ("added", "added")):
            hits = (await store.search("default", vector_of(of)[None], 10))[0]
            assert hits[0].item.id == name and abs(hits[0].score - 1) < 1e-6
            assert sorted(ids(hits)) == ["added", "changed", "kept"]
        assert (await store.search("later", vector_of("x")[None], 10)) == [[]]

    in_store(tmp_path, first)
    older = {file.name: file.read_bytes() for file in (tmp_path / "snapshot").iterdir()}
    in_store(tmp_path, second)
    for file in (tmp_path / "snapshot").iterdir():
        file.unlink()
    for name, data in older.items():
        (tmp_path / "snapshot" / name).write_bytes(data)
    in_store(tmp_path, read)


def test_a_snapshot_from_the_future_of_restored_rows_is_not_used(tmp_path):
    async def first(store):
        await store.upsert([entry("a")])

    async def second(store):
        await store.upsert([entry("a", of="newer")])

    async def read(store):
        assert (await store.search("default", vector_of("a")[None], 1))[0][0].score > 0.999

    in_store(tmp_path, first)
    copy = (tmp_path / "store.sqlite3").read_bytes()
    in_store(tmp_path, second)
    (tmp_path / "store.sqlite3").write_bytes(copy)
    in_store(tmp_path, read)


class TestSpaces:
    def test_a_store_of_another_space_is_refused(self, tmp_path):
        async def write(store):
            await store.upsert([entry("a")])

        in_store(tmp_path, write)
        with pytest.raises(SpaceMismatch, match=r"store directory and index the items again") as refusal:
            Store.open(tmp_path, fake_manifest("another"))
        assert fake_manifest().space in str(refusal.value) and str(tmp_path) in str(refusal.value)
        in_store(tmp_path, everything)  # it was left as it was, and let go of

    def test_an_admitted_space_takes_the_store_over(self, tmp_path):
        old = fake_manifest()
        new = fake_manifest("newer", admits=(old.space,))

        async def write(store):
            await store.upsert([entry("a")])

        async def read(store):
            assert (await store.collection("default")).space == new.space
            return await everything(store)

        in_store(tmp_path, write, old)
        assert in_store(tmp_path, read, new) == {("default", "a"): ("text", {})}
        with pytest.raises(SpaceMismatch):
            Store.open(tmp_path, old)

    def test_an_empty_store_takes_any_space(self, tmp_path):
        in_store(tmp_path, everything)

        async def read(store):
            return (await store.collection("default")).dimensions

        assert in_store(tmp_path, read, fake_manifest("wider", dimensions=16)) == 16


class TestOpening:
    def test_twice_at_once_is_refused(self, tmp_path):
        async def again(store):
            with pytest.raises(StoreInUse, match="open in another process"):
                Store.open(tmp_path, fake_manifest())

        in_store(tmp_path, again)

    def test_a_file_that_is_no_database(self, tmp_path):
        (tmp_path / "store.sqlite3").write_bytes(b"not a database" * 1000)
        with pytest.raises(StoreDamaged, match="cannot be read"):
            Store.open(tmp_path, fake_manifest())

    def test_a_path_that_is_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="cannot be written"):
            Store.open(tmp_path / "file", fake_manifest())

    def test_another_schema_version(self, tmp_path):
        in_store(tmp_path, everything)
        connection = sqlite3.connect(tmp_path / "store.sqlite3")
        with connection:
            connection.execute("UPDATE meta SET value = '99' WHERE name = 'schema'")
        connection.close()
        with pytest.raises(StoreDamaged, match="schema version 99"):
            Store.open(tmp_path, fake_manifest())

    def test_a_stored_vector_of_another_length(self, tmp_path):
        async def write(store):
            await store.upsert([entry("a")])

        in_store(tmp_path, write)
        (tmp_path / "snapshot" / "snapshot.json").unlink()
        connection = sqlite3.connect(tmp_path / "store.sqlite3")
        with connection:
            connection.execute("UPDATE items SET vector = x'00'")
        connection.close()
        with pytest.raises(StoreDamaged, match=f"{DIMENSIONS} dimensions"):
            Store.open(tmp_path, fake_manifest())


def test_a_closed_store_refuses_and_is_not_ready(tmp_path):
    async def run():
        store = Store.open(tmp_path, fake_manifest())
        assert store.ready()
        await store.close()
        await store.close()
        assert not store.ready()
        with pytest.raises(NotReady):
            await store.upsert([entry("a")])
        with pytest.raises(NotReady):
            await store.get("default", "a")

    asyncio.run(run())


def test_a_write_that_fails_is_undone_alone(tmp_path):
    """A batch with metadata that cannot be JSON fails whole; what shares its commit stands."""

    async def run(store):
        outcomes = await asyncio.gather(
            store.upsert([entry("a")]),
            store.upsert([entry("b"), entry("c", {"x": float("nan")})]),
            store.upsert([entry("d")]),
            store.drop_collection("never"),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [type(None), ValueError, type(None), NotFound]
        assert sorted(id for _, id in await everything(store)) == ["a", "d"]
        assert sorted(ids((await store.search("default", vector_of("b")[None], 10))[0])) == ["a", "d"]

    in_store(tmp_path, run)


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


def test_pages_have_a_stable_order_while_items_change(tmp_path):
    async def run(store):
        await store.upsert([entry(f"{number}", collection="pages") for number in range(10)])
        await store.upsert([entry("elsewhere"), entry("image", modality="image", collection="pages")])
        first, at = await store.page("pages", "text", None, 4)
        await store.upsert([entry("0", {"changed": 1}, collection="pages")])
        await store.delete("pages", ["5"])
        second, at = await store.page("pages", "text", at, 4)
        third, end = await store.page("pages", "text", at, 4)
        assert [item.id for item in (*first, *second, *third)] == ["0", "1", "2", "3", "4", "6", "7", "8", "9"]
        assert end is None
        assert [item.id for item in (await store.page("pages", "image", None, 4))[0]] == ["image"]
        with pytest.raises(NotFound):
            await store.page("never", None, None, 4)

    in_store(tmp_path, run)


def test_collections_come_and_go(tmp_path):
    async def run(store):
        assert await store.create_collection("new") is True
        assert await store.create_collection("new") is False
        await store.upsert([entry("a", collection="new"), entry("b", collection="made by a write")])
        held = {each.name: each.count for each in await store.collections()}
        assert held == {"default": 0, "new": 1, "made by a write": 1}
        await store.drop_collection("new")
        for missing in (
            store.search("new", vector_of("a")[None], 1),
            store.get("new", "a"),
            store.collection("new"),
            store.delete("new", ["a"]),
            store.drop_collection("new"),
        ):
            with pytest.raises(NotFound, match="no collection 'new'"):
                await missing
        await store.create_collection("new")
        assert (await store.search("new", vector_of("a")[None], 1)) == [[]]

    in_store(tmp_path, run)


def test_searches_during_writes_find_every_item_that_is_never_touched(tmp_path):
    async def run(store):
        still = [entry(f"still {number}") for number in range(20)]
        await store.upsert(still)

        async def churn(worker):
            for turn in range(20):
                await store.upsert([entry(f"churn {worker}", {"turn": turn}, of=f"{worker} {turn}")])
            await store.delete("default", [f"churn {worker}"])

        async def look():
            for _ in range(30):
                found = ids((await store.search("default", still[0].vector[None], 100))[0])
                assert len(found) == len(set(found))
                assert {each.id for each in still} <= set(found)

        await asyncio.gather(*(churn(worker) for worker in range(4)), *(look() for _ in range(3)))
        assert set(await everything(store)) == {("default", each.id) for each in still}

    in_store(tmp_path, run)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([0, 1, 0.0, 1.0, -0.0, 0.1, "0", "1", "", "true", "null"])
    | st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
)
names = st.sampled_from(["a", "b", 'q"uote', "back\\slash", "$.a", "a.b", "[0]", "", "é"])
metadata = st.dictionaries(names, scalars | st.lists(scalars, max_size=2) | st.dictionaries(names, scalars, max_size=1))


def equal(held, wanted):
    """Equality of JSON scalars: a boolean is no number, and 1 is 1.0."""
    if isinstance(held, bool) or isinstance(wanted, bool) or held is None or wanted is None:
        return held is wanted
    return type(held) in (int, float, str) and held == wanted


def passes(held, filter):
    return all(
        name in held and any(equal(held[name], each) for each in (wanted if isinstance(wanted, list) else [wanted]))
        for name, wanted in filter.items()
    )


VALUES = [None, True, False, 0, 1, -0.0, 1.0, 0.1, 0.1 + 0.2, "", "1", "true", "null", [1], [True], {"a": 1}, {}]


def test_every_kind_of_value_against_every_other(tmp_path):
    async def run(store):
        await store.upsert([entry(f"{place}", {"a": value}) for place, value in enumerate(VALUES)])
        for wanted in VALUES[:13]:
            found = (await store.search("default", vector_of("x")[None], 100, filter={"a": wanted}))[0]
            expected = {f"{place}" for place, value in enumerate(VALUES) if passes({"a": value}, {"a": wanted})}
            assert set(ids(found)) == expected, wanted

    in_store(tmp_path, run)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), held=st.lists(metadata, min_size=1, max_size=12))
def test_a_filtered_search_equals_brute_force(tmp_path_factory, data, held):
    # Wanted values come mostly from what is held, so that filters match something.
    some = [value for each in held for value in each.values() if not isinstance(value, list | dict)]
    wanted = st.sampled_from(some) | scalars if some else scalars
    filter = data.draw(st.dictionaries(names, wanted | st.lists(wanted, max_size=3), min_size=1, max_size=2))

    async def run(store):
        await store.upsert([entry(f"{number}", each) for number, each in enumerate(held)])
        query = vector_of("query")
        expected = sorted(
            (f"{number}" for number, each in enumerate(held) if passes(each, filter)),
            key=lambda id: -float(query @ vector_of(id)),
        )
        assert ids((await store.search("default", query[None], 5, filter=filter))[0]) == expected[:5]
        assert await store.delete_matching("default", filter) == len(expected)
        assert len(await everything(store)) == len(held) - len(expected)

    in_store(tmp_path_factory.mktemp("store"), run)


some_ids = st.sampled_from(string.ascii_lowercase[:6])
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("upsert"),
            st.dictionaries(some_ids, st.tuples(st.sampled_from(["text", "image"]), st.integers(0, 9)), min_size=1),
        ),
        st.tuples(st.just("delete"), st.lists(some_ids, min_size=1, max_size=4)),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("drop"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(operations)
def test_any_sequence_of_writes_leaves_what_a_dict_would_hold(tmp_path_factory, sequence):
    path = tmp_path_factory.mktemp("store")

    async def run():
        model = {}
        store = Store.open(path, fake_manifest())
        await store.create_collection("c")
        for operation, argument in sequence:
            if operation == "upsert":
                await store.upsert(
                    [
                        entry(id, {"n": n}, collection="c", modality=kind, of=f"{n}")
                        for id, (kind, n) in argument.items()
                    ]
                )
                model |= argument
            elif operation == "delete":
                assert await store.delete("c", argument) == len(model.keys() & set(argument))
                model = {id: value for id, value in model.items() if id not in argument}
            elif operation == "restart":
                await store.close()
                store = Store.open(path, fake_manifest())
            else:
                await store.drop_collection("c")
                await store.create_collection("c")
                model = {}
        query = l2_normalise(np.ones(DIMENSIONS))
        hits = (await store.search("c", query[None], 100))[0]
        held = {hit.item.id: (hit.item.modality, hit.item.metadata["n"]) for hit in hits}
        assert held == model and len(hits) == len(model)
        for hit in hits:
            assert abs(hit.score - float(query @ vector_of(f"{hit.item.metadata['n']}"))) < 1e-6
        await store.close()

    asyncio.run(run())
