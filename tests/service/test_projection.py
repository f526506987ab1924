"""The map: its layout, and that it is made once for what a collection holds."""

import asyncio
import socket
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.manifold import trustworthiness

from service.api.keys import create_key
from service.contract.vectors import l2_normalise
from service.errors import DeadlineExceeded, NotReady, Overloaded
from service.retrieval.projection import Map, Maps, Point, components, label, layout
from service.runtime.workers import Abandoned, stop_if_abandoned
from service.store import Item
from tests.conftest import DEADLINE_S, on_a_loop, serving


def clusters(seed=0, count=240, groups=8, dimensions=48, gap=3.0):
    """Pictures and sounds of the same `groups` subjects, each modality apart from the other as a whole."""
    random = np.random.default_rng(seed)
    subjects = random.normal(size=(groups, dimensions))
    subject = random.integers(0, groups, count)
    modality = np.where(np.arange(count) % 3 == 0, "audio", "image")
    apart = np.where((modality == "audio")[:, None], gap, -gap) * l2_normalise(random.normal(size=dimensions)) * 3
    return l2_normalise(subjects[subject] + apart + 0.45 * random.normal(size=(count, dimensions))), modality, subject


def test_what_is_near_is_about_the_same_whatever_its_modality():
    vectors, modality, subject = clusters()
    places = layout(vectors, modality)
    assert places.shape == (240, 2) and np.abs(places).max() == 1
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(apart, np.inf)
    near = np.argsort(apart, axis=1)[:, :5]
    assert (subject[near] == subject[:, None]).mean() > 0.9
    pictures, sounds = (
        np.stack([places[(modality == kind) & (subject == each)].mean(axis=0) for each in range(8)])
        for kind in ("image", "audio")
    )
    nearest = np.linalg.norm(sounds[:, None] - pictures[None], axis=2).argmin(axis=1)
    assert nearest.tolist() == list(range(8)), "sounds lie with the pictures of the same"
    own = modality == "image"
    plain = trustworthiness(vectors[own], components(vectors)[own], n_neighbors=10)
    assert trustworthiness(vectors[own], places[own], n_neighbors=10) > plain


def test_the_same_items_make_the_same_map():
    vectors, modality, _ = clusters()
    assert np.array_equal(layout(vectors, modality), layout(vectors.copy(), list(modality)))


@settings(deadline=None, max_examples=25)
@given(count=st.integers(0, 60), dimensions=st.integers(1, 6), same=st.booleans(), seed=st.integers(0, 9))
def test_any_vectors_have_a_place(count, dimensions, same, seed):
    random = np.random.default_rng(seed)
    vectors = l2_normalise(random.normal(size=(max(count, 1), dimensions)))[:count]
    if same and count:
        vectors = np.repeat(vectors[:1], count, axis=0)
    places = layout(vectors, random.choice(["image", "audio", "text", "vector"], count))
    assert places.shape == (count, 2) and np.isfinite(places).all() and np.abs(places).max(initial=0) <= 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a", "a"),
        (2, "2"),
        (0.5, "0.5"),
        (True, "true"),
        (None, None),
        ([1], None),
        ({"a": 1}, None),
        ("x" * 99, "x" * 80),
    ],
)
def test_labels(value, expected):
    assert label({"key": value}, "key") == expected
    assert label({"other": value}, "key") is None


class Held:
    """A store whose writes are told by hand."""

    def __init__(self) -> None:
        self.written, self.asked = 0, 0

    async def version(self, collection: str) -> str:
        return str(self.written)

    async def sample(self, collection: str, count: int) -> tuple[list[Item], int]:
        self.asked += 1
        if collection == "broken":
            raise RuntimeError("no such collection")
        vector = np.array([1.0, 0.0], np.float32)
        return [Item(collection, "a", "image", {"k": 1}, "", "", vector)], 7


@on_a_loop
async def test_a_map_is_made_once_until_something_is_written_whatever_part_of_it_is_asked_for():
    store = Held()
    maps = Maps(store)
    first, second = await asyncio.gather(maps.map("c", 10), maps.map("c", 20))
    assert first is second and store.asked == 1 and first.count == 7 and first.keys == ["k"]
    for limit in range(1, 40):
        await maps.map("c", limit)
    assert store.asked == 1
    store.written += 1
    assert await maps.map("c", 10) is not first and store.asked == 2
    for name in "defg":
        await maps.map(name, 10)
    await maps.map("c", 10)
    assert store.asked == 7, "few are remembered"
    for _ in range(2):
        with pytest.raises(RuntimeError):
            await maps.map("broken", 10)
    assert store.asked == 9, "a failure is not"


