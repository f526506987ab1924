"""Corrections, fusion, thresholds, deduplication, reranking and diversity, against the same thing written out."""

import asyncio
import base64

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from service.contract.vectors import l2_normalise
from service.errors import InputFailed, InvalidRequest
from service.retrieval.late_interaction import maxsim, transport
from service.retrieval.search import Ordering, Searcher
from service.schemas.search import Diversity, Keywords, Query, Rerank, SearchBatchRequest, SearchRequest
from service.store import Entry, SqliteStore
from tests.service.fakes import DIMENSIONS, FakeEmbedder, fake_manifest, vector_of
from tests.service.stores import in_sqlite

QUERY = TypeAdapter(Query)
MEANS = {"image": vector_of("image mean") * 0.6, "text": vector_of("text mean") * 0.7}
MANIFEST = fake_manifest().model_copy(update={"means": {name: mean.tolist() for name, mean in MEANS.items()}})
NAMES = ("a dog", "a wet dog", "the cat", "rain on a dog", "sea and rain", "clock")
ENTRIES = [Entry("default", name, "text", {}, vector_of(name), text=name) for name in NAMES]
ENTRIES += [Entry("default", f"{name}.png", "image", {}, vector_of(f"{name}.png")) for name in NAMES]
ENTRIES += [Entry("default", f"copy {n}", "image", {}, vector_of("a dog.png")) for n in range(30)]


class FakeTokens:
    """Token vectors by hashing: as many as a text has words."""

    available = True

    async def embed(self, inputs, *arguments):
        return [tokens_of(each.text) for each in inputs]


def tokens_of(text):
    return np.stack([vector_of(f"token {word}") for word in text.split()])


def search(path, *queries, entries=ENTRIES, keep=False, top_k=10, manifest=MANIFEST, tokens=None, **options):
    options.setdefault("ordering", Ordering())

    async def run(store):
        await store.keep_tokens("default", keep)
        await store.upsert(entries)
        asked = [QUERY.validate_python(query) for query in queries]
        searcher = Searcher(FakeEmbedder(manifest), store, tokens)
        return await searcher.search(asked, top_k=top_k, collection="default", **options)

    return in_sqlite(path, run, manifest)


def ids(results):
    return [each.item.id for each in results]


def ranked(query, strength=0.0, entries=ENTRIES):
    """Every item with its corrected similarity, best first."""
    vector = vector_of(query).astype(np.float64)
    scores = {}
    for entry in entries:
        offset = float(vector @ MEANS[entry.modality]) if entry.modality in MEANS else 0.0
        scores[entry.id] = float(vector @ entry.vector) - strength * offset
    return sorted(scores.items(), key=lambda pair: -pair[1])


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_the_correction_takes_the_similarity_to_the_modality_off(tmp_path, strength):
    distinct = [entry for entry in ENTRIES if not entry.id.startswith("copy")]
    [results] = search(
        tmp_path, "a night", entries=distinct, top_k=7, ordering=Ordering(correction=strength), explain=True
    )
    wanted = ranked("a night", strength, distinct)[:7]
    assert ids(results) == [name for name, _ in wanted]
    np.testing.assert_allclose([each.score for each in results], [score for _, score in wanted], atol=1e-6)
    for each in results:
        explained = each.explanation
        assert each.score == pytest.approx(explained["similarity"] - explained.get("correction", 0.0), abs=1e-9)


def test_a_correction_needs_means(tmp_path):
    with pytest.raises(InvalidRequest, match="no means of its modalities"):
        search(tmp_path, "x", manifest=fake_manifest(), ordering=Ordering(correction=1.0))


def test_the_threshold_leaves_out_what_is_less_similar(tmp_path):
    everything = ranked("x", 0.5)
    limit = everything[8][1] - 1e-6
    [results] = search(tmp_path, "x", top_k=50, ordering=Ordering(threshold=limit, correction=0.5))
    assert sorted(ids(results)) == sorted(name for name, score in everything if score >= limit)
    assert search(tmp_path, "x", "y", ordering=Ordering(threshold=2.0)) == [[], []]


