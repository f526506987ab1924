"""What chance gives: confidences, "probably nothing here", and the order of several kinds."""

import math

import numpy as np
import pytest

from service.contract.vectors import l2_normalise
from service.retrieval import chance
from service.retrieval.search import Result, _balanced
from service.store import Background, Entry, Item
from service.store.background import LEAST, together
from tests.service.fakes import DIMENSIONS
from tests.service.stores import in_store, sqlite


def drawn(count, *, towards=None, seed=0):
    """Unit vectors around a direction."""
    noise = np.random.default_rng(seed).normal(size=(count, DIMENSIONS))
    return l2_normalise(noise + (0 if towards is None else 3 * towards))


def entries(vectors, modality="image", first=0):
    return [Entry("default", f"{modality}{first + n}", modality, {}, vector) for n, vector in enumerate(vectors)]


def test_the_expected_number_is_that_of_a_normal_tail():
    background = Background(1_000, 0.1, 0.05)
    for deviations, tail in ((0, 0.5), (1, 0.158655), (3, 0.00134990), (-2, 0.977250)):
        logarithm = chance.log_expected(0.1 + 0.05 * deviations, background)
        assert logarithm == pytest.approx(math.log(1_000 * tail), rel=1e-4)
        assert chance.confidence(0.1 + 0.05 * deviations, background) == pytest.approx(
            math.exp(-1_000 * tail), rel=1e-3
        )
    assert chance.confidence(1.0, Background(10**6, 0.0, 0.001)) == pytest.approx(1.0)
    assert chance.log_expected(0.5, Background(10, 0.5, 0.0)) == pytest.approx(math.log(5)), (
        "no spread is no division by 0"
    )
    assert chance.confidence(0.9, None) is None


def test_nothing_is_said_only_of_what_can_be_judged():
    assert chance.nothing([0.999, 0.1]) is False
    assert chance.nothing([0.81, None]) is True
    assert chance.nothing([math.exp(-chance.MOST_EXPECTED) + 1e-9]) is False
    assert chance.nothing([None, None]) is None
    assert chance.nothing([]) is True


def test_background_queries_are_the_same_everywhere():
    texts = chance.background_texts()
    assert texts == chance.background_texts() and len(set(texts)) == 64 and all(text.isalpha() for text in texts)


def test_a_background_is_that_of_all_items_and_follows_them(tmp_path):
    queries = drawn(64, seed=1)

    async def check(store):
        assert await store.background("default", queries) == {}
        await store.upsert(entries(drawn(LEAST - 1)))
        assert await store.background("default", queries) == {}
        await store.upsert(entries(drawn(1, seed=2), first=LEAST - 1))
        one = (await store.background("default", queries))["image"]
        vectors = np.stack([(await store.get("default", f"image{n}", with_vector=True)).vector for n in range(LEAST)])
        scores = queries @ vectors.T
        assert one.count == LEAST and one.centre == pytest.approx(float(np.median(scores)), abs=1e-6)
        below = scores[scores < np.median(scores)] - np.median(scores)
        assert one.spread == pytest.approx(float(np.sqrt((below**2).mean())), abs=1e-6)
        await store.upsert(entries(drawn(1, seed=3), first=LEAST))
        later = (await store.background("default", queries))["image"]
        assert (later.count, later.centre) == (LEAST + 1, one.centre), "a small change keeps the sample"
        await store.upsert(entries(drawn(600, seed=4, towards=queries[0]), first=LEAST))
        moved = (await store.background("default", queries))["image"]
        assert moved.count == LEAST + 600 and moved.centre != one.centre
        await store.upsert(entries(drawn(LEAST, seed=5), "audio"))
        assert set(await store.background("default", queries)) == {"image", "audio"}
        await store.drop_collection("default")
        assert not store._backgrounds._kept

    in_store(sqlite, tmp_path, check)


def test_moments_count_among_their_items():
    merged = together(
        {"video": Background(10, 0.0, 0.1)}, {"video": Background(30, 0.4, 0.3), "audio": Background(20, 1, 2)}
    )
    assert merged["video"].count == 40
    assert merged["video"].centre == pytest.approx(0.3) and merged["video"].spread == pytest.approx(0.25)
    assert merged["audio"] == Background(20, 1, 2)


