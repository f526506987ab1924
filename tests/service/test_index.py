import threading

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.vectors import l2_normalise
from service.store.index import Index

NONE = np.empty(0, np.int64)


def unit(rng, count, dimensions=8):
    return l2_normalise(rng.standard_normal((count, dimensions)))


def brute_force(queries, vectors, keys, count):
    """The `count` best keys per query, by plain matrix product."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return [[int(keys[i]) for i in np.argsort(-row, kind="stable")[:count]] for row in scores]


def filled(rng, count, modalities=("image", "text", "audio")):
    index = Index(8)
    vectors, keys = unit(rng, count), rng.permutation(10 * count)[:count].astype(np.int64) + 1
    kinds = rng.choice(modalities, count)
    for kind in modalities:
        index.put(kind, keys[kinds == kind], vectors[kinds == kind], NONE)
    return index, vectors, keys, kinds


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 30), st.floats(0, 1))
def test_a_restricted_search_is_exact_at_any_selectivity(seed, size, count, selectivity):
    rng = np.random.default_rng(seed)
    index, vectors, keys, _ = filled(rng, size)
    allowed = rng.random(size) < selectivity
    queries = unit(rng, 3)
    found = index.search(queries, count, among=np.sort(keys[allowed]))
    assert [[key for key, _ in hits] for hits in found] == brute_force(queries, vectors[allowed], keys[allowed], count)
    for query, hits in zip(queries, found, strict=True):
        for key, score in hits:
            assert abs(score - float(query @ vectors[keys == key][0])) < 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sets(st.sampled_from(["image", "text", "audio"])))
def test_a_search_by_modality_is_exact(seed, wanted):
    rng = np.random.default_rng(seed)
    index, vectors, keys, kinds = filled(rng, 60)
    allowed = np.isin(kinds, list(wanted))
    queries = unit(rng, 2)
    found = index.search(queries, 10, modalities=list(wanted))
    assert [[key for key, _ in hits] for hits in found] == brute_force(queries, vectors[allowed], keys[allowed], 10)


def test_equal_scores_come_in_the_order_of_the_keys():
    index = Index(8)
    vector = unit(np.random.default_rng(0), 1)
    index.put("text", np.array([7, 3]), vector.repeat(2, axis=0), NONE)
    index.put("image", np.array([5]), vector, NONE)
    assert [key for key, _ in index.search(vector, 3)[0]] == [3, 5, 7]


def test_an_empty_index_finds_nothing():
    queries = unit(np.random.default_rng(0), 2)
    assert Index(8).search(queries, 5) == [[], []]
    assert filled(np.random.default_rng(0), 5)[0].search(queries, 5, among=NONE) == [[], []]


def test_put_replaces_across_modalities():
    rng = np.random.default_rng(1)
    index, one = Index(8), np.array([1])
    old, new = unit(rng, 1), unit(rng, 1)
    index.put("image", one, old, NONE)
    index.put("text", one, new, replaced=one)
    assert index.keys().tolist() == [1]
    assert index.search(new, 5, modalities=["image"]) == [[]]
    assert abs(index.search(new, 5)[0][0][1] - 1) < 1e-6


def test_searches_while_vectors_are_replaced_always_see_every_key_once():
    rng = np.random.default_rng(2)
    index, vectors, keys, _ = filled(rng, 100, modalities=("text",))
    done = threading.Event()
    failures = []

    def search():
        while not done.is_set():
            found = [key for key, _ in index.search(vectors[:1], 100)[0]]
            if sorted(found) != sorted(keys.tolist()):
                failures.append(found)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        chosen = rng.choice(100, 10, replace=False)
        index.put("text", keys[chosen], unit(rng, 10), replaced=keys[chosen])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
