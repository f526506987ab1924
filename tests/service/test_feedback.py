"""Teaching by thumbs: what judgements may move, its versions in either store, and the routes."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contract.vectors import l2_normalise
from service.errors import InvalidRequest, NotFound
from service.retrieval import feedback
from service.retrieval.feedback import SAME, Feedback, Judged, Judgement, fit
from service.store import Entry, Item
from service.store.carry_over import OldStore
from tests.conftest import DEADLINE_S
from tests.service.fakes import FakeEmbedder, vector_of
from tests.service.media import b64, png
from tests.service.stores import both, in_store, on_a_store, sqlite
from tests.service.test_items_routes import problem, said, upsert

D = 32


def drawn(rng, count):
    return l2_normalise(rng.normal(size=(count, D)))


def stored(vectors, modality="image"):
    return [Item("c", str(place), modality, {}, "", "", vector) for place, vector in enumerate(vectors)]


@given(st.integers(0, 2**31), st.integers(1, 6), st.booleans())
def test_no_judge_moves_what_is_guarded(seed, count, close):
    """Judgements are drawn at random, also of queries that are nearly one of the guard's."""
    rng = np.random.default_rng(seed)
    guard, items = drawn(rng, 60), drawn(rng, 40)
    queries = l2_normalise(guard[:count] + 0.05 * drawn(rng, count)) if close else drawn(rng, count)
    owners = np.repeat(np.arange(count), 3)
    chosen = rng.integers(0, len(items), len(owners))
    kinds = ["image"] * len(owners)
    verdicts = (rng.random(len(owners)) < 0.5).tolist()
    head = fit(
        Judged(queries, items[chosen], [""] * len(owners), kinds, owners.tolist(), verdicts), stored(items), guard
    )
    guarded = guard[(guard @ queries.T).max(axis=1) < SAME]
    np.testing.assert_allclose(head.weights(guarded), 0, atol=1e-5)
    others = drawn(rng, 50)
    moved = head.moved(others)
    assert np.isfinite(moved).all() and (np.linalg.norm(head.shifts, axis=1) <= 1 + 1e-5).all()
    still = ~head.weights(others).any(axis=1)
    assert (moved[still] == others[still]).all()


def test_a_guard_whose_queries_are_all_alike_holds_too():
    """Some models have spaces in which two queries have a cosine similarity of 0.8, whatever they say."""
    rng = np.random.default_rng(0)
    narrow = l2_normalise(np.concatenate([drawn(rng, 100), drawn(rng, 5)]) + 2 * drawn(rng, 1))
    guard, queries = narrow[:100], narrow[100:]
    assert np.median(guard @ queries.T) > 0.75
    items = drawn(rng, 40)
    judged = Judged(queries, items[:5], list("abcde"), ["image"] * 5, range(5), [False] * 5)
    weights = fit(judged, stored(items), guard).weights(guard)
    assert (weights.max(axis=1) > 0).mean() < 0.1


def test_what_is_like_the_relevant_rises_and_the_judged_query_is_not_alone():
    rng = np.random.default_rng(3)
    middle, wrong = drawn(rng, 2)
    kind = [l2_normalise(middle + 0.5 * drawn(rng, 12)), l2_normalise(wrong + 0.5 * drawn(rng, 12))]
    items = np.concatenate([*kind, drawn(rng, 60)])
    query = l2_normalise(wrong + 0.3 * middle)  # which finds the wrong ones
    judged = Judged(
        query[None],
        np.stack([*kind[0][:3], *kind[1][:2]]),
        list("abcde"),
        ["image"] * 5,
        [0] * 5,
        [True] * 3 + [False] * 2,
    )
    head = fit(judged, stored(items), drawn(rng, 200))
    for asked in (query, l2_normalise(query + 0.3 * drawn(rng, 1)[0])):
        before, after = items @ asked, items @ head.moved(asked[None])[0]
        assert before.argmax() >= 12 > after.argmax()
        assert after[3:12].mean() > before[3:12].mean() and after[14:24].mean() < before[14:24].mean()


