"""Corrections, fusion, thresholds, deduplication and diversity, against the same thing written out."""

import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from service.contract.vectors import l2_normalise
from service.errors import InvalidRequest
from service.retrieval.search import Searcher
from service.schemas.search import Diversity, Keywords, Query, SearchBatchRequest, SearchRequest
from service.store import Entry
from tests.service.fakes import FakeEmbedder, fake_manifest, vector_of
from tests.service.stores import in_sqlite

QUERY = TypeAdapter(Query)
MEANS = {"image": vector_of("image mean") * 0.6, "text": vector_of("text mean") * 0.7}
MANIFEST = fake_manifest().model_copy(update={"means": {name: mean.tolist() for name, mean in MEANS.items()}})
NAMES = ("a dog", "a wet dog", "the cat", "rain on a dog", "sea and rain", "clock")
ENTRIES = [Entry("default", name, "text", {}, vector_of(name), text=name) for name in NAMES]
ENTRIES += [Entry("default", f"{name}.png", "image", {}, vector_of(f"{name}.png")) for name in NAMES]
ENTRIES += [Entry("default", f"copy {n}", "image", {}, vector_of("a dog.png")) for n in range(30)]


def search(path, *queries, entries=ENTRIES, top_k=10, manifest=MANIFEST, **options):
    async def run(store):
        await store.upsert(entries)
        asked = [QUERY.validate_python(query) for query in queries]
        request = SearchBatchRequest.model_construct(queries=asked, top_k=top_k, **options)
        return await Searcher(FakeEmbedder(manifest), store).search(request)

    return in_sqlite(path, run, manifest)


def ids(results):
    return [each.item.id for each in results]


def ranked(query, strength=0.0, entries=ENTRIES):
    """Return every item with its corrected similarity, best first."""
    vector = vector_of(query).astype(np.float64)
    scores = {}
    for entry in entries:
        offset = float(vector @ MEANS[entry.modality]) if entry.modality in MEANS else 0.0
        scores[entry.id] = float(vector @ entry.vector) - strength * offset
    return sorted(scores.items(), key=lambda pair: -pair[1])


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_the_correction_takes_the_similarity_to_the_modality_off(tmp_path, strength):
    distinct = [entry for entry in ENTRIES if not entry.id.startswith("copy")]
    [results] = search(tmp_path, "a night", entries=distinct, top_k=7, correction=strength, include=["explain"])
    wanted = ranked("a night", strength, distinct)[:7]
    assert ids(results) == [name for name, _ in wanted]
    np.testing.assert_allclose([each.score for each in results], [score for _, score in wanted], atol=1e-6)
    for each in results:
        explained = each.explanation
        assert each.score == pytest.approx(explained["similarity"] - explained.get("correction", 0.0), abs=1e-9)


def test_a_correction_needs_means(tmp_path):
    with pytest.raises(InvalidRequest, match="no means of its modalities"):
        search(tmp_path, "x", manifest=fake_manifest(), correction=1.0)


def test_the_threshold_leaves_out_what_is_less_similar(tmp_path):
    everything = ranked("x", 0.5)
    limit = everything[8][1] - 1e-6
    [results] = search(tmp_path, "x", top_k=50, threshold=limit, correction=0.5)
    assert sorted(ids(results)) == sorted(name for name, score in everything if score >= limit)
    assert search(tmp_path, "x", "y", threshold=2.0) == [[], []]


def test_repetitions_are_left_out_and_others_take_their_place(tmp_path):
    photo = {"image": base64.b64encode(b"a dog.png").decode()}
    assert all(each.score > 0.999 for each in search(tmp_path, photo, top_k=10)[0])
    [results] = search(tmp_path, photo, top_k=10, deduplicate=1.0)
    assert len(results) == 10
    assert sum(each.item.id.startswith("copy") or each.item.id == "a dog.png" for each in results) == 1
    [all_of_them] = search(tmp_path, photo, top_k=100, deduplicate=1.0)
    assert len(all_of_them) == 12


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), limit=st.floats(0.3, 0.99), top_k=st.integers(1, 8))
def test_near_repetitions_equal_those_of_the_whole_ranking(tmp_path_factory, seed, limit, top_k):
    vectors = {entry.id: entry.vector for entry in ENTRIES}
    [results] = search(tmp_path_factory.mktemp("store"), f"{seed}", top_k=top_k, deduplicate=limit)
    kept = []
    for name, _ in ranked(f"{seed}"):
        if all(float(vectors[name] @ vectors[other]) < limit - 1e-6 for other in kept):
            kept.append(name)
    # Equal vectors are equal results, whichever of them is first.
    np.testing.assert_allclose(
        [vectors[name] for name in ids(results)], [vectors[name] for name in kept[:top_k]], atol=1e-6
    )


def test_words_and_vectors_are_fused_by_reciprocal_rank(tmp_path):
    [results] = search(tmp_path, "dog", top_k=100, keywords=Keywords(weight=0.25), include=["explain"])
    worded = ["a dog", "a wet dog", "rain on a dog"]  # the shorter, the better by BM25
    places = {name: place for place, (name, _) in enumerate(ranked("dog"), start=1)}
    for each in results:
        rank = places[each.item.id] if not each.item.id.startswith(("copy", "a dog.png")) else None
        explained = each.explanation
        assert rank is None or explained["vector_rank"] == rank
        words = worded.index(each.item.id) + 1 if each.item.id in worded else None
        assert explained["keyword_rank"] == words and (explained["keyword_score"] is None) == (words is None)
        score = 0.75 / (60 + explained["vector_rank"]) + (0.25 / (60 + words) if words else 0)
        assert each.score == explained["fused"] == pytest.approx(score, rel=1e-12)
    assert [each.score for each in results] == sorted((each.score for each in results), reverse=True)
    [only_words] = search(tmp_path, "x", top_k=3, keywords=Keywords(query="dog", weight=1))
    assert ids(only_words) == worded


