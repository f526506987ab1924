"""Films by script: steps in their order, from the alignment to the answer. The bundle's towers see colours and hear
tones."""

from itertools import combinations, pairwise

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.retrieval.script import aligned, follow
from service.store import Entry, Moment
from tests.service.fakes import vector_of
from tests.service.films import colours
from tests.service.media import b64
from tests.service.stores import both, on_a_store
from tests.service.test_long_sounds import wav_of
from tests.tiny_bundle import tone


def tried(gains, times):
    """The best sum of all ways to give steps moments at rising times."""
    count = len(gains)
    best = 0.0
    for size in range(1, count + 1):
        for steps in combinations(range(count), size):
            for places in combinations(np.argsort(times, kind="stable"), size):
                if all(times[a] < times[b] for a, b in pairwise(places)):
                    best = max(best, sum(gains[step, place] for step, place in zip(steps, places, strict=True)))
    return best


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
def test_the_alignment_is_the_best_of_all(count, width, seed):
    random = np.random.default_rng(seed)
    gains, times = random.normal(size=(count, width)).round(1), random.integers(0, 4, width) / 2
    total, places = aligned(gains, times)
    taken = [(step, place) for step, place in enumerate(places) if place is not None]
    assert total == pytest.approx(tried(gains, times)) == pytest.approx(sum(gains[pair] for pair in taken))
    assert all(times[a] < times[b] for (_, a), (_, b) in pairwise(taken))


def test_pictures_and_sounds_are_judged_on_scales_of_their_own():
    """All sounds here are nearer to every step than any picture: the step's own picture is taken all the same."""
    axes = np.eye(8, dtype=np.float32)
    steps = axes[:2]

    def moment(modality, start, near, by):
        return Moment(modality, start, start + 1.0, by * axes[near] + np.sqrt(1 - by**2).astype(np.float32) * axes[7])

    def sounds(start):
        return Moment("audio", start, start + 1.0, (axes[0] + axes[1]) / np.sqrt(2, dtype=np.float32))

    right = [moment("image", 0.0, 0, np.float32(0.3)), moment("image", 2.0, 1, np.float32(0.3)), sounds(0.0)]
    wrong = [moment("image", 0.0, 1, np.float32(0.3)), moment("image", 2.0, 0, np.float32(0.3)), sounds(0.0)]
    best, second = follow(steps, {"wrong": wrong, "right": right}, 5)
    assert (best.id, second.id) == ("right", "wrong") and best.score > second.score
    assert [moment.start for moment, _ in best.steps] == [0.0, 2.0]
    assert follow(steps, {}, 5) == []


def test_a_film_with_every_scene_comes_before_one_with_a_single_scene_that_fits_better():
    axes = np.eye(8, dtype=np.float32)

    def moments(*similarities):
        return [
            Moment("image", float(n), n + 1.0, by * axes[n] + np.sqrt(1 - by**2) * axes[7])
            for n, by in enumerate(np.float32(similarities))
        ]

    best, second = follow(axes[:3], {"one": moments(0.9, 0, 0), "all": moments(0.25, 0.25, 0.25)}, 2)
    assert (best.id, second.id) == ("all", "one")
    assert all(step is not None for step in best.steps) and second.steps[1:] == [None, None]


@both
@on_a_store()
async def test_moments_of_items_in_either_store(store):
    parts = tuple(Moment("image", n, n + 1.5, vector_of(str(n))) for n in range(3))
    await store.upsert(
        [
            Entry("default", "v", "video", {"a": 1}, vector_of("v"), moments=parts),
            Entry("default", "vv", "video", {}, vector_of("vv"), moments=parts[:1]),
            Entry("default", "t", "text", {}, vector_of("t")),
        ]
    )
    found = await store.moments_of("default", ["v", "t", "never"])
    assert list(found) == ["v"]
    assert {(one.start, one.end, one.modality) for one in found["v"]} == {(n, n + 1.5, "image") for n in range(3)}
    assert all(np.allclose(one.vector, vector_of(str(int(one.start))), atol=1e-6) for one in found["v"])
    assert await store.moments_of("never", ["v"]) == {}


@pytest.fixture(scope="module")
def stored(shared_client: httpx.Client) -> httpx.Client:
    orders = {"rgb": ("red", "green", "blue"), "bgr": ("blue", "green", "red"), "rrr": ("red", "red", "red")}
    items = [
        {"id": id, "video": b64(colours(*order, seconds=2.0)), "metadata": {"n": n}, "collection": "films"}
        for n, (id, order) in enumerate(orders.items())
    ]
    sound = np.concatenate([tone(220.0, 10.0), tone(3_000.0, 12.0)])
    items += [
        {"id": "sound", "audio": wav_of(sound), "collection": "films"},
        {"id": "short", "audio": wav_of(tone(440.0, 1.0)), "collection": "films"},
        {"id": "text", "text": "red green blue", "collection": "films"},
    ]
    assert shared_client.post("/items", json={"items": items}).status_code == 200
    return shared_client


def asked(client, script, **options):
    answer = client.post("/search/script", json={"script": script, "collection": "films", **options})
    assert answer.status_code == 200, answer.text
    return answer.json()["results"]


class TestOverHttp:
    def test_the_order_decides(self, stored):
        best, *others = asked(stored, ["red", "green", "blue"])
        assert best["id"] == "rgb" and {one["id"] for one in others} == {"bgr", "rrr", "sound"}
        starts = [step["start"] for step in best["steps"]]
        assert starts == sorted(starts) and [start // 2 for start in starts] == [0, 1, 2]
        assert best["modality"] == "video" and best["metadata"] == {"n": 0} and "preview" not in best
        assert best["score"] > others[0]["score"] and {step["modality"] for step in best["steps"]} == {"image"}
        assert asked(stored, ["blue", "green", "red"], top_k=1)[0]["id"] == "bgr"

    def test_scope(self, stored):
        found = asked(stored, ["red", "blue"], modalities=["video"], filter={"n": {"$gte": 1}}, include=["preview"])
        assert {one["id"] for one in found} == {"bgr", "rrr"} and all("metadata" not in one for one in found)
        found = asked(stored, ["red", {"vector": [1.0] + [0.0] * 15}, {"id": "rrr"}])
        assert found and "rrr" not in {one["id"] for one in found}  # it is no result of its own

    def test_files_are_steps(self, stored):
        frame = colours("red")
        files = [("file", ("a", frame)), ("file", ("b", colours("blue")))]
        answer = stored.post("/search/script", files=files, data={"request": '{"collection": "films", "top_k": 1}'})
        assert answer.json()["results"][0]["id"] in {"rgb", "sound"}, answer.text

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            ({"script": ["red"]}, "at least 2"),
            ({"script": ["red"] * 17}, "at most 16"),
            ({"script": ["a", "b"], "modalities": ["image"]}, "'video' or 'audio'"),
            ({"script": ["a", "b"], "top_k": 101}, "less than or equal to 100"),
            ({"script": ["a", "b"], "rerank": {}}, "not permitted"),
            ({"script": ["a", {"id": "never"}], "collection": "films"}, "never"),
            ({"script": ["a", "b"], "collection": "never"}, "never"),
        ],
    )
    def test_refusals(self, stored, body, said):
        refused = stored.post("/search/script", json=body)
        assert refused.status_code in (404, 422) and said in refused.text
