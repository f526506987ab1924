import asyncio
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store import Entry, Rules, SqliteStore, VectorSearch, parse
from service.store.filters import MAX_NODES, passes
from tests.conftest import on_a_loop
from tests.service.fakes import fake_manifest, vector_of

NUMBERS = [0, 1, -0.0, 1.0, 0.1, 0.1 + 0.2, 2**53 - 1, 2**53, 2**53 + 1, 2.0**53, -(2**53) - 1]
NUMBERS += [2**62, 2**62 + 1, 2.0**62, 2**63 - 1, 2**63 - 2, -(2**63), -(2**63) + 1, 2.0**63, -(2.0**63), 1e300, -1e300]
scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["0", "1", "", "true", "null", "ab", "a", "ba", 'a"b', "a\\b", "a\nb", "é", "aé"])
    | st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4)
)
names = st.sampled_from(["a", "b", 'q"uote', "back\\slash", "$.a", "a.b", "[0]", "", "é"])
metadata = st.dictionaries(names, scalars | st.lists(scalars, max_size=2) | st.dictionaries(names, scalars, max_size=1))
bounds = st.sampled_from(["$gt", "$gte", "$lt", "$lte"])
numbers = st.sampled_from(NUMBERS) | st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(alphabet='ab1é"\\\n', max_size=3)
conditions = (
    scalars
    | st.lists(scalars, max_size=3)
    | st.builds(lambda value: {"$eq": value}, scalars)
    | st.builds(lambda values: {"$in": values}, st.lists(scalars, max_size=3))
    | st.builds(lambda there: {"$exists": there}, st.booleans())
    | st.builds(lambda text: {"$contains": text}, texts.filter(bool))
    | st.dictionaries(bounds, numbers, min_size=1, max_size=2)
    | st.dictionaries(bounds, texts, min_size=1, max_size=2)
)
filters = st.recursive(
    st.dictionaries(names, conditions, min_size=1, max_size=2),
    lambda inner: (
        st.builds(lambda of: {"$and": of}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda of: {"$or": of}, st.lists(inner, min_size=1, max_size=3))
        | st.builds(lambda of: {"$not": of}, inner)
    ),
    max_leaves=4,
)


def holds(raw, held):
    """Return what the grammar means, once more and from the JSON itself."""

    def same(a, b):
        plain = (str, int, float)
        if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
            return a is b
        if isinstance(a, str) or isinstance(b, str):
            return type(a) is type(b) and a == b
        return isinstance(a, plain) and isinstance(b, plain) and a == b

    def ordered(operator, a, b):
        if (isinstance(a, str) and isinstance(b, str)) or all(
            isinstance(each, int | float) and not isinstance(each, bool) for each in (a, b)
        ):
            pair = (a, b)
        else:
            return False
        return {
            "$gt": pair[0] > pair[1],
            "$gte": pair[0] >= pair[1],
            "$lt": pair[0] < pair[1],
            "$lte": pair[0] <= pair[1],
        }[operator]

    def condition(name, wanted):
        if isinstance(wanted, list):
            return name in held and any(same(held[name], each) for each in wanted)
        if not isinstance(wanted, dict):
            return name in held and same(held[name], wanted)
        for operator, value in wanted.items():
            if operator == "$exists":
                passed = (name in held) == value
            elif name not in held:
                passed = False
            elif operator == "$eq":
                passed = same(held[name], value)
            elif operator == "$in":
                passed = any(same(held[name], each) for each in value)
            elif operator == "$contains":
                passed = isinstance(held[name], str | list) and value in held[name]
            else:
                passed = ordered(operator, held[name], value)
            if not passed:
                return False
        return True

    for name, wanted in raw.items():
        if name == "$and":
            passed = all(holds(each, held) for each in wanted)
        elif name == "$or":
            passed = any(holds(each, held) for each in wanted)
        elif name == "$not":
            passed = not holds(wanted, held)
        else:
            passed = condition(name, wanted)
        if not passed:
            return False
    return True


@settings(max_examples=300, deadline=None)
@given(filters, metadata)
def test_one_item_passes_as_the_grammar_says(raw, held):
    assert passes(parse(raw), held) == holds(raw, held)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), held=st.lists(metadata, min_size=1, max_size=40), graph=st.booleans())