@both
def test_versions_stay_and_can_be_gone_back_to(open_store, tmp_path):
    query, other = vector_of("q"), vector_of("other")

    async def teach(store):
        await store.upsert([Entry("c", id, "image", {}, vector_of(id)) for id in "abcdef"])
        lessons = Feedback(FakeEmbedder(), store)
        assert await lessons.head("c") is None
        first, _ = await lessons.teach("c", [Judgement(query, ["a"], ["b"])])
        second, _ = await lessons.teach("c", [Judgement(query, ["b"], []), Judgement(other, [], ["f"])])
        assert [(v.number, v.judgements, v.queries) for v in (first, second)] == [(1, 2, 1), (2, 3, 2)]
        with pytest.raises(NotFound, match="'z'"):
            await lessons.teach("c", [Judgement(query, ["z"], [])])
        with pytest.raises(NotFound, match="no version 9"):
            await lessons.use("c", 9)
        await asyncio.gather(*(lessons.teach("c", [Judgement(vector_of(str(n)), ["a"], [])]) for n in range(3)))
        return await lessons.head("c")

    async def later(store):
        lessons = Feedback(FakeEmbedder(), store)
        number, head = await lessons.head("c")
        assert (number, len((await lessons.versions("c")).versions)) == (5, 5)
        await lessons.use("c", 1)
        assert (await lessons.head("c"))[0] == 1
        again, _ = await lessons.teach("c", [Judgement(query, ["c"], [])])
        assert (again.number, again.judgements) == (6, 3)  # built on the first
        await lessons.delete("c", 6)
        assert await lessons.head("c") is None and (await lessons.versions("c")).current is None
        await lessons.delete("c")
        assert (await lessons.versions("c")).versions == ()
        assert await store.label_sets("", 9) == []
        return head

    _, before = in_store(open_store, tmp_path, teach)
    after = in_store(open_store, tmp_path, later)
    for name in ("keys", "floors", "shifts"):
        np.testing.assert_array_equal(getattr(before, name), getattr(after, name))


@both
@on_a_store()
async def test_the_record_is_read_again_where_others_may_write_it(store, monkeypatch):
    monkeypatch.setattr(feedback, "_RECHECKED_S", -1.0)
    await store.upsert([Entry("c", "a", "image", {}, vector_of("a"))])
    here, elsewhere = Feedback(FakeEmbedder(), store), Feedback(FakeEmbedder(), store)
    assert await here.head("c") is None
    await elsewhere.teach("c", [Judgement(vector_of("q"), ["a"], [])])
    assert (await here.head("c") is not None) == store.shared
    assert await Feedback(FakeEmbedder(), store).head("c") is not None


def test_a_change_whose_client_goes_away_is_seen_by_searches(tmp_path):
    async def use(store):
        await store.upsert([Entry("c", "a", "image", {}, vector_of("a"))])
        lessons = Feedback(FakeEmbedder(), store)
        await lessons.teach("c", [Judgement(vector_of("q"), ["a"], [])])
        assert (await lessons.head("c"))[0] == 1
        with store._writer.committing:  # a commit that takes until the client is gone
            change = asyncio.create_task(lessons.use("c", None))
            while not lessons._alone("c").locked():  # noqa: ASYNC110
                await asyncio.sleep(0)
            for _ in range(100):
                await asyncio.sleep(0.001)
            change.cancel()
            with pytest.raises(asyncio.CancelledError):
                await change
        async with lessons._alone("c"):
            pass
        assert (await lessons.versions("c")).current is None
        assert await lessons.head("c") is None

    in_store(sqlite, tmp_path, use)


def test_who_judges_one_collection_does_not_keep_others_waiting(tmp_path):
    """A flood of judgements would else keep everybody from dropping or creating a collection."""

    class Learning(FakeEmbedder):
        begun, end = asyncio.Event(), asyncio.Event()

        async def in_worker(self, function):
            self.begun.set()
            await self.end.wait()
            return await super().in_worker(function)

    async def use(store):
        await store.upsert([Entry(name, "a", "image", {}, vector_of("a")) for name in "cd"])
        lessons = Feedback(embedder := Learning(), store)
        taught = asyncio.create_task(lessons.teach("c", [Judgement(vector_of("q"), ["a"], [])]))
        await asyncio.wait_for(embedder.begun.wait(), DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S):
            await lessons.use("d", None)
            await lessons.delete("d")
        dropping = asyncio.create_task(lessons.delete("c"))
        embedder.end.set()
        assert (await taught)[0].number == 1
        await dropping
        assert not (await lessons.versions("c")).versions, "of one collection, one after the other"

    in_store(sqlite, tmp_path, use)


