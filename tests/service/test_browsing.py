"""Browsing without a query: items in an order, page by page, and how many there are of each value."""

import json
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from service.errors import InvalidRequest
from service.store import Entry, Order, SqliteStore, parse
from service.store.items import Item
from tests.service.fakes import vector_of
from tests.service.stores import in_store, milvus, sqlite


def with_store(test: Callable[[SqliteStore], Awaitable[None]]) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        in_store(sqlite, tmp_path, test)

    return run


def entry(id, metadata, modality="image") -> Entry:
    return Entry("default", id, modality, metadata, vector_of(id))


async def pages(store, limit, meanwhile=None, **named) -> list[list[Item]]:
    every, cursor = [], None
    while True:
        items, cursor = await store.page("default", named.get("modality"), cursor, limit, **named.get("how", {}))
        every.append(items)
        if meanwhile:
            await meanwhile(len(every), items)
        if cursor is None:
            return every


@with_store
async def test_every_order_is_that_of_a_sort(store):
    rng = random.Random(3)
    entries = [
        entry(f"i{n}", rng.choice([{}, {"date": None}, {"date": "2024"}, {"date": rng.choice([1, 2, 2.5, 2**60, -3])}]))
        for n in range(300)
    ]
    for start in range(0, 300, 60):
        await store.upsert(entries[start : start + 60])

    def number(one):
        value = one.metadata.get("date")
        return value if isinstance(value, int | float) else None

    large = [2**53 - 1, 2**53, 2**53 + 1, float(2**54), 2**54 + 3, 2**63 - 1, 2**63 - 2, -(2**63), -(2**53) - 1, 1e300]
    entries += [entry(f"l{n}", {"date": rng.choice(large)}) for n in range(40)]  # a double would round them
    await store.upsert(entries[300:])
    for descending in (False, True):
        wanted = sorted(
            entries, key=lambda one: (number(one) is None, (number(one) or 0) * (-1 if descending else 1))
        )  # stable: equal ones as they were written
        for limit in (7, 100, 339, 340, 1_000):
            listed = await pages(store, limit, how={"order": Order("date", descending)})
            assert [one.id for page in listed for one in page] == [one.id for one in wanted]
            assert all(len(page) == limit for page in listed[:-1])


@with_store
async def test_without_a_key_the_order_is_that_of_writing(store):
    await store.upsert([entry(f"i{n}", {"even": n % 2 == 0}) for n in range(10)])
    await store.upsert([entry("i2", {"even": True})])
    listed = await pages(store, 3, how={"order": Order(descending=True)})
    assert [one.id for page in listed for one in page] == ["i2", "i9", "i8", "i7", "i6", "i5", "i4", "i3", "i1", "i0"]
    listed = await pages(store, 2, how={"filter": parse({"even": True})})
    assert [[one.id for one in page] for page in listed] == [["i0", "i4"], ["i6", "i8"], ["i2"]]


