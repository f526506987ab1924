"""Chance gives confidences, "probably nothing here", and the order of several kinds."""

import math

import numpy as np
import pytest

from service.contract.vectors import l2_normalise
from service.retrieval import chance
from service.retrieval.search import Result, _balanced
from service.store import Background, Entry, Item
from service.store.background import measured, rivals, together
from tests.service.fakes import DIMENSIONS
from tests.service.stores import on_a_store, sqlite


def drawn(count, *, towards=None, seed=0):
    """Unit vectors around a direction."""
    noise = np.random.default_rng(seed).normal(size=(count, DIMENSIONS))
    return l2_normalise(noise + (0 if towards is None else 3 * towards))


def entries(vectors, modality="image", first=0):
    return [Entry("default", f"{modality}{first + n}", modality, {}, vector) for n, vector in enumerate(vectors)]


def background(best, *, count=10, sample=10, growth=0.0):
    return Background(count, np.array(best, np.float32), sample, growth)


def test_a_confidence_is_the_share_of_the_bank_that_fits_worse():
    words, items = drawn(len(chance.background_texts()), seed=1), drawn(3, seed=2)
    bank = chance.Bank.of(words, drawn(64, towards=-words.mean(axis=0), seed=3))
    query = words[5]
    fits = np.linspace(-1, 1, len(words))
    count = len(words) - int(0.02 * len(words)) + 1  # the best fitting are taken to be there
    fitting = (0.25 + rivals(words, items)).tolist()

    def judged(kinds, **backgrounds):
        return chance.confidences(query, fitting[: len(kinds)], items[: len(kinds)], kinds, bank, backgrounds)

    [one, same, unknown] = judged(["text", "text", "other"], text=background(fits))
    assert one == same == pytest.approx((fits < 0.25).sum() / count) and unknown is None
    [twice] = judged(["text"], text=background(fits), video=background(fits))
    assert twice == pytest.approx(one**2), "either kind is as likely"
    [less] = judged(["text"], text=background(fits, count=1_000, growth=0.1))
    assert less == pytest.approx((fits + 0.1 * math.log(100) < 0.25).sum() / count)
    assert judged([]) == []


def test_what_a_query_is_like_weighs_its_kinds_and_itself():
    towards = drawn(3, seed=9)
    texts = chance.background_texts()
    rng, count = np.random.default_rng(4), len(texts)
    of_sounds = np.isin(np.arange(count), chance._ROWS["audio"])[:, None]
    words = l2_normalise(rng.normal(size=(count, DIMENSIONS)) / 4 + np.where(of_sounds, towards[0], towards[1]))
    bank = chance.Bank.of(words, l2_normalise(rng.normal(size=(64, DIMENSIONS)) / 4 + towards[2]))
    heard, seen, nonsense = (bank.weights(query, ["image", "audio"]) for query in towards)
    assert heard[0]["audio"] > 0.6 and seen[0]["image"] > 0.9 and sum(heard[0].values()) == pytest.approx(1)
    assert heard[1] == seen[1] == 1 and nonsense[1] < 0.05
    assert bank.weights(towards[0], ["video", "text"])[0] == {"video": 0.5, "text": 0.5}
    items = drawn(2, seed=2)
    known = dict.fromkeys(("image", "text"), background(rng.permutation(np.linspace(-1, 1, count))))
    fitting = (0.6 + rivals(words, items)).tolist()
    picture, text = chance.confidences(towards[2], fitting, items, ["image", "text"], bank, known)
    assert picture == 0 and text > 0.3, "a text may hold what is no word"


@pytest.mark.parametrize(
    ("confidences", "fdr", "kept"),
    [
        ([0.95, 0.5], 0.1, 1),
        ([0.89, 0.89], 0.1, 0),
        ([0.95, 0.83, 0.5], 0.1, 2),  # exp(-0.1 · 2) = 0.819
        ([0.95, 0.7, 0.75], 0.1, 3),  # exp(-0.1 · 3) = 0.741 keeps the third, not the second
        ([0.901], 0.1, 1),
        ([None, 0.99], 0.1, 1),
        ([], 0.1, 0),
    ],
)
def test_results_survive_together(confidences, fdr, kept):
    if confidences == [0.95, 0.7, 0.75]:
        assert chance.surviving(confidences, fdr) == [True, False, False]
        assert chance.surviving([0.95, 0.75, 0.76], fdr) == [True, True, True], "a third makes the second good"
        return
    assert sum(chance.surviving(confidences, fdr)) == kept