@on_a_loop
async def test_a_filtered_search_equals_brute_force(tmp_path_factory, data, held, graph):
    """Over vectors that are in a graph and such as are not, over modalities, at any selectivity."""
    raw = data.draw(filters)
    if some := [(name, value) for each in held for name, value in each.items() if not isinstance(value, list | dict)]:
        # IndexRequest values come mostly from what is held, so that filters match something.
        name, value = data.draw(st.sampled_from(some))
        raw = data.draw(
            st.sampled_from([raw, {name: value}, {"$or": [raw, {name: value}]}, {name: value, "$not": raw}])
        )
    filter = parse(raw)
    kinds = data.draw(st.lists(st.sampled_from(["text", "image"]), min_size=len(held), max_size=len(held)))
    rules = Rules(flat_up_to=5, graph_from=5, rest_at_least=10**6) if graph else Rules()
    store = SqliteStore.open(tmp_path_factory.mktemp("store"), fake_manifest(), rules)
    entries = [
        Entry("default", f"{number}", kind, each, vector_of(f"{number}"))
        for number, (each, kind) in enumerate(zip(held, kinds, strict=True))
    ]
    half = len(entries) // 2
    if half:
        await store.upsert(entries[:half])
        assert await store.indexed(300)
    await store.upsert(entries[half:])
    query = vector_of("query")
    expected = sorted(
        (f"{number}" for number, each in enumerate(held) if holds(raw, each)),
        key=lambda id: -float(query @ vector_of(id)),
    )
    for count in (1, 5, 100):
        hits = (await store.search(VectorSearch("default", query[None], count, filter=filter)))[0]
        assert [hit.item.id for hit in hits] == expected[:count]
    images = [id for id in expected if kinds[int(id)] == "image"]
    hits = (await store.search(VectorSearch("default", query[None], 5, modalities=["image"], filter=filter)))[0]
    assert [hit.item.id for hit in hits] == images[:5]
    assert await store.delete_matching("default", filter) == len(expected)
    left = {item.id for item in (await store.page(None, None, None, 100))[0]}
    assert left == {entry.id for entry in entries} - set(expected)
    await store.close()


def test_a_filter_at_any_selectivity_over_a_graph_of_clusters(tmp_path):
    """Filters that follow the clusters leave nothing near most queries, where a graph's search goes first."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((20, 16))
    of = rng.integers(0, 20, 4_000)
    vectors = centres[of] + 0.3 * rng.standard_normal((4_000, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = vectors[rng.integers(0, 4_000, 50)]

    async def run():
        store = SqliteStore.open(tmp_path, fake_manifest(dimensions=16), Rules(flat_up_to=100))
        await store.upsert(
            [
                Entry("default", f"{n}", "image", {"n": n, "cluster": int(cluster)}, vector)
                for n, (vector, cluster) in enumerate(zip(vectors, of, strict=True))
            ]
        )
        assert await store.indexed(300)
        recalls = {}
        for name, raw, passing in [
            *((f"{share}", {"n": {"$lt": share * 40}}, np.arange(4_000) < share * 40) for share in (1, 10, 50, 90)),
            ("clusters", {"cluster": {"$lt": 3}}, of < 3),
            ("not clusters", {"cluster": {"$gte": 3}}, of >= 3),
        ]:
            found = await store.search(VectorSearch("default", queries, 10, filter=parse(raw)))
            best = np.argsort(-np.where(passing, queries @ vectors.T, -2), axis=1)[:, :10]
            recalls[name] = np.mean(
                [len({int(hit.item.id) for hit in hits} & set(row)) / 10 for hits, row in zip(found, best, strict=True)]
            )
            assert all(len(hits) == 10 and passing[[int(hit.item.id) for hit in hits]].all() for hits in found)
        await store.close()
        return recalls

    assert min(asyncio.run(run()).values()) >= 0.95


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "filter: an object of conditions"),
        ({"a": [[1]]}, "filter.a[0]: a text, a number, true, false or null"),
        ({"a": {}}, "filter.a: an object of operators"),
        ({"a": {"$gte": True}}, "filter.a.$gte: a number or a text"),
        ({"a": {"$gte": None}}, "filter.a.$gte: a number or a text"),
        ({"a": {"$gte": 1, "$lt": "b"}}, "filter.a: the bounds of a range are all numbers or all texts"),
        ({"a": {"$in": 1}}, "filter.a.$in: a list"),
        ({"a": {"$in": [1] * 1_001}}, "filter.a.$in: more than 1000 values"),
        ({"a": {"$exists": 1}}, "filter.a.$exists: true or false"),
        ({"a": {"$contains": ""}}, "filter.a.$contains: a text is expected, not an empty one"),
        ({"a": {"$eq": {}}}, "filter.a.$eq: a text, a number"),
        ({"a": {"$ge": 1}}, "filter.a.$ge: no such operator; there are $eq, $in"),
        ({"a": {"b": 1}}, "filter.a.b: no such operator"),
        ({"$nor": [{"a": 1}]}, "filter.$nor: no such operator here"),
        ({"$or": []}, "filter.$or: a list of at least one filter"),
        ({"$or": {"a": 1}}, "filter.$or: a list of at least one filter"),
        ({"$or": [{"a": 1}, {"b": {"$lt": []}}]}, "filter.$or[1].b.$lt: a number or a text"),
        ({"$and": [{}]}, "filter.$and[0]: a filter of no conditions"),
        ({"$not": {}}, "filter.$not: a filter of no conditions"),
        ({"$not": 1}, "filter.$not: an object of conditions"),
        ({f"{number}": 1 for number in range(MAX_NODES + 1)}, "filter: more than 64 conditions"),
        ({"x" * 100: {"$lt": None}}, "filter." + "x" * 64 + "…"),
    ],
)
def test_a_filter_that_is_refused(raw, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(raw)


def test_a_filter_too_deep():
    raw = {"a": 1}
    for _ in range(20):
        raw = {"$not": raw}
    with pytest.raises(ValueError, match="nested deeper than 8 levels"):
        parse(raw)
