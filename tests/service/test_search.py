from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import TypeAdapter, ValidationError

from service.contract.errors import InputError
from service.contract.vectors import l2_normalise
from service.engine.inputs import weighted_sum
from service.errors import InputFailed, InvalidRequest, NotFound
from service.retrieval.search import Searcher, unit_vector
from service.schemas.inputs import File
from service.schemas.search import Query, SearchBatchRequest, SearchRequest, place_queries, place_query
from service.settings import Limits
from service.store import Entry, parse, rows, schema
from tests.service.fakes import DIMENSIONS, FakeEmbedder, vector_of
from tests.service.media import b64
from tests.service.stores import in_sqlite

QUERY = TypeAdapter(Query)
ITEMS = ("dog", "cat", "rain", "sea", "clock")


def search(path, *queries, prepare=None, field="queries", **options):
    """Search a store that holds a text item for each of ITEMS."""

    async def run(store):
        await store.upsert([Entry("default", name, "text", {"name": name}, vector_of(name)) for name in ITEMS])
        asked = [QUERY.validate_python(query) for query in queries]
        request = SearchBatchRequest.model_construct(queries=asked, **options)
        if field == "query":
            request = SearchRequest.model_construct(query=asked[0], **options)
        hits_by_query = await Searcher(FakeEmbedder(), store).search(request)
        return [[(hit.item.id, hit.score) for hit in hits] for hits in hits_by_query]

    return in_sqlite(path, run)


def expected(query, leave_out=()):
    query = l2_normalise(query)
    names = [name for name in ITEMS if name not in leave_out]
    return sorted(((name, float(query @ vector_of(name))) for name in names), key=lambda pair: -pair[1])


def same(found, wanted):
    assert [name for name, _ in found] == [name for name, _ in wanted]
    np.testing.assert_allclose([score for _, score in found], [score for _, score in wanted], atol=1e-6)


def test_what_is_found_is_bounded_in_bytes_over_all_the_queries(tmp_path, monkeypatch):
    assert search(tmp_path, *["dog"] * 40)
    at = schema.now()
    each = len(rows.record("clock", at, at[::-1], '{"name":"clock"}'))  # written a second time
    for most, queries in ((each * 5 * 33, 40), (each * 4, 1)):  # of two pieces together, of one alone
        for place in ("service.retrieval.search", "service.store.search"):
            monkeypatch.setattr(f"{place}.MOST_FOUND_BYTES", most)
        with pytest.raises(InvalidRequest, match="ask for fewer results"):
            search(tmp_path, *["dog"] * queries)
        assert search(tmp_path, "dog", top_k=3)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("dog", vector_of("dog")),
        ({"text": "a wet dog"}, vector_of("a wet dog")),
        ({"image": b64(b"pixels")}, vector_of(b"pixels")),
        ({"audio": b64(b"samples")}, vector_of(b"samples")),
        ({"vector": [3.0, 0, 0, 0, 0, 0, 0, 4]}, np.array([0.6, 0, 0, 0, 0, 0, 0, 0.8])),
        ({"vector": [1e300] * 8}, np.ones(8)),
        ({"compose": [{"text": "dog"}, {"text": "rain", "weight": 0.5}]}, vector_of("dog") + 0.5 * vector_of("rain")),
        ({"compose": [{"id": "dog"}, {"text": "night", "weight": -2}]}, vector_of("dog") - 2 * vector_of("night")),
        (
            {"compose": [{"image": b64(b"p"), "weight": 1e300}, {"vector": [0, 0, 0, 0, 0, 0, 0, 9], "weight": 1e300}]},
            vector_of(b"p") + np.eye(8)[7],
        ),
    ],
)
def test_every_form_of_query(tmp_path, query, wanted):
    same(search(tmp_path, query)[0], expected(wanted))


def test_a_stored_item_is_not_among_its_own_results(tmp_path):
    found = search(tmp_path, {"id": "dog"}, "dog", {"id": "sea"})
    same(found[0], expected(vector_of("dog"), leave_out=["dog"]))
    same(found[1], expected(vector_of("dog")))
    same(found[2], expected(vector_of("sea"), leave_out=["sea"]))
    assert len(search(tmp_path, {"id": "dog"}, top_k=4)[0]) == 4


def test_filters_and_modalities(tmp_path):
    assert [name for name, _ in search(tmp_path, "x", filter=parse({"name": ["dog", "sea"]}))[0]] == [
        name for name, _ in expected(vector_of("x"), leave_out=["cat", "rain", "clock"])
    ]
    assert search(tmp_path, "x", "y", modalities=["image"]) == [[], []]
    # The item itself is within the filter, and is still not a result.
    assert search(tmp_path, {"id": "dog"}, filter=parse({"name": "dog"})) == [[]]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"vector": [1.0, 2.0]}, f"the vector has 2 numbers; this space has {DIMENSIONS}"),
        ({"vector": [0.0] * 8}, "no direction"),
        ({"compose": [{"text": "dog"}, {"text": "dog", "weight": -1}]}, "cancel each other out"),
        ({"compose": [{"text": "dog", "weight": 0}]}, "cancel each other out"),
        ({"image": b64(b"bad")}, "the file is corrupt"),
        ({"image": "not base64!"}, "not valid base64"),
    ],
)
def test_a_bad_query_is_named(tmp_path, query, message):
    with pytest.raises(InputFailed, match=r"queries\[1\].*" + message) as failure:
        search(tmp_path, "fine", query)
    assert failure.value.index == 1
    with pytest.raises(InputFailed, match=r"^query: .*" + message) as failure:
        search(tmp_path, query, field="query")
    assert failure.value.index is None


