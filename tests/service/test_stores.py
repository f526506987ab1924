"""These hold of either store: SQLite, and Milvus (through Milvus Lite)."""

import asyncio
import re
import string
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.vectors import l2_normalise
from service.errors import InvalidRequest, NotFound, NotReady
from service.store import Entry, IndexRequest, Moment, SpaceMismatch, VectorSearch, parse
from tests.conftest import on_a_loop
from tests.service.fakes import DIMENSIONS, fake_manifest, vector_of
from tests.service.stores import both, in_store, on_a_store

pytestmark = both


def entry(id, metadata=None, *, collection="default", modality="text", of=None):
    return Entry(collection, id, modality, metadata or {}, vector_of(of or id))


def ids(hits):
    return [hit.item.id for hit in hits]


def words(message):
    return set(re.findall(r"\w+", str(message)))


async def everything(store):
    items, more = await store.page(None, None, None, 10_000)
    assert more is None
    return {(item.collection, item.id): (item.modality, item.metadata) for item in items}


def test_what_was_written_is_there_after_a_restart(open_store, tmp_path):
    async def write(store):
        await store.upsert([entry("a", {"n": 1}), entry("b", modality="image"), entry("c", collection="other")])
        await store.upsert([entry("b", {"new": True}, of="b2")])
        await store.delete("default", ["a", "never there"])

    async def read(store):
        found = await store.search(VectorSearch("default", vector_of("b2")[None], 10))
        assert ids(found[0]) == ["b"] and abs(found[0][0].score - 1) < 1e-6
        kept = await store.get("default", "b", with_vector=True)
        assert kept.metadata == {"new": True} and np.array_equal(kept.vector, vector_of("b2"))
        assert ids((await store.search(VectorSearch("other", vector_of("c")[None], 10)))[0]) == ["c"]
        return await everything(store)

    in_store(open_store, tmp_path, write)
    assert in_store(open_store, tmp_path, read) == {
        ("default", "b"): ("text", {"new": True}),
        ("other", "c"): ("text", {}),
    }


class TestSpaces:
    def test_a_store_of_another_space_is_refused(self, open_store, tmp_path):
        async def write(store):
            await store.upsert([entry("a")])

        in_store(open_store, tmp_path, write)
        for _ in range(2):
            with pytest.raises(SpaceMismatch) as refusal:
                open_store(tmp_path, fake_manifest("another", dimensions=16))
            assert {fake_manifest().space, fake_manifest("another", dimensions=16).space} <= words(refusal.value)
        in_store(open_store, tmp_path, everything)  # it was left as it was, and let go of

    def test_an_admitted_space_takes_the_store_over(self, open_store, tmp_path):
        old = fake_manifest()
        new = fake_manifest("newer", admits=(old.space,))

        async def write(store):
            await store.upsert([entry("a")])

        async def read(store):
            assert (await store.collection("default")).space == new.space
            return await everything(store)

        in_store(open_store, tmp_path, write, old)
        assert in_store(open_store, tmp_path, read, new) == {("default", "a"): ("text", {})}
        with pytest.raises(SpaceMismatch):
            open_store(tmp_path, old)

    def test_an_empty_store_takes_any_space(self, open_store, tmp_path):
        in_store(open_store, tmp_path, everything)

        async def use(store):
            await store.upsert([Entry("default", "a", "text", {}, np.eye(1, 16, dtype=np.float32)[0])])
            assert ids((await store.search(VectorSearch("default", np.eye(1, 16), 1)))[0]) == ["a"]
            return (await store.collection("default")).dimensions

        assert in_store(open_store, tmp_path, use, fake_manifest("wider", dimensions=16)) == 16


@on_a_loop
async def test_a_closed_store_refuses_and_is_not_ready(open_store, tmp_path):
    store = open_store(tmp_path, fake_manifest())
    assert await store.ready()
    await store.close()
    await store.close()
    assert not await store.ready()
    with pytest.raises(NotReady):
        await store.upsert([entry("a")])
    with pytest.raises(NotReady):
        await store.get("default", "a")