def test_words_find_what_the_vectors_missed(tmp_path):
    many = [Entry("default", f"{n}", "text", {}, vector_of(f"{n}"), text="filler") for n in range(150)]
    query = vector_of("far away")
    far = Entry("default", "far", "text", {}, -query, text="unmistakable")
    keywords = Keywords(query="unmistakable")
    [results] = search(
        tmp_path,
        {"text": "far away"},
        entries=[*many, far],
        top_k=5,
        keywords=keywords,
        include=["explain"],
    )
    explained = next(each for each in results if each.item.id == "far").explanation
    assert explained["vector_rank"] is None and explained["keyword_rank"] == 1
    assert explained["similarity"] == pytest.approx(-1, abs=1e-5)
    limited = {"keywords": keywords, "threshold": -0.5}
    assert "far" not in ids(search(tmp_path, {"text": "far away"}, entries=[far], **limited)[0])


def test_the_item_itself_is_not_found_by_its_words(tmp_path):
    keywords = Keywords(query="dog")
    assert "a dog" not in ids(search(tmp_path, {"id": "a dog"}, top_k=100, keywords=keywords)[0])


def test_diversity_reorders_the_pool(tmp_path):
    [plain] = search(tmp_path, "x", top_k=40, include=["vector"])
    [diverse] = search(tmp_path, "x", top_k=5, diversity=Diversity(**{"lambda": 0.3}, pool=40))
    relevance = {each.item.id: each.score for each in plain}
    vectors = {each.item.id: each.item.vector for each in plain}
    taken = [plain[0].item.id]
    for each in diverse[1:]:
        gain = {
            name: 0.3 * relevance[name] - 0.7 * max(float(vectors[name] @ vectors[other]) for other in taken)
            for name in relevance
            if name not in taken
        }
        assert gain[each.item.id] == pytest.approx(max(gain.values()), abs=1e-6)
        taken.append(each.item.id)
    assert ids(diverse) != ids(plain[:5])
    same = Diversity(**{"lambda": 1})
    assert [each.score for each in search(tmp_path, "x", diversity=same)[0]] == [each.score for each in plain[:10]]


def test_the_parts_of_a_composed_query_are_explained(tmp_path):
    query = {"compose": [{"text": "dog"}, {"id": "clock", "weight": 0.5}, {"text": "night", "weight": -0.25}]}
    [results] = search(tmp_path, query, include=["explain"], top_k=40)
    total = l2_normalise(vector_of("dog") + 0.5 * vector_of("clock") - 0.25 * vector_of("night"))
    vectors = {entry.id: entry.vector for entry in ENTRIES}
    for each in results:
        parts = each.explanation["parts"]
        assert each.score == each.explanation["similarity"] == pytest.approx(total @ vectors[each.item.id], abs=1e-6)
        assert sum(part["contribution"] for part in parts) == pytest.approx(each.score, abs=1e-6)
        assert [part["weight"] for part in parts] == [1.0, 0.5, -0.25]
        for part, name in zip(parts, ("dog", "clock", "night"), strict=True):
            assert part["similarity"] == pytest.approx(vector_of(name) @ vectors[each.item.id], abs=1e-6)
    assert "parts" not in search(tmp_path, "dog", include=["explain"])[0][0].explanation


def test_everything_at_once_keeps_its_promises(tmp_path):
    results = search(
        tmp_path,
        "dog",
        {"id": "clock"},
        top_k=4,
        correction=0.5,
        threshold=-0.9,
        keywords=Keywords(query="dog"),
        deduplicate=0.999,
        diversity=Diversity(**{"lambda": 0.8}),
        include=["explain"],
    )
    assert [len(each) for each in results] == [4, 4]
    assert all(sum(id.startswith(("copy", "a dog.png")) for id in ids(each)) <= 1 for each in results)
    assert "clock" not in ids(results[1])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"correction": 1.5}, "less than or equal to 1"),
        ({"deduplicate": 0}, "greater than 0"),
        ({"diversity": {"lambda": -1}}, "greater than or equal to 0"),
        ({"diversity": {"trade": 1}}, "trade"),
        ({"rerank": {"method": "maxsim"}}, "rerank"),
        ({"diversity": {"pool": 1001}}, "less than or equal to 1000"),
        ({"keywords": {"query": ""}}, "at least 1 character"),
        ({"query": {"vector": [1.0]}, "keywords": {}}, "keywords.query is needed"),
        ({"query": {"compose": [{"text": "a", "weight": -1}]}, "keywords": {}}, "keywords.query is needed"),
    ],
)
def test_requests_that_are_refused(body, message):
    with pytest.raises(ValidationError, match=message):
        SearchRequest.model_validate({"query": "x"} | body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"include": ["explain"], "top_k": 1000, "queries": ["x"] * 3}, "queries × top_k"),
        ({"diversity": {"pool": 1000}, "queries": ["x"] * 26}, "queries × pool"),
    ],
)
def test_requests_of_many_queries_that_are_refused(body, message):
    with pytest.raises(ValidationError, match=message):
        SearchBatchRequest.model_validate(body)