def test_repetitions_are_left_out_and_others_take_their_place(tmp_path):
    photo = {"image": base64.b64encode(b"a dog.png").decode()}
    assert all(each.score > 0.999 for each in search(tmp_path, photo, top_k=10)[0])
    [results] = search(tmp_path, photo, top_k=10, ordering=Ordering(deduplicate=1.0))
    assert len(results) == 10
    assert sum(each.item.id.startswith("copy") or each.item.id == "a dog.png" for each in results) == 1
    [all_of_them] = search(tmp_path, photo, top_k=100, ordering=Ordering(deduplicate=1.0))
    assert len(all_of_them) == 12


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), limit=st.floats(0.3, 0.99), top_k=st.integers(1, 8))
def test_near_repetitions_equal_those_of_the_whole_ranking(tmp_path_factory, seed, limit, top_k):
    vectors = {entry.id: entry.vector for entry in ENTRIES}
    [results] = search(
        tmp_path_factory.mktemp("store"), f"{seed}", top_k=top_k, ordering=Ordering(deduplicate=limit), with_vector=True
    )
    kept = []
    for name, _ in ranked(f"{seed}"):
        if all(float(vectors[name] @ vectors[other]) < limit - 1e-6 for other in kept):
            kept.append(name)
    # Equal vectors are equal results, whichever of them is first.
    np.testing.assert_allclose(
        [vectors[name] for name in ids(results)], [vectors[name] for name in kept[:top_k]], atol=1e-6
    )


def test_words_and_vectors_are_fused_by_reciprocal_rank(tmp_path):
    ordering = Ordering(keywords=Keywords(weight=0.25))
    [results] = search(tmp_path, "dog", top_k=100, ordering=ordering, explain=True)
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
    [only_words] = search(tmp_path, "x", top_k=3, ordering=Ordering(keywords=Keywords(query="dog", weight=1)))
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
        ordering=Ordering(keywords=keywords),
        explain=True,
    )
    explained = next(each for each in results if each.item.id == "far").explanation
    assert explained["vector_rank"] is None and explained["keyword_rank"] == 1
    assert explained["similarity"] == pytest.approx(-1, abs=1e-5)
    limited = Ordering(keywords=keywords, threshold=-0.5)
    assert "far" not in ids(search(tmp_path, {"text": "far away"}, entries=[far], ordering=limited)[0])


def test_the_item_itself_is_not_found_by_its_words(tmp_path):
    ordering = Ordering(keywords=Keywords(query="dog"))
    assert "a dog" not in ids(search(tmp_path, {"id": "a dog"}, top_k=100, ordering=ordering)[0])


def test_diversity_reorders_the_pool(tmp_path):
    [plain] = search(tmp_path, "x", top_k=40, with_vector=True)
    [diverse] = search(tmp_path, "x", top_k=5, ordering=Ordering(diversity=Diversity(**{"lambda": 0.3}, pool=40)))
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
    same = Ordering(diversity=Diversity(**{"lambda": 1}))
    assert [each.score for each in search(tmp_path, "x", ordering=same)[0]] == [each.score for each in plain[:10]]


def test_the_parts_of_a_composed_query_are_explained(tmp_path):
    query = {"compose": [{"text": "dog"}, {"id": "clock", "weight": 0.5}, {"text": "night", "weight": -0.25}]}
    [results] = search(tmp_path, query, explain=True, top_k=40)
    total = l2_normalise(vector_of("dog") + 0.5 * vector_of("clock") - 0.25 * vector_of("night"))
    vectors = {entry.id: entry.vector for entry in ENTRIES}
    for each in results:
        parts = each.explanation["parts"]
        assert each.score == each.explanation["similarity"] == pytest.approx(total @ vectors[each.item.id], abs=1e-6)
        assert sum(part["contribution"] for part in parts) == pytest.approx(each.score, abs=1e-6)
        assert [part["weight"] for part in parts] == [1.0, 0.5, -0.25]
        for part, name in zip(parts, ("dog", "clock", "night"), strict=True):
            assert part["similarity"] == pytest.approx(vector_of(name) @ vectors[each.item.id], abs=1e-6)
    assert "parts" not in search(tmp_path, "dog", explain=True)[0][0].explanation


WITH_TOKENS = [Entry("default", name, "text", {}, vector_of(name), text=name, tokens=tokens_of(name)) for name in NAMES]
BARE = Entry("default", "bare", "vector", {}, vector_of("bare"))