@on_a_store()
async def test_a_write_that_fails_is_undone_alone(store):
    """A batch with metadata that cannot be JSON fails whole; what shares its commit stands."""
    outcomes = await asyncio.gather(
        store.upsert([entry("a")]),
        store.upsert([entry("b"), entry("c", {"x": float("nan")})]),
        store.upsert([entry("d")]),
        store.drop_collection("never"),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), ValueError, type(None), NotFound]
    assert sorted(id for _, id in await everything(store)) == ["a", "d"]
    assert sorted(ids((await store.search(VectorSearch("default", vector_of("b")[None], 10)))[0])) == ["a", "d"]


@on_a_store()
async def test_pages_have_a_stable_order_while_items_change(store):
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


@on_a_store()
async def test_collections_come_and_go(store):
    assert await store.create_collection("new") is True
    assert await store.create_collection("new") is False
    await store.upsert([entry("a", collection="new"), entry("b", collection="made by a write")])
    held = {each.name: each.count for each in await store.collections()}
    assert held == {"default": 0, "new": 1, "made by a write": 1}
    await store.drop_collection("new")
    for missing in (
        store.search(VectorSearch("new", vector_of("a")[None], 1)),
        store.get("new", "a"),
        store.collection("new"),
        store.delete("new", ["a"]),
        store.drop_collection("new"),
    ):
        with pytest.raises(NotFound, match="no collection 'new'"):
            await missing
    await store.create_collection("new")
    assert (await store.search(VectorSearch("new", vector_of("a")[None], 1))) == [[]]


@on_a_store()
async def test_searches_during_writes_find_every_item_that_is_never_touched(store):
    still = [entry(f"still {number}") for number in range(20)]
    await store.upsert(still)

    async def churn(worker):
        for turn in range(20):
            await store.upsert([entry(f"churn {worker}", {"turn": turn}, of=f"{worker} {turn}")])
        await store.delete("default", [f"churn {worker}"])

    async def look():
        for _ in range(30):
            found = ids((await store.search(VectorSearch("default", still[0].vector[None], 100)))[0])
            assert len(found) == len(set(found))
            assert {each.id for each in still} <= set(found)

    await asyncio.gather(*(churn(worker) for worker in range(4)), *(look() for _ in range(3)))
    assert set(await everything(store)) == {("default", each.id) for each in still}