@with_store
async def test_what_is_not_written_meanwhile_comes_once(store):
    rng = random.Random(5)
    await store.upsert([entry(f"i{n}", {"date": n // 10, "keep": n % 3 != 0}) for n in range(200)])
    untouched = {f"i{n}" for n in range(200) if n % 3}

    async def meanwhile(page, items):
        await store.upsert([entry(f"new{page}", {"date": rng.randrange(25)})])
        await store.upsert([entry(f"i{3 * rng.randrange(67) % 200}", {"date": rng.randrange(25)})])
        await store.delete("default", [f"i{3 * page}"])

    for descending in (False, True):
        listed = await pages(store, 7, meanwhile, how={"order": Order("date", descending)})
        ids = [one.id for page in listed for one in page if one.id in untouched]
        assert len(ids) == len(set(ids)) and set(ids) == untouched


@with_store
async def test_values_are_counted_as_the_filter_and_the_modality_say(store):
    rng = random.Random(7)
    values = ["a", "b", "ä", "", True, False, None, 1, 1.5, 2**60, [1], {"x": 1}]
    entries = [
        entry(f"i{n}", {"v": rng.choice(values), "n": n} if n % 5 else {"n": n}, rng.choice(["image", "audio"]))
        for n in range(400)
    ]
    await store.upsert(entries[:250])
    await store.upsert(entries[250:])
    await store.delete("default", [f"i{n}" for n in range(20)])
    for filter, modality in ((None, None), ({"n": {"$gte": 100}}, None), ({"n": {"$lt": 90}}, "audio")):
        passing = [
            one
            for n, one in enumerate(entries)
            if n >= 20
            and (modality is None or one.modality == modality)
            and (filter is None or ("$gte" in filter["n"] and n >= 100) or ("$lt" in filter["n"] and n < 90))
        ]
        counted = await store.facets(
            "default", ["v", "none"], modality=modality, filter=None if filter is None else parse(filter)
        )
        assert counted.total == len(passing)
        assert counted.modalities == {
            name: count for name in ("audio", "image") if (count := sum(one.modality == name for one in passing))
        }
        wanted: dict = {}
        for one in passing:
            if "v" in one.metadata and not isinstance(one.metadata["v"], list | dict):
                key = json.dumps(one.metadata["v"])
                wanted[key] = wanted.get(key, 0) + 1
        v = counted.values["v"]
        assert {json.dumps(value): count for value, count in v.counts} == wanted and v.more == 0
        assert [count for _, count in v.counts] == sorted(wanted.values(), reverse=True)
        assert v.missing == len(passing) - sum(wanted.values())
        assert counted.values["none"].missing == len(passing) and not counted.values["none"].counts


@with_store
async def test_zero_is_one_value(store):
    """The filter finds 0, 0.0 and -0.0 alike."""
    await store.upsert([entry(f"i{n}", {"v": value}) for n, value in enumerate((0, 0.0, -0.0))])
    await store.upsert([entry("one", {"v": -0.0}), entry("text", {"v": "0"})])
    counted = await store.facets("default", ["v"])
    assert list(counted.values["v"].counts) == [(0, 4), ("0", 1)]


@with_store
async def test_only_so_many_values_are_listed(store):
    await store.upsert([entry(f"i{n}", {"v": f"often{n % 2}" if n < 10 else f"once{n}"}) for n in range(1_030)])
    values = (await store.facets("default", ["v"])).values["v"]
    assert [count for _, count in values.counts] == [5, 5] + 998 * [1] and values.more == 22 and values.missing == 0


@with_store
async def test_another_order_s_cursor_is_refused(store):
    await store.upsert([entry(f"i{n}", {"n": n}) for n in range(10)])
    _, plain = await store.page("default", None, None, 3)
    _, ordered = await store.page("default", None, None, 3, order=Order("n"))
    for cursor, how in ((plain, {"order": Order("n")}), (ordered, {}), ("AAAA", {"order": Order("n")})):
        with pytest.raises(InvalidRequest, match="cursor"):
            await store.page("default", None, cursor, 3, **how)
    with pytest.raises(InvalidRequest, match="collection"):
        await store.page(None, None, None, 3, order=Order("n"))


def test_milvus_counts_modalities_alone_and_says_so(tmp_path):
    async def check(store):
        await store.upsert([entry("a", {"v": 1}), entry("b", {}, "audio")])
        counted = await store.facets("default")
        assert (counted.total, counted.modalities) == (2, {"audio": 1, "image": 1})
        assert (await store.facets("default", modality="audio")).total == 1
        assert await store.background("default", vector_of("x")[None]) == {}
        for asked in (
            store.facets("default", ["v"]),
            store.facets("default", filter=parse({"v": 1})),
            store.page("default", None, None, 3, order=Order("v")),
        ):
            with pytest.raises(InvalidRequest, match="Milvus"):
                await asked

    in_store(milvus, tmp_path, check)


def test_the_routes(shared_client):
    items = [
        {
            "id": f"b{n}",
            "text": f"dog {n}",
            "collection": "browsed",
            "metadata": {"file.date": n % 4, "file.month": f"2024-0{n % 2 + 1}"},
        }
        for n in range(8)
    ]
    assert shared_client.post("/items", json={"items": items}).status_code == 200
    where = {"collection": "browsed", "filter": json.dumps({"file.month": "2024-01"})}
    page = shared_client.get(
        "/items", params=where | {"sort": "file.date", "order": "desc", "limit": 3, "include": ["total", "preview"]}
    )
    body = page.json()
    assert [item["id"] for item in body["items"]] == ["b2", "b6", "b0"] and body["total"] == 4
    assert body["items"][0]["preview"]["text"] == "dog 2"
    rest = shared_client.get(
        "/items", params=where | {"sort": "file.date", "order": "desc", "cursor": body["next_cursor"]}
    ).json()
    assert [item["id"] for item in rest["items"]] == ["b4"] and rest["next_cursor"] is None and "total" not in rest
    assert [
        item["id"]
        for item in shared_client.get("/items", params={"collection": "browsed", "order": "desc"}).json()["items"]
    ][:2] == ["b7", "b6"]
    counted = shared_client.get("/collections/browsed/facets", params={"key": ["file.month", "file.folder"]}).json()
    assert counted["total"] == 8 and counted["modalities"] == {"text": 8}
    assert counted["facets"] == {
        "file.month": {
            "values": [{"value": "2024-01", "count": 4}, {"value": "2024-02", "count": 4}],
            "missing": 0,
            "more": 0,
        },
        "file.folder": {"values": [], "missing": 8, "more": 0},
    }
    assert shared_client.get("/collections/nowhere/facets").status_code == 404
    for wrong in ({"filter": "{"}, {"filter": "[]"}, {"filter": '{"a": {"$no": 1}}'}, {"order": "up"}):
        refused = shared_client.get("/items", params={"collection": "browsed"} | wrong)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
    for wrong in ({"sort": "a"}, {"include": "total"}):
        assert "collection" in shared_client.get("/items", params=wrong).json()["detail"]


def test_a_cursor_goes_with_its_listing(shared_client):
    """Its place in another order would leave items out, and say nothing."""
    texts = [{"id": f"c{n}", "text": "dog", "collection": "cursors", "metadata": {"a": n, "b": -n}} for n in range(4)]
    assert shared_client.post("/items", json={"items": texts}).status_code == 200
    for listing in ({}, {"sort": "a"}, {"filter": '{"a": {"$gte": 0}}'}):
        listing = {"collection": "cursors"} | listing
        cursor = shared_client.get("/items", params=listing | {"limit": 2}).json()["next_cursor"]
        more = shared_client.get("/items", params=listing | {"limit": 1, "include": "total", "cursor": cursor})
        assert [item["id"] for item in more.json()["items"]] == ["c2"], more.text
        others = (
            {"sort": "b"},
            {"order": "desc"},
            {"filter": '{"b": 1}'},
            {"modality": "text"},
            {"collection": "default"},
        )
        for other in others:
            refused = shared_client.get("/items", params=listing | other | {"cursor": cursor})
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request"), other
            assert "parameters of the page" in refused.json()["detail"]