def test_a_store_of_another_space_is_not_taught(tmp_path):
    async def use(store):
        await store.upsert([Entry("c", "a", "image", {}, vector_of("a"))])
        await Feedback(FakeEmbedder(), store).teach("c", [Judgement(vector_of("q"), ["a"], [])])
        await store.put_label_set("mine", {"labels": []}, {})

    in_store(sqlite, tmp_path, use)
    old = OldStore(tmp_path / "sqlite", alone=True)
    assert [one.name for one in old.label_sets()] == ["mine"]
    old.close()


@both
@on_a_store()
async def test_what_is_kept_has_a_bound(store, monkeypatch):
    monkeypatch.setattr(feedback, "MOST_VERSIONS", 2)
    monkeypatch.setattr(feedback, "MOST_QUERIES", 4)
    await store.upsert([Entry("c", "a", "image", {}, vector_of("a"))])
    lessons = Feedback(FakeEmbedder(), store)
    for n in range(4):
        await lessons.teach("c", [Judgement(vector_of(str(n)), ["a"], [])])
    assert [version.number for version in (await lessons.versions("c")).versions] == [3, 4]
    assert len(await store.label_sets("", 9)) == 3
    with pytest.raises(InvalidRequest, match="4 queries at most"):
        await lessons.teach("c", [Judgement(vector_of("more"), ["a"], [])])


def test_the_routes(client):
    upsert(client, *({"id": f"i{n}", "image": b64(png(n))} for n in range(6)))

    def found(**body):
        return client.post("/search", json={"query": "zebra crossing", **body}).json()

    plain = found()
    assert "feedback" not in plain
    last = plain["results"][-1]["id"]
    first = plain["results"][0]["id"]
    judgement = {"query": "zebra crossing", "relevant": [last], "not_relevant": [first]}
    taught = client.post("/feedback", json={"judgements": [judgement]})
    assert taught.status_code == 200, taught.text
    assert taught.json() | {"created": ""} == {"version": 1, "created": "", "judgements": 2, "queries": 1}
    moved = found(include=["explain"])
    assert moved["feedback"] == 1
    by_id = {result["id"]: result for result in moved["results"]}
    gain = {result["id"]: by_id[result["id"]]["score"] - result["score"] for result in plain["results"]}
    assert gain[last] > gain[first]
    assert by_id[last]["explain"]["feedback"] == pytest.approx(gain[last], abs=1e-5)
    assert found(feedback=False)["results"] == plain["results"]
    assert client.post("/search/batch", json={"queries": ["zebra crossing"]}).json()["feedback"] == 1
    assert client.get("/label-sets").json()["label_sets"] == []
    assert client.put("/feedback", json={"version": None}).json()["current"] is None
    assert "feedback" not in found()
    [listed] = client.put("/feedback", json={"version": 1}).json()["versions"]
    assert listed == {name: taught.json()[name] for name in listed}
    assert client.delete("/feedback", params={"version": 1}).status_code == 204
    assert client.get("/feedback").json() == {"current": None, "versions": []}
    client.post("/feedback", json={"judgements": [judgement]})
    client.delete("/collections/default")
    upsert(client, {"id": "i1", "text": "zebra crossing"})
    assert "feedback" not in found()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"judgements": []}, 422, "at least 1"),
        ({"judgements": [{"query": "x"}]}, 422, "at least one item"),
        ({"judgements": [{"query": "x", "relevant": ["a"], "not_relevant": ["a"]}]}, 422, "both relevant and not"),
        ({"judgements": [{"query": "x", "relevant": ["none"]}]}, 404, "no item 'none'"),
        ({"judgements": [{"query": {"id": "none"}, "relevant": ["a"]}]}, 404, "no item 'none'"),
        ({"judgements": [{"query": "x", "relevant": ["a"]}], "collection": "none"}, 404, "no collection 'none'"),
        ({"judgements": [{"query": {"image": "AAAA"}, "relevant": ["a"]}]}, 415, ""),
    ],
)
def test_what_is_wrong_is_named(client, body, status, words):
    upsert(client, {"id": "a", "text": "a"})
    problem(response := client.post("/feedback", json=body), status)
    assert words in said(response)
    assert client.get("/feedback").json()["versions"] == []


@pytest.mark.parametrize("ask", ["get", "put", "delete"])
def test_no_such_collection_or_version(client, ask):
    where = {"json": {"version": 3, "collection": "none"}} if ask == "put" else {"params": {"collection": "none"}}
    problem(getattr(client, ask)("/feedback", **where), 404)
    if ask != "get":
        where = {"json": {"version": 3}} if ask == "put" else {"params": {"version": 3}}
        problem(getattr(client, ask)("/feedback", **where), 404)