def test_a_part_of_a_map_is_the_same_each_time_and_lies_where_the_whole_does():
    points = [Point(str(number), "image", {}) for number in range(100)]
    whole = Map(points, np.arange(200.0).reshape(100, 2), 1_000, [])
    part = whole.of_at_most(10)
    assert part.count == 1_000 and len(part.points) == 10 and whole.of_at_most(100) is whole
    assert [point.id for point in part.points] == [str(int(x) // 2) for x in part.places[:, 0]]
    assert part.points == whole.of_at_most(10).points


@pytest.fixture
def slow(monkeypatch):
    """Layouts that go on until nobody waits for them."""
    begun, ended = threading.Event(), threading.Event()

    def layout(*_):
        begun.set()
        try:
            while not ended.wait(0.001):
                stop_if_abandoned()
        except Abandoned:
            ended.set()
            raise

    monkeypatch.setattr("service.retrieval.projection.layout", layout)
    yield begun, ended
    ended.set()


@on_a_loop
async def test_one_map_is_made_at_a_time_and_given_up_when_nobody_waits_for_it(slow, monkeypatch):
    begun, ended = slow
    store = Held()
    maps = Maps(store)
    hasty, patient = (asyncio.create_task(maps.map("c", 10)) for _ in range(2))
    await asyncio.to_thread(begun.wait, DEADLINE_S)
    for collection, written in (("d", 0), ("c", 1)):
        store.written = written
        with pytest.raises(Overloaded) as refused:
            await maps.map(collection, 10)
        assert refused.value.retry_after_s >= 1
    hasty.cancel()
    await asyncio.sleep(0)
    assert not ended.is_set() and not patient.done(), "one still waits"
    patient.cancel()
    assert await asyncio.to_thread(ended.wait, DEADLINE_S)
    monkeypatch.undo()
    assert (await maps.map("c", 10)).count == 7


@on_a_loop
async def test_a_map_that_takes_longer_than_a_request_may_is_made_for_who_asks_again(monkeypatch):
    goes = threading.Event()

    def layout(vectors, groups):
        assert goes.wait(DEADLINE_S)
        return np.zeros((len(vectors), 2))

    monkeypatch.setattr("service.retrieval.projection.layout", layout)
    store = Held()
    maps = Maps(store, wait_s=0.01)
    with pytest.raises(DeadlineExceeded, match="ask for it again"):
        await maps.map("c", 10)
    goes.set()
    assert maps._making is not None
    await maps._making[1].task
    assert (await maps.map("c", 10)).count == 7 and store.asked == 1


@on_a_loop
async def test_who_waits_for_a_map_at_the_end_is_answered(slow):
    begun, ended = slow
    maps = Maps(Held())
    waiting = asyncio.create_task(maps.map("c", 10))
    await asyncio.to_thread(begun.wait, DEADLINE_S)
    maps.close()
    with pytest.raises(NotReady):
        await waiting
    assert await asyncio.to_thread(ended.wait, DEADLINE_S)


def test_the_route(client):
    items = [
        {"id": f"t{n}", "text": f"text {n}", "metadata": {"n": n % 3, "list": [1], "odd": n == 1}} for n in range(40)
    ]
    assert client.post("/items", json={"items": items}).status_code == 200
    answer = client.get("/collections/default/map").json()
    assert answer["count"] == 40 and answer["keys"] == ["n", "odd"] and len(answer["points"]) == 40
    assert {each["id"] for each in answer["points"]} == {each["id"] for each in items}
    assert all(set(each) == {"id", "modality", "x", "y"} and abs(each["x"]) <= 1 for each in answer["points"])
    labelled = client.get("/collections/default/map", params={"label": "n"}).json()["points"]
    assert {each["label"] for each in labelled} == {"0", "1", "2"}
    part = client.get("/collections/default/map", params={"limit": 10}).json()
    assert part["count"] == 40 and len(part["points"]) == 10
    assert client.get("/collections/default/map", params={"limit": 10}).json() == part
    client.post("/items/delete", json={"ids": [each["id"] for each in items]})
    assert client.get("/collections/default/map").json() == {"count": 0, "keys": [], "points": []}
    assert client.get("/collections/nowhere/map").status_code == 404
    assert client.get("/collections/default/map", params={"limit": 5_001}).status_code == 422


def test_forty_maps_leave_other_keys_served_and_are_given_up_with_their_clients(slow, settings, tmp_path):
    begun, ended = slow
    clear = create_key(tmp_path / "keys.json", "reader", ["read", "write"])[1]
    keyed = {"Authorization": f"Bearer {clear}"}
    with serving(settings.model_copy(update={"keys": tmp_path / "keys.json"})) as client:
        client.headers = keyed
        assert client.post("/items", json={"items": [{"id": "a", "text": "red"}]}).status_code == 200
        address = (client.base_url.host, client.base_url.port)
        asking = [socket.create_connection(address, timeout=DEADLINE_S) for _ in range(40)]
        for limit, each in enumerate(asking, start=1):
            head = f"GET /collections/default/map?limit={limit} HTTP/1.1\r\nHost: localhost\r\n"
            each.sendall(f"{head}Authorization: Bearer {clear}\r\n\r\n".encode())
        assert begun.wait(DEADLINE_S)
        assert client.get("/models").status_code == 200
        assert client.post("/items", json={"items": [{"id": "b", "text": "blue"}]}).status_code == 200
        other = client.get("/collections/default/map")
        assert (other.status_code, other.json()["code"]) == (429, "overloaded") and other.headers["retry-after"]
        for each in asking:
            each.close()
        assert ended.wait(DEADLINE_S)