def test_unknown_names(tmp_path):
    with pytest.raises(NotFound, match="no collection 'never'"):
        search(tmp_path, "dog", collection="never")
    with pytest.raises(NotFound, match="no item 'never'"):
        search(tmp_path, {"compose": [{"id": "never"}]})


finite = st.floats(allow_nan=False, allow_infinity=False)


@given(arrays.arrays(np.float64, 4, elements=finite))
def test_any_finite_vector_is_scaled_or_refused(vector):
    try:
        result = unit_vector(vector.tolist(), 4)
    except InputError:
        assert not vector.any()
    else:
        assert abs(float(np.linalg.norm(result.astype(np.float64))) - 1) < 1e-6


@given(st.lists(st.tuples(st.integers(0, 9), finite), min_size=1, max_size=5))
def test_any_weights_give_a_unit_vector_or_are_refused(parts):
    vectors = [vector_of(f"{seed}") for seed, _ in parts]
    with suppress(InputError):
        result = weighted_sum(vectors, [weight for _, weight in parts])
        assert abs(float(np.linalg.norm(result.astype(np.float64))) - 1) < 1e-6


@given(st.floats(0.01, 100), st.integers(0, 99))
def test_weights_matter_only_in_proportion(factor, seed):
    vectors = [vector_of(f"{seed}"), vector_of(f"{seed + 1}")]
    one, other = weighted_sum(vectors, [1, -0.5]), weighted_sum(vectors, [factor, -0.5 * factor])
    np.testing.assert_allclose(one, other, atol=1e-6)


class TestRequest:
    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({}, "Field required"),
            ({"query": "a", "queries": ["b"]}, "POST /search/batch"),
            ({"queries": ["b"]}, "POST /search/batch"),
            ({"query": "a", "top_k": 0}, "greater than or equal to 1"),
            ({"query": "a", "top_k": 11}, "top_k is at most 10"),
            ({"query": "a", "top_k": "3"}, "valid integer"),
            ({"query": "a", "filter": {"a": {"b": 1}}}, "filter"),
            ({"query": "a", "filter": {"a": float("nan")}}, "not finite"),
            ({"query": "a", "filter": {"a": 2**64 - 1}}, "64 bits"),
            ({"query": "a", "filter": {"a\0": 1}}, "NUL"),
            ({"query": "a", "collection": "../x"}, "pattern"),
            ({"query": "a", "modalities": ["Smell!"]}, "pattern"),
            ({"query": {"text": "a", "image": "b"}}, "exactly one of"),
            ({"query": {"compose": []}}, "at least 1 item"),
            ({"query": {"compose": [{"text": "a", "weight": float("inf")}]}}, "finite"),
            ({"query": {"vector": [float("nan")]}}, "finite"),
            ({"query": {"id": "a\ud800"}}, "string"),
            ({"query": "a", "reorder": True}, "Extra inputs are not permitted"),
        ],
    )
    def test_what_is_refused(self, body, message):
        with pytest.raises(ValidationError, match=message):
            SearchRequest.model_validate(body, context=Limits(top_k=10, inputs=4))

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({}, "Field required"),
            ({"query": "a"}, "POST /search"),
            ({"query": "a", "queries": ["b"]}, "POST /search"),
            ({"queries": []}, "at least 1 item"),
            ({"queries": "a"}, "valid list"),
            ({"queries": ["a"] * 5}, "at most 4 queries"),
            ({"queries": [{"compose": [{"text": "a"}] * 3}] * 2}, "at most 4 parts"),
        ],
    )
    def test_what_is_refused_of_many(self, body, message):
        with pytest.raises(ValidationError, match=message):
            SearchBatchRequest.model_validate(body, context=Limits(top_k=10, inputs=4))

    def test_results_of_one_response_are_bounded(self):
        limits = Limits()
        SearchRequest.model_validate({"query": "a", "top_k": 1000, "include": ["vector"]}, context=limits)
        SearchBatchRequest.model_validate({"queries": ["a"] * 256, "top_k": 100}, context=limits)
        for body in (
            {"queries": ["a"] * 256, "top_k": 101},
            {"queries": ["a"] * 3, "top_k": 1000, "include": ["vector"]},
        ):
            with pytest.raises(ValidationError, match="queries × top_k"):
                SearchBatchRequest.model_validate(body, context=limits)

    def test_files_are_queries(self):
        one, two = File("a", b"1"), File("b", b"2")
        for place, body, files, wanted in (
            (place_query, {}, [one], {"query": one}),
            (place_query, {"query": "text"}, [], {"query": "text"}),
            (place_queries, {}, [one], {"queries": [one]}),
            (place_queries, {"queries": ["text"]}, [one, two], {"queries": ["text", one, two]}),
            (place_queries, {"queries": "text"}, [one], {"queries": "text"}),
        ):
            place(body, files)
            assert body == wanted
        for body, files in (({"query": "text"}, [one]), ({}, [one, two])):
            place_query(body, files)
            with pytest.raises(ValidationError, match="POST /search/batch"):
                SearchRequest.model_validate(body)