class TestRerank:
    @pytest.mark.parametrize(("method", "compare"), [("maxsim", maxsim), ("transport", transport)])
    @pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
    def test_the_best_are_ordered_by_their_tokens(self, tmp_path, method, compare, weight):
        [results] = search(
            tmp_path,
            "the wet cat",
            entries=[*WITH_TOKENS, BARE],
            keep=True,
            tokens=FakeTokens(),
            ordering=Ordering(rerank=Rerank(method=method, weight=weight, pool=50)),
            explain=True,
        )
        query, query_tokens = vector_of("the wet cat"), tokens_of("the wet cat")
        wanted = {"bare": float(query @ vector_of("bare"))}
        for name in NAMES:
            # Stored as float16.
            held = tokens_of(name).astype(np.float16).astype(np.float32)
            wanted[name] = (1 - weight) * float(query @ vector_of(name)) + weight * compare(query_tokens, [held])[0]
        assert ids(results) == sorted(wanted, key=lambda name: -wanted[name])
        for each in results:
            assert each.score == pytest.approx(wanted[each.item.id], abs=1e-5)
            assert (each.explanation["tokens"] is None) == (each.item.id == "bare")
            if method == "maxsim" and each.item.id != "bare":
                shown = each.explanation["heat"]
                held = tokens_of(each.item.id)
                np.testing.assert_allclose(shown, (held @ query_tokens.T).max(1), atol=2e-3)

    def test_composed_queries_add_up_and_a_stored_item_brings_its_own(self, tmp_path):
        query = {"compose": [{"id": "a dog", "weight": 2}, {"text": "the sea", "weight": -1}]}
        [results] = search(
            tmp_path,
            query,
            entries=WITH_TOKENS,
            keep=True,
            tokens=FakeTokens(),
            ordering=Ordering(rerank=Rerank(method="maxsim", weight=1.0)),
        )
        for each in results:
            held = [tokens_of(each.item.id)]
            score = (2 * maxsim(tokens_of("a dog"), held)[0] - maxsim(tokens_of("the sea"), held)[0]) / 3
            assert each.score == pytest.approx(score, abs=2e-3)

    def test_what_cannot_be_reranked(self, tmp_path):
        ordering = Ordering(rerank=Rerank(method="maxsim"))
        with pytest.raises(InvalidRequest, match="this bundle has no token vectors"):
            search(tmp_path, "x", ordering=ordering)
        with pytest.raises(InvalidRequest, match="'default' keeps no token vectors"):
            search(tmp_path, "x", ordering=ordering, tokens=FakeTokens())
        with pytest.raises(InputFailed, match=r"queries\[1\]: a vector has no tokens"):
            search(tmp_path, "x", {"vector": [1.0] * DIMENSIONS}, ordering=ordering, tokens=FakeTokens(), keep=True)
        with pytest.raises(InputFailed, match=r"queries\[0\]: the stored item has no tokens"):
            search(tmp_path, {"id": "clock"}, ordering=ordering, tokens=FakeTokens(), keep=True)

    def test_token_vectors_go_when_they_are_no_longer_kept(self, tmp_path):
        async def run():
            store = SqliteStore.open(tmp_path, MANIFEST)
            await store.upsert(WITH_TOKENS)
            assert await store.tokens("default", NAMES) == {}
            await store.keep_tokens("default", True)
            await store.upsert(WITH_TOKENS)
            held = await store.tokens("default", NAMES)
            np.testing.assert_allclose(held["a wet dog"], tokens_of("a wet dog"), atol=1e-3)
            await store.upsert([Entry("default", "a dog", "vector", {}, vector_of("a dog"))])
            await store.delete("default", ["clock"])
            assert set(await store.tokens("default", NAMES)) == set(NAMES) - {"a dog", "clock"}
            await store.keep_tokens("default", False)
            assert await store.tokens("default", NAMES) == {}
            await store.close()

        asyncio.run(run())


def test_everything_at_once_keeps_its_promises(tmp_path):
    ordering = Ordering(
        correction=0.5,
        threshold=-0.9,
        keywords=Keywords(query="dog"),
        deduplicate=0.999,
        diversity=Diversity(**{"lambda": 0.8}),
    )
    results = search(tmp_path, "dog", {"id": "clock"}, top_k=4, ordering=ordering, explain=True)
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
        ({"rerank": {"method": "cross"}}, "'maxsim' or 'transport'"),
        ({"rerank": {"method": "maxsim", "pool": 1001}}, "less than or equal to 1000"),
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
        ({"rerank": {"method": "maxsim", "pool": 1000}, "queries": ["x"] * 26}, "queries × pool"),
    ],
)
def test_requests_of_many_queries_that_are_refused(body, message):
    with pytest.raises(ValidationError, match=message):
        SearchBatchRequest.model_validate(body)
