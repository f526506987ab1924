"""Milvus has its own: filters as expressions, refusals, times when it is down, and replicas that share one.

Milvus here is Milvus Lite, in this process or behind a port of its own. It runs the same client code as a cluster.
"""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequest, NotFound, NotReady
from service.settings import read_settings
from service.store import (
    Effort,
    Entry,
    IndexRequest,
    KeywordSearch,
    SpaceMismatch,
    StoreDamaged,
    StoreError,
    VectorSearch,
    parse,
)
from service.store.milvus import MilvusStore, filters, layout
from service.store.milvus.labels import LabelSets
from tests.conftest import DEADLINE_S, on_a_loop
from tests.service.fakes import fake_manifest, vector_of
from tests.service.jobs.processes import server
from tests.service.stores import in_store, milvus
from tests.service.test_filters import filters as raw_filters
from tests.service.test_filters import holds, metadata


def entry(id: str, held: dict[str, Any] | None = None, collection: str = "default", modality: str = "text") -> Entry:
    return Entry(collection, id, modality, held or {}, vector_of(id))


def ids(hits: Any) -> list[str]:
    return [hit.item.id for hit in hits]


@contextmanager
def milvus_server(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A Milvus Lite behind a port, which any number of processes may use."""
    command = [sys.executable, "-u", "-m", "milvus_lite", "server", "--data-dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert any("listening" in line for line in process.stdout), "Milvus Lite did not start"
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait(DEADLINE_S)
        if process.stdout is not None:
            process.stdout.close()


class ManyLabelSets:
    """The catalogue of a store with 20,000 label sets, as `Tables` scans it."""

    async def scan(self, collection: str | None, condition: str, output: Any) -> AsyncIterator[list[dict[str, Any]]]:
        for start in range(20_000, 0, -1_000):
            numbers = range(start - 1_000, start)
            head = {"created": "", "updated": "", "version": "x" * 1_000}
            yield [
                {"id": f"labels/{number:05}", "content": json.dumps(head | {"updated": f"{number}"})}
                for number in numbers
            ]


def test_a_page_of_label_sets_needs_memory_for_that_page_only() -> None:
    store = LabelSets()
    store._tables = cast(Any, ManyLabelSets())
    tracemalloc.start()
    try:
        page = asyncio.run(store.label_sets("", 3))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert [listed.name for listed in page] == ["00000", "00001", "00002"] and page[2].updated == "2"


class TestFilters:
    @pytest.mark.full
    def test_equal_brute_force(self, tmp_path: Path) -> None:
        """Whatever metadata and filter are, the search finds what passes, in order, and the deletion takes it."""
        with asyncio.Runner() as runner:
            store = MilvusStore.open(str(tmp_path / "milvus.db"), None, 30, fake_manifest())

            @settings(max_examples=60, deadline=None)
            @given(data=st.data(), held=st.lists(metadata, min_size=1, max_size=20))
            def compare(data: Any, held: list[dict[str, Any]]) -> None:
                raw = data.draw(raw_filters)
                if some := [pair for each in held for pair in each.items() if not isinstance(pair[1], list | dict)]:
                    name, value = data.draw(st.sampled_from(some))
                    raw = data.draw(
                        st.sampled_from([raw, {name: value}, {"$or": [raw, {name: value}]}, {name: value, "$not": raw}])
                    )
                runner.run(self.compared(store, raw, held))

            try:
                compare()
            finally:
                runner.run(store.close())

    async def compared(self, store: MilvusStore, raw: dict[str, Any], held: list[dict[str, Any]]) -> None:
        await store.create_collection("c")
        await store.upsert([entry(f"{number}", each, "c") for number, each in enumerate(held)])
        filter, query = parse(raw), vector_of("query")
        passing = [f"{number}" for number, each in enumerate(held) if holds(raw, each)]
        expected = sorted(passing, key=lambda id: -float(query @ vector_of(id)))
        for count in (1, 5, 100):
            assert (
                ids((await store.search(VectorSearch("c", query[None], count, filter=filter)))[0]) == expected[:count]
            )
        assert await store.delete_matching("c", filter) == len(expected)
        left = {item.id for item in (await store.page("c", None, None, 100))[0]}
        assert left == {f"{number}" for number in range(len(held))} - set(expected)
        await store.drop_collection("c")

    @pytest.mark.parametrize(
        ("raw", "exact"),
        [
            ({"a": 1, "b": {"$gte": -1.5e300}, "$not": {"c": {"$lt": "é z"}}}, True),
            ({"a": {"$contains": "harbour (old)"}}, True),
            ({"a": 2**53 - 1, "b": {"$lt": 2**63 + 2**12}}, True),
            ({"a": 2**53}, False),
            ({"$not": {"a": {"$lt": 2**62}}}, False),
            ({"a": {"$contains": "100%"}}, False),
            ({"$not": {"a": {"$contains": "a_b"}}}, False),
            ({"a": {"$gt": 'a"b'}}, False),
            ({"$or": [{"a": {"$gt": "a\\b"}}, {"b": 1}]}, False),
        ],
    )
    def test_what_cannot_be_said_in_an_expression_is_looked_at(self, raw: dict[str, Any], exact: bool) -> None:
        assert filters.translate(parse(raw)).exact == exact

    def test_nothing_of_a_client_stands_in_an_expression_but_plain_text(self) -> None:
        for text in ('a" or id != "', "a' or 1", "{x}", "a\\", "a\n", "x%y", "x_y"):
            for raw in ({text: 1}, {"a": text}, {text: {"$gt": text}}, {"a": {"$contains": text}}, {text: [text]}):
                assert text not in str(filters.translate(parse(raw)).text)

    def test_more_items_pass_than_one_call_names(self, tmp_path: Path) -> None:
        async def run(store: MilvusStore) -> None:
            await store.upsert([entry(f"{n}", {"t": f"{n}%", "n": n}) for n in range(2_500)])
            query, filter = vector_of("x"), parse({"t": {"$contains": "%"}, "n": {"$gte": 100}})
            expected = sorted(range(100, 2_500), key=lambda n: -float(query @ vector_of(f"{n}")))
            hits = (await store.search(VectorSearch("default", query[None], 20, filter=filter)))[0]
            assert ids(hits) == [f"{n}" for n in expected[:20]]
            first, more = await store.page("default", None, None, 1_500)
            second, end = await store.page("default", None, more, 1_500)
            assert len({item.id for item in (*first, *second)}) == 2_500 and end is None
            assert await store.delete_matching("default", filter) == 2_400
            assert (await store.collection("default")).count == 100

        in_store(milvus, tmp_path, run)


def test_a_kind_of_index_that_is_gone_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A store as an earlier version left it: the kind in the catalogue, and Milvus's own index of it."""

    async def older(store: MilvusStore) -> None:
        await store.create_collection("photos")
        await store.upsert([entry(f"{n}", collection="photos") for n in range(50)])
        client = store._connection.client
        client.release_collection("isthmus_photos")
        client.drop_index("isthmus_photos", "vector")
        index = client.prepare_index_params()
        index.add_index("vector", index_type="IVF_FLAT", metric_type="IP", params={"nlist": 4})
        client.create_index("isthmus_photos", index_params=index, sync=False)
        await store._tables.put_note(
            "collection/photos", {**layout.description(IndexRequest("hnsw")), "kind": "ivf_flat"}
        )

    async def converted(store: MilvusStore) -> None:
        assert (await store.collection("photos")).index_request == IndexRequest("hnsw")
        assert store._connection.client.describe_index("isthmus_photos", "vector")["index_type"] == "HNSW"
        assert ids((await store.search(VectorSearch("photos", vector_of("7")[None], 1)))[0]) == ["7"]
        assert (await store.collection("photos")).count == 50

    in_store(milvus, tmp_path, older)
    for _ in range(2):
        in_store(milvus, tmp_path, converted)
    assert caplog.text.count("of kind ivf_flat, which there is no more: hnsw replaces it") == 1, "it is said once"


class TestRefusals:
    def test_what_a_milvus_store_has_not_is_said(self, tmp_path: Path) -> None:
        async def run(store: MilvusStore) -> None:
            await store.upsert([entry("a")])
            query = vector_of("a")[None]
            for refused, said in (
                (store.keyword_search(KeywordSearch("default", "a", 1)), "no index of words"),
                (store.set_keyword_fields("default", ["title"]), "no index of words"),
                (store.create_collection("b", IndexRequest("ivf_pq")), "has auto, hnsw, flat, of float32"),
                (store.create_collection("b", IndexRequest("hnsw", "int8")), "of float32"),
                (store.create_collection("default", IndexRequest("flat")), "empty collection only"),
                (store.search(VectorSearch("default", query, 1, effort=Effort(exact=True))), "put as flat"),
                (store.search(VectorSearch("default", query, 20_000)), "16,383 items at most"),
                (store.upsert([entry("b"), entry("c", {f"{n}": n for n in range(2_100)})]), "4200 parts to filter by"),
            ):
                with pytest.raises(InvalidRequest, match=said):
                    await refused
            await store.set_keyword_fields("default", [])
            assert not (await store.collection("default")).keywords
            assert {item.id for item in (await store.page(None, None, None, 10))[0]} == {"a"}
            with pytest.raises(NotFound):
                await store.collection("b")

        in_store(milvus, tmp_path, run)

    def test_the_way_out_of_another_space_is_named(self, tmp_path: Path) -> None:
        in_store(milvus, tmp_path, lambda store: store.put_label_set("set", {"labels": []}, {}))
        with pytest.raises(SpaceMismatch, match="another database in ISTHMUS_MILVUS_URI"):
            milvus(tmp_path, fake_manifest("other"))

    def test_another_version(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("service.store.milvus.opening._VERSION", 99)
        in_store(milvus, tmp_path, lambda store: store.upsert([entry("a")]))
        monkeypatch.undo()
        with pytest.raises(StoreDamaged, match="version 99"):
            milvus(tmp_path, fake_manifest())

    def test_without_pymilvus_the_extra_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pymilvus", None)
        with pytest.raises(StoreError, match=r"pip install 'isthmus\[milvus\]'"):
            milvus(tmp_path, fake_manifest())

    def test_a_token_is_not_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ISTHMUS_MILVUS_TOKEN", "root:secret")
        assert "secret" not in repr(read_settings())


class TestDown:
    def test_nothing_listens(self, free_port: int) -> None:
        with pytest.raises(StoreError, match=rf"ISTHMUS_MILVUS_URI 'http://127.0.0.1:{free_port}': .* does not answer"):
            MilvusStore.open(f"http://root:secret@127.0.0.1:{free_port}", None, 0.5, fake_manifest())

    def test_a_port_that_is_silent(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with pytest.raises(StoreError, match="does not answer"):
                MilvusStore.open(uri, "root:secret", 0.5, fake_manifest())

    @pytest.mark.full
    @on_a_loop
    async def test_a_milvus_that_stops_and_comes_back(self, tmp_path: Path, free_port: int) -> None:
        """All waiters are answered while it is silent or gone, and nothing need be restarted when it is back."""
        with ExitStack() as stack:
            server = stack.enter_context(milvus_server(tmp_path, free_port))
            store = await asyncio.to_thread(
                MilvusStore.open, f"http://127.0.0.1:{free_port}", None, 0.5, fake_manifest()
            )
            await store.upsert([entry("a")])
            assert await store.ready()
            server.send_signal(signal.SIGSTOP)
            waiting = [store.search(VectorSearch("default", vector_of("a")[None], 1)) for _ in range(40)]
            outcomes = await asyncio.gather(*waiting, store.upsert([entry("b")]), return_exceptions=True)
            assert all(isinstance(each, NotReady) for each in outcomes)
            assert "does not answer" in str(outcomes[0]) and "127.0.0.1" not in str(outcomes[0])
            assert not await store.ready()
        for waiting in (store.get("default", "a"), store.upsert([entry("b")]), store.collections()):
            with pytest.raises(NotReady):
                await waiting
        with milvus_server(tmp_path, free_port):
            async with asyncio.timeout(DEADLINE_S):
                while not await store.ready():
                    pass
            assert (await store.get("default", "a")).id == "a"
            await store.upsert([entry("c")])
            assert (await store.search(VectorSearch("default", vector_of("c")[None], 1)))[0][0].item.id == "c"
            await store.close()


@pytest.mark.full
def test_two_replicas_share_a_store_and_a_redis(
    bundle_dir: Path, tmp_path: Path, free_port: int, redis_url: str, png: Any
) -> None:
    """The very next request to one finds what the other has answered for; no second need pass."""
    with ExitStack() as stack:
        stack.enter_context(milvus_server(tmp_path, free_port))
        uri = f"http://127.0.0.1:{free_port}"
        (_, one), (_, other) = (
            stack.enter_context(server(bundle_dir, Path("milvus"), milvus_uri=uri, redis_url=redis_url))
            for _ in range(2)
        )

        def found(client: httpx.Client, text: str, **asked: Any) -> list[str]:
            answer = client.post("/search", json={"query": text, "top_k": 3, **asked})
            assert answer.status_code == 200, answer.text
            return [each["id"] for each in answer.json()["results"]]

        def put(client: httpx.Client, *items: dict[str, Any]) -> None:
            answer = client.post("/items", json={"items": list(items)})
            assert answer.status_code == 200, answer.text

        put(one, {"id": "r", "text": "red", "metadata": {"n": 1}})
        assert found(other, "red") == ["r"] and other.get("/items/r").json()["metadata"] == {"n": 1}
        put(other, {"id": "b", "text": "blue", "metadata": {"n": 2}})
        assert found(one, "blue", filter={"n": {"$gte": 2}}) == ["b"]
        put(other, {"id": "r", "text": "blue"})
        assert one.get("/items/r").json()["metadata"] == {}
        assert one.delete("/items/b").status_code == 204 and other.get("/items/b").status_code == 404
        assert found(other, "blue") == ["r"]
        put(one, {"id": "x", "text": "red", "collection": "made.by-one"})
        assert found(other, "red", collection="made.by-one") == ["x"]
        assert other.delete("/collections/made.by-one").status_code == 204
        assert one.post("/search", json={"query": "red", "collection": "made.by-one"}).status_code == 404
        labels = {"labels": ["red", "blue"]}
        assert one.put("/label-sets/colours", json=labels).status_code in (200, 201)
        classified = other.post("/classify", json={"inputs": ["red"], "label_set": "colours"}).json()
        assert classified["results"][0]["labels"][0]["label"] == "red"
        assert one.put("/label-sets/colours", json={"labels": ["green", "blue"]}).status_code in (200, 201)
        classified = other.post("/classify", json={"inputs": ["red"], "label_set": "colours"}).json()
        assert {each["label"] for each in classified["results"][0]["labels"]} == {"green", "blue"}
        # A vector that one has made, the other takes from Redis.
        answers = [client.post("/embed", json={"inputs": ["barks"]}) for client in (one, other)]
        assert np.array_equal(*(answer.json()["embeddings"][0]["embedding"] for answer in answers))
        assert 'isthmus_cache_total{result="hit"} 0.0' not in (said := other.get("/metrics").text) and "hit" in said
        assert one.get("/readyz").json()["checks"]["store"] and other.get("/readyz").json()["checks"]["store"]
        refused = one.post("/search", json={"query": "red", "keywords": {"query": "red"}})
        assert refused.status_code == 422 and "no index of words" in refused.text