def test_a_query_of_the_bank_is_no_rival_of_itself():
    queries, items = drawn(64, seed=1), drawn(40, seed=2)
    found = measured(queries, items)
    for number in (0, 5):  # the first is a rival of items, the other is none
        others = np.delete(queries[::4], number // 4, axis=0) if number % 4 == 0 else queries[::4]
        near = np.sort(items @ others.T, axis=1)[:, -8:].mean(axis=1)
        assert found.best[number] == pytest.approx((items @ queries[number] - near).max(), abs=1e-5)


def test_nothing_is_said_only_of_what_can_be_judged():
    assert chance.nothing([0.999, 0.1]) is False
    assert chance.nothing([1 - chance.PROBABLY - 1e-9, None]) is True
    assert chance.nothing([1 - chance.PROBABLY + 1e-9]) is False
    assert chance.nothing([None, None]) is None
    assert chance.nothing([]) is True


def test_background_queries_are_the_same_everywhere():
    texts = chance.background_texts()
    assert texts == chance.background_texts() and len(set(texts)) == len(texts) > 500
    assert all(text == text.strip().lower() and text for text in texts)


@on_a_store(sqlite)
async def test_a_background_is_that_of_all_items_and_follows_them(store):
    queries = drawn(64, seed=1)
    assert await store.background("default", queries) == {}
    await store.upsert(entries(drawn(40)))
    one = (await store.background("default", queries))["image"]
    vectors = np.stack([(await store.get("default", f"image{n}", with_vector=True)).vector for n in range(40)])
    assert one.count == one.sample == 40
    assert one.best == pytest.approx(measured(queries, vectors).best, abs=1e-6)
    await store.upsert(entries(drawn(1, seed=3), first=40))
    later = (await store.background("default", queries))["image"]
    assert later.count == 41 and later.best is one.best, "a small change keeps the sample"
    await store.upsert(entries(drawn(1_200, seed=4), first=40))
    moved = (await store.background("default", queries))["image"]
    assert moved.count == 1_240 and moved.sample < 1_024 and moved.best.mean() > one.best.mean()
    assert moved.growth > 0 and (moved.fits > moved.best).all()
    await store.upsert(entries(drawn(5, seed=5), "audio"))
    assert set(await store.background("default", queries)) == {"image", "audio"}
    await store.drop_collection("default")
    assert not store._backgrounds._kept


def test_moments_count_among_their_items():
    items, moments, sounds = background([0.1, 0.4]), background([0.3, 0.2], count=30), background([0.0, 0.0])
    merged = together({"video": items}, {"video": moments, "audio": sounds})
    assert merged["video"].count == 40 and merged["video"].fits == pytest.approx([0.3, 0.4])
    assert merged["audio"] is sounds


@pytest.fixture(scope="module")
def kinds(shared_client):
    """Forty sounds that are like "dog" and more like another word, forty pictures that are not, one that is very."""
    found, elsewhere = shared_client.post("/embed", json={"inputs": ["dog", "zebra"]}).json()["embeddings"]
    dog, rng = np.array(found["embedding"]), np.random.default_rng(0)
    noise = rng.normal(size=(81, len(dog))) / math.sqrt(len(dog))
    noise -= np.outer(noise @ dog, dog)  # at a right angle: what is like it is so by the shares below alone
    other = np.array(elsewhere["embedding"])
    vectors = [
        *(0.1 * rng.normal(size=(40, 1)) * dog + noise[:40]),
        *(1.5 * dog + 4 * other + noise[40:80]),
        3 * dog + noise[80],
    ]
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
    values = {"image": [0.99, 0.97, 0.6], "audio": [0.98, 0.96, 0.95, 0.1], "text": [None, None], "video": [None]}
    results = [
        Result(Item("c", f"{kind}{n}", kind, {}, "", "", None), 0.5, similarity=0.5, confidence=confidence)
        for kind, of_kind in values.items()
        for n, confidence in enumerate(of_kind)
    ]
    order = ["image0", "audio0", "image1", "audio1", "audio2", "image2", "audio3", "text0", "video0", "text1"]
    assert [result.item.id for result in _balanced(results, 9)] == order
    assert [result.item.id for result in _balanced(results, 1)] == ["image0", "audio0", "text0", "video0"]


def test_a_verdict_for_each_query(kinds):
    answer = kinds(queries=["dog", {"id": "image80"}], include=["confidence"], top_k=4)
    assert answer["nothing"][1] is None, "only texts are judged"
    assert all(result["confidence"] is None for result in answer["results"][1])
    assert answer["nothing"][0] is (max(one["confidence"] for one in answer["results"][0]) < 1 - chance.PROBABLY)
    assert kinds(include=["confidence"], top_k=4)["nothing"] is answer["nothing"][0]
    ordered = kinds(include=["confidence"], top_k=4, diversity={"lambda": 1})
    by_id = {one["id"]: one["confidence"] for one in kinds(include=["confidence"], top_k=4)["results"]}
    assert {one["id"]: one["confidence"] for one in ordered["results"]} == pytest.approx(by_id)
    assert kinds(include=["confidence"], filter={"half": 7})["nothing"] is True


def test_fdr_keeps_what_is_no_chance(kinds):
    options = {"top_k": 40, "include": ["confidence"], "modalities": ["image"]}
    every = kinds(**options)["results"]
    strict, loose = (kinds(**options, fdr=fdr)["results"] for fdr in (0.1, 0.5))
    assert [one["id"] for one in strict] == [one["id"] for one in every][: len(strict)] or len(strict) < len(every)
    expected = [
        [one for one, keep in zip(every, chance.surviving([e["confidence"] for e in every], fdr), strict=True) if keep]
        for fdr in (0.1, 0.5)
    ]
    assert [strict, loose] == expected and loose[0]["id"] == "image80"
    balanced = kinds(top_k=3, balance=True, fdr=0.5)["results"]
    assert balanced[0]["id"] == "image80" and len(balanced) < 6


def test_fdr_judges_texts_alone(shared_client, kinds):
    refused = shared_client.post("/search", json={"query": {"id": "image80"}, "collection": "kinds", "fdr": 0.1})
    assert refused.status_code == 422 and "only queries that are texts" in refused.text
    for rate in (0, 1, "a"):
        assert shared_client.post("/search", json={"query": "dog", "fdr": rate}).status_code == 422


@pytest.mark.parametrize(
    "other", [{"correction": 0.5}, {"threshold": 0}, {"deduplicate": 1}, {"diversity": {}}, {"include": ["explain"]}]
)
def test_balance_goes_with_no_other_order(shared_client, other):
    refused = shared_client.post("/search", json={"query": "dog", "balance": True} | other)
    assert refused.status_code == 422 and "balance goes without" in refused.text