@pytest.fixture(scope="module")
def kinds(shared_client):
    """Forty sounds that are somewhat like "dog", forty pictures that are not, and one picture that is very."""
    [found] = shared_client.post("/embed", json={"inputs": ["dog"]}).json()["embeddings"]
    dog, rng = np.array(found["embedding"]), np.random.default_rng(0)
    noise = rng.normal(size=(81, len(dog))) / math.sqrt(len(dog))
    noise -= np.outer(noise @ dog, dog)  # at a right angle: what is like it is so by the shares below alone
    vectors = [*(0.1 * rng.normal(size=(40, 1)) * dog + noise[:40]), *(1.5 * dog + noise[40:80]), 3 * dog + noise[80]]
    items = [
        {
            "id": f"{modality}{n}",
            "vector": vector.tolist(),
            "modality": modality,
            "collection": "kinds",
            "metadata": {"half": n % 2},
        }
        for n, (modality, vector) in enumerate(zip(40 * ["image"] + 40 * ["audio"] + ["image"], vectors, strict=True))
    ]
    assert shared_client.post("/items", json={"items": items}).status_code == 200

    def asked(**body):
        query = {} if "queries" in body else {"query": "dog"}
        path = "/search/batch" if "queries" in body else "/search"
        response = shared_client.post(path, json={"collection": "kinds", **query, **body})
        assert response.status_code == 200, response.text
        return response.json()

    return asked


def test_balance_puts_a_picture_that_stands_out_before_sounds_that_are_all_alike(kinds):
    plain = kinds(top_k=5)
    assert [result["modality"] for result in plain["results"]] == ["image", *4 * ["audio"]]
    assert "confidence" not in plain["results"][0] and not plain.keys() & {"nothing", "counts"}
    balanced = kinds(top_k=3, balance=True, include=["confidence"])
    by_kind = {
        kind: [result for result in balanced["results"] if result["modality"] == kind] for kind in ("image", "audio")
    }
    assert {kind: len(results) for kind, results in by_kind.items()} == {"image": 3, "audio": 3}
    assert balanced["results"][0]["id"] == "image80" and balanced["counts"] == {"image": 41, "audio": 40}
    for kind, results in by_kind.items():
        alone = kinds(top_k=3, modalities=[kind])["results"]
        assert [result["id"] for result in results] == [result["id"] for result in alone]
    assert all(0 <= result["confidence"] <= 1 for result in balanced["results"])
    some = kinds(balance=True, filter={"half": 1}, modalities=["audio"])
    assert some["counts"] == {"audio": 20} and len(some["results"]) == 10


def test_modalities_take_turns_among_what_is_surely_no_chance():
    background = {"image": Background(100, 0.0, 0.1), "audio": Background(100, 0.0, 0.02)}
    scores = {"image": [0.6, 0.5, 0.2], "audio": [0.4, 0.35, 0.3, 0.01], "text": [0.9]}
    results = [
        Result(Item("c", f"{kind}{n}", kind, {}, "", "", None), score, similarity=score)
        for kind, of_kind in scores.items()
        for n, score in enumerate(of_kind)
    ]
    order = ["audio0", "image0", "audio1", "image1", "audio2", "image2", "audio3", "text0"]
    assert [result.item.id for result in _balanced(results, background, 9)] == order
    assert [result.item.id for result in _balanced(results, background, 1)] == ["audio0", "image0", "text0"]


def test_a_verdict_for_each_query(kinds):
    answer = kinds(queries=["dog", {"id": "image80"}], include=["confidence"], top_k=4)
    assert answer["nothing"][1] is None, "only texts are judged"
    assert all(result["confidence"] is None for result in answer["results"][1])
    assert answer["nothing"][0] is (max(one["confidence"] for one in answer["results"][0]) < math.exp(-0.2))
    assert kinds(include=["confidence"], top_k=4)["nothing"] is answer["nothing"][0]
    ordered = kinds(include=["confidence"], top_k=4, diversity={"lambda": 1})
    by_id = {one["id"]: one["confidence"] for one in kinds(include=["confidence"], top_k=4)["results"]}
    assert {one["id"]: one["confidence"] for one in ordered["results"]} == pytest.approx(by_id)
    assert kinds(include=["confidence"], filter={"half": 7})["nothing"] is True


def test_too_few_items_are_not_judged(shared_client):
    item = {"id": "one", "text": "dog", "collection": "few"}
    assert shared_client.post("/items", json={"items": [item]}).status_code == 200
    body = {"query": "dog", "collection": "few", "include": ["confidence"], "balance": True}
    answer = shared_client.post("/search", json=body).json()
    assert answer["nothing"] is None and answer["results"][0]["confidence"] is None
    assert answer["counts"] == {"text": 1}


@pytest.mark.parametrize(
    "other", [{"correction": 0.5}, {"threshold": 0}, {"deduplicate": 1}, {"diversity": {}}, {"include": ["explain"]}]
)
def test_balance_goes_with_no_other_order(shared_client, other):
    refused = shared_client.post("/search", json={"query": "dog", "balance": True} | other)
    assert refused.status_code == 422 and "balance goes without" in refused.text