some_ids = st.sampled_from(string.ascii_lowercase[:6])
operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("upsert"),
            st.dictionaries(some_ids, st.tuples(st.sampled_from(["text", "image"]), st.integers(0, 9)), min_size=1),
        ),
        st.tuples(st.just("delete"), st.lists(some_ids, min_size=1, max_size=4)),
        st.tuples(
            st.just("move"),
            st.permutations(string.ascii_lowercase[:6]).map(lambda drawn: {drawn[0]: drawn[1], drawn[2]: drawn[3]}),
        ),
        st.tuples(st.just("restart"), st.none()),
        st.tuples(st.just("drop"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(operations)
@on_a_loop
async def test_any_sequence_of_writes_leaves_what_a_dict_would_hold(open_store, tmp_path_factory, sequence):
    path = tmp_path_factory.mktemp("store")
    model = {}
    store = open_store(path, fake_manifest())
    await store.create_collection("c")
    for operation, argument in sequence:
        if operation == "upsert":
            await store.upsert(
                [entry(id, {"n": n}, collection="c", modality=kind, of=f"{n}") for id, (kind, n) in argument.items()]
            )
            model |= argument
        elif operation == "delete":
            assert await store.delete("c", argument) == len(model.keys() & set(argument))
            model = {id: value for id, value in model.items() if id not in argument}
        elif operation == "move":
            present = {old: new for old, new in argument.items() if old in model}
            assert await store.move("c", argument) == len(present)
            staying = {id: value for id, value in model.items() if id not in present.values()}
            model = {present.get(id, id): value for id, value in staying.items()}
        elif operation == "restart":
            await store.close()
            store = open_store(path, fake_manifest())
        else:
            await store.drop_collection("c")
            await store.create_collection("c")
            model = {}
    query = l2_normalise(np.ones(DIMENSIONS))
    hits = (await store.search(VectorSearch("c", query[None], 100)))[0]
    held = {hit.item.id: (hit.item.modality, hit.item.metadata["n"]) for hit in hits}
    assert held == model and len(hits) == len(model)
    for hit in hits:
        assert abs(hit.score - float(query @ vector_of(f"{hit.item.metadata['n']}"))) < 1e-6
        assert hit.item == await store.get("c", hit.item.id)
    await store.close()


@on_a_store()
async def test_what_a_search_is_asked_for(store):
    await store.upsert([entry(f"{n}", {"n": n}, modality="image" if n % 2 else "text") for n in range(30)])
    queries = np.stack([vector_of("x"), vector_of("y")])

    def best(query, among=range(30)):
        return [f"{n}" for n in sorted(among, key=lambda n: -float(query @ vector_of(f"{n}")))]

    assert [ids(hits) for hits in await store.search(VectorSearch("default", queries, 7))] == [
        best(q)[:7] for q in queries
    ]
    images = await store.search(
        VectorSearch("default", queries, 5, modalities=["image"], filter=parse({"n": {"$lt": 20}}))
    )
    assert [ids(hits) for hits in images] == [best(q, range(1, 20, 2))[:5] for q in queries]
    both = await store.search(VectorSearch("default", queries, 40, modalities=["image", "text", "audio"]))
    assert [ids(hits) for hits in both] == [best(q) for q in queries]
    apart = await store.search(VectorSearch("default", queries, 4, modalities=["image", "text"], by_modality=True))
    for query, hits in zip(queries, apart, strict=True):
        assert sorted(ids(hits)) == sorted(best(query, range(1, 30, 2))[:4] + best(query, range(0, 30, 2))[:4])
    left = await store.search(VectorSearch("default", queries, 3, leave_out=[best(queries[0])[1], None]))
    assert ids(left[0]) == [best(queries[0])[0], *best(queries[0])[2:4]] and ids(left[1]) == best(queries[1])[:3]
    [hit] = (await store.search(VectorSearch("default", queries[:1], 1, with_vector=True)))[0]
    assert np.array_equal(hit.item.vector, vector_of(hit.item.id))
    assert abs(hit.score - float(queries[0] @ hit.item.vector)) < 1e-6
    assert (await store.search(VectorSearch("default", queries[:1], 1)))[0][0].item.vector is None
    assert await store.search(VectorSearch("default", queries, 3, filter=parse({"n": []}))) == [[], []]


@on_a_store()
async def test_an_item_is_read_as_it_was_written(store):
    held = {
        "big": 2**63 - 1,
        "tiny": 5e-324,
        "text": 'é"\\\n%_{}',
        "deep": {"list": [None, True, {"": -0.5}]},
        "": None,
    }
    odd = ['q"uote', "back\\slash", "per%cent", "é / ü", "{brace}", "a" * 256, "文字" * 100, "%41", "A"]
    await store.upsert([entry(id, held | {"id": id}) for id in odd])
    for id in odd:
        found = await store.get("default", id, with_vector=True)
        assert found.id == id and found.metadata == held | {"id": id}
        assert np.array_equal(found.vector, vector_of(id))
        [hit] = (await store.search(VectorSearch("default", vector_of(id)[None], 1, filter=parse({"id": id}))))[0]
        assert hit.item == await store.get("default", id)
    assert {id for _, id in await everything(store)} == set(odd)
    first = await store.get("default", odd[0])
    await store.upsert([entry(odd[0], {})])
    second = await store.get("default", odd[0])
    assert second.created == first.created and second.updated >= first.updated and second.metadata == {}
    found = await store.vectors("default", odd)
    assert all(np.array_equal(found[id], vector_of(id)) for id in odd)
    with pytest.raises(NotFound, match="no item 'never'"):
        await store.vectors("default", ["A", "never"])
    with pytest.raises(NotFound, match="no item 'never'"):
        await store.get("default", "never")
    assert await store.holds("default", "%41") and not await store.holds("default", "never")
    assert not await store.holds("never", "A")
    assert await store.delete("default", ["%41", "never", 'q"uote']) == 2
    assert {id for _, id in await everything(store)} == set(odd) - {"%41", 'q"uote'}


@on_a_store()
async def test_a_cursor_that_no_page_came_with(store):
    await store.upsert([entry(id) for id in "abc"])
    for cursor in ("", "x", "é", "WyJhIiwiXCIgb3IgMSJd", "a" * 200):
        with pytest.raises(InvalidRequest, match="cursor"):
            await store.page(None, None, cursor, 2)


@on_a_store()
async def test_delete_matching_says_how_many(store):
    await store.upsert([entry(f"{n}", {"n": n, "t": f"100% of {n}"}) for n in range(30)])
    assert await store.delete_matching("default", parse({"n": {"$gte": 25}})) == 5
    assert await store.delete_matching("default", parse({"t": {"$contains": "100% of 1"}})) == 11
    assert await store.delete_matching("default", parse({"n": []})) == 0
    assert {int(id) for _, id in await everything(store)} == {0, *range(2, 10), *range(20, 25)}
    with pytest.raises(NotFound):
        await store.delete_matching("never", parse({"n": []}))


def test_an_item_that_is_moved_keeps_what_is_stored_of_it(open_store, tmp_path):
    async def write(store):
        parts = [Moment("image", n, n + 1.0, vector_of(f"moment {n}")) for n in range(3)]
        film = replace(entry("film", {"n": 1}, modality="video"), moments=parts)
        other = replace(entry("gone", modality="video"), moments=[Moment("image", 0, 1.0, vector_of("its moment"))])
        await store.upsert([film, entry("b"), entry("stays"), other])
        before = await store.get("default", "film")
        ids = {"film": "gone", "b": "c/ü.txt", "never there": "d"}
        assert await store.move("default", ids, {"film": {"n": 2}, "never there": {"n": 3}}) == 2
        return before.created

    async def read(store):
        items = await everything(store)
        assert {id: value for (_, id), value in items.items()} == {
            "gone": ("video", {"n": 2}),
            "c/ü.txt": ("text", {}),
            "stays": ("text", {}),
        }
        film = await store.get("default", "gone", with_vector=True)
        assert film.created == created and np.array_equal(film.vector, vector_of("film"))
        [[best, *_]] = await store.search(VectorSearch("default", vector_of("moment 2")[None], 3))
        assert (best.item.id, best.moment.start, best.item.metadata) == ("gone", 2.0, {"n": 2})
        [hits] = await store.search(VectorSearch("default", vector_of("its moment")[None], 3))
        assert hits[0].score < 0.9, "the moments of the replaced item went with it"
        assert ids((await store.search(VectorSearch("default", vector_of("b")[None], 1)))[0]) == ["c/ü.txt"]
        filtered = await store.search(VectorSearch("default", vector_of("moment 0")[None], 3, filter=parse({"n": 2})))
        assert [(hit.item.id, hit.moment.start) for hit in filtered[0]] == [("gone", 0.0)]
        assert await store.search(VectorSearch("default", vector_of("film")[None], 3, filter=parse({"n": 1}))) == [[]]
        with pytest.raises(NotFound):
            await store.move("never", {"a": "b"})

    created = in_store(open_store, tmp_path, write)
    in_store(open_store, tmp_path, read)

    async def remove(store):
        assert await store.delete("default", ["gone"]) == 1
        [hits] = await store.search(VectorSearch("default", vector_of("moment 2")[None], 3))
        assert "gone" not in ids(hits)

    in_store(open_store, tmp_path, remove)


@on_a_store()
async def test_a_collection_is_of_the_kind_that_it_was_put_as(store):
    for kind in ("flat", "hnsw", "auto"):
        assert await store.create_collection(kind, IndexRequest(kind))
        await store.upsert([entry(f"{n}", collection=kind) for n in range(10)])
        assert (await store.collection(kind)).index_request == IndexRequest(kind)
        [part] = await store.parts(kind)
        assert part.modality == "text" and part.count == 10
        assert ids((await store.search(VectorSearch(kind, vector_of("3")[None], 1)))[0]) == ["3"]
    assert await store.create_collection("empty") and not await store.create_collection("empty", IndexRequest("flat"))
    assert (await store.collection("empty")).index_request == IndexRequest("flat")


def test_a_label_set_is_kept_and_replaced_whole(open_store, tmp_path):
    rng = np.random.default_rng(0)
    large = {"a": rng.standard_normal((1_500, DIMENSIONS)).astype(np.float32), "shift": np.zeros((2, DIMENSIONS))}
    definition = {"labels": ["é" * 50_000, "b"], "templates": None}

    async def write(store):
        with pytest.raises(NotFound):
            await store.label_set("set")
        await store.put_label_set("set", {"labels": ["old"]}, {"b": np.ones((1, DIMENSIONS)), "c": np.ones((0, 8))})
        return await store.label_set_version("set"), (await store.label_set("set")).created

    async def replace(store):
        await store.put_label_set("set", definition, large)
        await store.put_label_set("other", {"labels": []}, {})

    async def read(store):
        held = await store.label_set("set")
        assert held.definition == definition and held.vectors.keys() == large.keys()
        assert all(np.array_equal(held.vectors[name], large[name].astype(np.float32)) for name in large)
        await store.delete_label_set("set")
        for missing in (store.label_set("set"), store.label_set_version("set"), store.delete_label_set("set")):
            with pytest.raises(NotFound, match="no label set 'set'"):
                await missing
        assert (await store.label_set("other")).vectors == {}
        await store.put_label_set("Z.1", {"labels": []}, {})
        assert [each.name for each in await store.label_sets("", 9)] == ["Z.1", "other"]
        assert [each.name for each in await store.label_sets("", 1)] == ["Z.1"]
        [last] = await store.label_sets("Z.1", 9)
        assert (last.name, last.created) == ("other", (await store.label_set("other")).created)
        return held.created

    version, created = in_store(open_store, tmp_path, write)
    in_store(open_store, tmp_path, replace)
    assert in_store(open_store, tmp_path, lambda store: store.label_set_version("set")) != version
    assert in_store(open_store, tmp_path, read) == created


def test_an_item_that_keeps_its_id_gets_other_metadata(open_store, tmp_path):
    async def write(store):
        film = replace(
            entry("film", {"n": 1}, modality="video"), moments=[Moment("image", 0, 1.0, vector_of("moment"))]
        )
        await store.upsert([film, entry("a", {"n": 1}), entry("b")])
        assert await store.move("default", {"film": "film", "a": "a", "b": "c"}, {"film": {"n": 2}, "a": {"n": 3}}) == 3

    async def read(store):
        items = await everything(store)
        expected = {"film": ("video", {"n": 2}), "a": ("text", {"n": 3}), "c": ("text", {})}
        assert {id: value for (_, id), value in items.items()} == expected
        [[best, *_]] = await store.search(VectorSearch("default", vector_of("moment")[None], 3, filter=parse({"n": 2})))
        assert (best.item.id, best.moment.start) == ("film", 0.0)
        assert ids((await store.search(VectorSearch("default", vector_of("a")[None], 1)))[0]) == ["a"]

    in_store(open_store, tmp_path, write)
    in_store(open_store, tmp_path, read)


@on_a_store()
async def test_a_sample_is_the_same_until_something_is_written(store):
    await store.upsert([entry(f"i{n}", {"n": n}) for n in range(30)])
    some, count = await store.sample("default", 10)
    again, _ = await store.sample("default", 10)
    assert count == 30 and len(some) == 10 and [one.id for one in some] == [one.id for one in again]
    assert all(np.array_equal(one.vector, vector_of(one.id)) and one.metadata == {"n": int(one.id[1:])} for one in some)
    every, count = await store.sample("default", 100)
    assert {one.id for one in every} == {f"i{n}" for n in range(30)} and count == 30
    assert isinstance(await store.version("default"), str)
    assert await store.shown("default", ["i1"]) == {}
    for missing in (store.preview("default", "i1"), store.sample("nowhere", 10)):
        with pytest.raises(NotFound):
            await missing
