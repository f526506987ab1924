import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.contract.vectors import l2_normalise
from service.store import kinds
from service.store.columns import Columns, Growing, _cells, _encoded
from service.store.filters import parse
from service.store.index import Index
from service.store.kinds import IndexRequest, Rules
from service.store.records import Records


class Rows:
    """Reads what the tests wrote, as the store reads its rows."""

    def __init__(self):
        self.held = {}

    def vectors(self, slots):
        found = [slot for slot in slots.tolist() if slot in self.held]
        return np.array(found, np.int64), np.stack([self.held[slot] for slot in found])

    def metadata(self, slots, holding):
        raise AssertionError("nothing here asks for metadata")


NOTHING = Rows()


def unit(rng, count, dimensions=8):
    return l2_normalise(rng.standard_normal((count, dimensions)))


def brute_force(queries, vectors, slots, count):
    """The `count` best slots per query, by plain matrix product."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return [[int(slots[i]) for i in np.argsort(-row, kind="stable")[:count]] for row in scores]


def record(slot):
    return b"record %d" % slot


def put(index, modality, slots, vectors, replaced=()):
    metadata = [{"slot": slot} for slot in slots]
    records = list(map(record, slots))
    index.put(modality, np.array(slots), vectors, metadata, records, np.array(sorted(replaced), np.int64))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.sets(st.sampled_from(["image", "text", "audio"])))
def test_a_search_by_modality_is_exact(seed, size, wanted):
    rng = np.random.default_rng(seed)
    index = Index(8)
    vectors, slots, of = unit(rng, size), np.arange(1, size + 1), rng.choice(["image", "text", "audio"], size)
    for slot, kind, vector in zip(slots.tolist(), of, vectors, strict=True):
        put(index, kind, [slot], vector[None])
    allowed = np.isin(of, list(wanted))
    queries = unit(rng, 2)
    found = index.search(queries, 10, NOTHING, modalities=list(wanted))
    assert [[each.slot for each in hits] for hits in found] == brute_force(
        queries, vectors[allowed], slots[allowed], 10
    )


def test_equal_scores_come_in_the_order_of_the_slots():
    index = Index(8)
    vector = unit(np.random.default_rng(0), 1)
    put(index, "text", [3], vector)
    put(index, "image", [5], vector)
    put(index, "text", [7], vector)
    assert [each.slot for each in index.search(vector, 3, NOTHING)[0]] == [3, 5, 7]


@pytest.mark.parametrize("alike", [6, 700])
def test_fewer_results_are_the_first_of_more_whatever_is_equal(alike):
    """The same content under many ids: which of it is among the best is no accident of the search."""
    rng, index = np.random.default_rng(0), Index(8)
    query, same = np.eye(8, dtype=np.float32)[:1], unit(rng, 1)
    same = np.abs(same)  # near, but two that are stored after it are nearer
    vectors = np.concatenate([unit(rng, 50), np.repeat(same, alike, axis=0), query, query])
    put(index, "text", list(range(1, len(vectors) + 1)), vectors)
    [every] = index.search(query, len(vectors), NOTHING)
    slots = [each.slot for each in every]
    first = slots.index(51)
    assert slots[first : first + alike] == list(range(51, 51 + alike))
    for count in range(1, first + alike + 2, 1 + alike // 50):
        for queries in (query, np.concatenate([query, unit(rng, 24)])):
            assert [each.slot for each in index.search(queries, count, NOTHING)[0]] == slots[:count]


def test_an_empty_index_finds_nothing():
    queries = unit(np.random.default_rng(0), 2)
    assert Index(8).search(queries, 5, NOTHING) == [[], []]


def test_put_replaces_across_modalities():
    rng = np.random.default_rng(1)
    index, old, new = Index(8), unit(rng, 1), unit(rng, 1)
    put(index, "image", [1], old)
    put(index, "text", [2], new, replaced=[1])
    assert index.slots().tolist() == [2]
    assert index.search(new, 5, NOTHING, modalities=["image"]) == [[]]
    assert abs(index.search(new, 5, NOTHING)[0][0].score - 1) < 1e-6


def test_blocks_are_searched_to_their_last_row():
    """More rows than a block holds, written in pieces that do not fit it."""
    rng = np.random.default_rng(3)
    dimensions = 2**16  # 64 rows in a block
    index, vectors = Index(dimensions), unit(rng, 150, dimensions)
    for start in range(0, 150, 50):
        put(index, "text", list(range(start, start + 50)), vectors[start : start + 50])
    for row in (0, 63, 64, 127, 128, 149):
        [[found]] = index.search(vectors[row : row + 1], 1, NOTHING)
        assert found.slot == row and abs(found.score - 1) < 1e-5 and found.record == record(row)


def test_searches_while_vectors_are_replaced_and_indexes_switched_always_see_every_item_once():
    rng = np.random.default_rng(2)
    index, rows = Index(8, IndexRequest("hnsw")), Rows()
    vectors = unit(rng, 100)
    current = dict(enumerate(range(1, 101)))  # item → slot
    rows.held = dict(zip(current.values(), vectors, strict=True))
    put(index, "text", list(current.values()), vectors)
    done, failures = threading.Event(), []
    item_of = {slot: item for item, slot in current.items()}

    def search():
        while not done.is_set():
            hits = index.search(vectors[:1], 100, NOTHING)[0]
            found = [item_of[each.slot] for each in hits]
            if sorted(found) != list(range(100)) or any(each.record != record(each.slot) for each in hits):
                failures.append(found)

    threads = [threading.Thread(target=search, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    rules = Rules(graph_from=10, rest_at_least=20, dead_share=0.3)
    switched, slot = 0, 101
    for _ in range(200):
        chosen = rng.choice(100, 10, replace=False).tolist()
        fresh = unit(rng, 10)
        new = list(range(slot, slot + 10))
        slot += 10
        item_of |= dict(zip(new, chosen, strict=True))
        rows.held |= dict(zip(new, fresh, strict=True))
        put(index, "text", new, fresh, replaced=[current[item] for item in chosen])
        current |= dict(zip(chosen, new, strict=True))
        if planned := index.plan(rules):
            modality, view, wanted, more = planned
            kept = np.arange(view.count) if more else np.flatnonzero(view.alive)
            # What is written between the look and the switch is carried over.
            if more:
                batch = rows.vectors(view.slots[view.indexed :])[1]
                built = kinds.extend(view.built, iter([batch]), lambda: False)
            else:
                batch = rows.vectors(view.slots[kept])[1]
                built = kinds.build(wanted, 8, len(kept), lambda count: batch[:count], iter([batch]), lambda: False)  # noqa: B023
            put(index, "text", [slot], fresh[:1], replaced=[current[0]])
            rows.held[slot], item_of[slot], current[0] = fresh[0], 0, slot
            slot += 1
            index.switch(modality, view, built, [], kept)
            switched += 1
    done.set()
    for thread in threads:
        thread.join()
    assert failures == [] and switched > 5
    assert index.slots().tolist() == sorted(current.values())
    assert index.views()["text"].count < 1_000  # the dead of 2,000 writes were left behind
    for each in index.search(vectors[:1], 100, NOTHING)[0]:
        assert (each.modality, each.record) == ("text", record(each.slot))


def test_a_filter_that_leaves_nothing_near_the_query_is_answered_exactly():
    rng = np.random.default_rng(3)
    centres = unit(rng, 2, 16)
    of = rng.integers(0, 2, 4_000)
    vectors = l2_normalise(centres[of] + 0.1 * rng.standard_normal((4_000, 16)).astype(np.float32))
    slots = np.arange(1, 4_001)
    index = Index(16, IndexRequest("hnsw"))
    index.put("text", slots, vectors, [{"of": int(each)} for each in of], [b""] * len(slots))
    [modality, view, chosen, _] = index.plan(Rules(graph_from=10, step=10_000))
    built = kinds.build(chosen, 16, 4_000, lambda count: vectors[:count], iter([vectors]), lambda: False)
    index.switch(modality, view, built, [], np.arange(4_000))
    # Half of all pass, and where the queries are, none: a graph would stop among its neighbours.
    near = l2_normalise(centres[:1] + 0.1 * rng.standard_normal((20, 16)).astype(np.float32))
    found = index.search(near, 10, NOTHING, filter=parse({"of": 1}))
    passing = of == 1
    assert [[each.slot for each in hits] for hits in found] == brute_force(near, vectors[passing], slots[passing], 10)
    shares = built.shares_around(near, passing)
    assert shares.shape == (20,) and (shares < 0.05).all()


def test_the_rule_of_graph_or_scan():
    effort = kinds.Effort()
    assert kinds.graph_rather_than_scan(500_000, 1_000_000, effort, 10, around=0.5)
    assert not kinds.graph_rather_than_scan(500_000, 1_000_000, effort, 10, around=0.01)
    assert not kinds.graph_rather_than_scan(1_000, 1_000_000, effort, 10, around=0.5)
    assert kinds.ef_search(effort, 10, 1.0, 1_000) == kinds.ef_search(effort, 10, 1.0, 100_000) == 128
    assert 250 < kinds.ef_search(effort, 10, 1.0, 1_000_000) < 260
    assert kinds.ef_search(kinds.Effort(ef_search=32), 10, 1.0, 10**6) == 32


def joined(arrays):
    return {name: np.concatenate(pieces) for name, pieces in arrays.items()}


def test_a_deletion_copies_what_it_touches_and_a_switch_hands_over_only_what_came_last(monkeypatch):
    """Counted, in place of timed: neither grows with the number of rows."""
    index, count = Index(2, IndexRequest("ivf_pq")), 10 * 4_096
    index.put("text", np.arange(count), unit(np.random.default_rng(0), count, 2), [{}] * count, [b""] * count)
    before = index.views()["text"]
    index.remove(np.array([5, 7, 4_100, count + 1]))
    after = index.views()["text"]
    assert [old is new for old, new in zip(before.marks, after.marks, strict=True)] == [False, False] + 8 * [True]
    assert before.alive.all() and np.flatnonzero(~after.alive).tolist() == [5, 7, 4_100] and after.dead == 3

    handed_over, carry_over = [], type(index._parts["text"]).carry_over

    def counted(part, kept, base, seen, now, stored):
        handed_over.append((locked := index._changing.locked(), now.count - seen.count))
        vectors = carry_over(part, kept, base, seen, now, stored)
        if not locked:  # the last moment before writes have to wait
            index.remove(np.array([10, count + 2]))
            put(index, "text", [count + 300], unit(np.random.default_rng(2), 1, 2), replaced=[11])
        return vectors

    monkeypatch.setattr(type(index._parts["text"]), "carry_over", counted)
    put(index, "text", list(range(count, count + 300)), unit(np.random.default_rng(1), 300, 2), replaced=[0, 9_000])
    kept = np.flatnonzero(after.alive)
    index.switch("text", after, None, [after.blocks[0][kept]], kept)
    assert handed_over == [(False, 300), (True, 1)]  # writes wait while it is locked
    gone = [0, 5, 7, 10, 11, 4_100, 9_000, count + 2]
    assert index.slots().tolist() == np.setdiff1d(np.arange(count + 301), gone).tolist()


def test_what_an_array_gave_out_stays_as_it_was():
    array = Growing(np.int64)
    array.extend([1, 2])
    before = array.held()
    array.extend(range(1_000))
    assert before.tolist() == [1, 2] and len(array.held()) == 1_002


def test_columns_keep_what_is_kept():
    columns = Columns()
    columns.extend(range(3), [{"a": 1}, {"b": "x"}, {"a": 1, "b": None}])
    kept = columns.kept(np.array([-1, 0, 1]))
    everything = np.ones(2, np.bool_)
    for raw, expected in (({"a": 1}, [False, True]), ({"b": "x"}, [True, False]), ({"b": None}, [False, True])):
        assert kept.select(parse(raw), everything, NOTHING.metadata).tolist() == expected


def test_rare_keys_take_little_memory_and_are_found():
    """They may stay rare or become frequent, and rows of theirs may have been left behind."""
    columns, rows, of_each = Columns(), 300, 100
    metadata = [
        {f"{row} {n}": n for n in range(of_each)} | {"n": row} | ({"late": row} if row >= 150 else {})
        for row in range(rows)
    ]
    cells = sum(map(len, metadata))
    tracemalloc.start()
    for start in range(0, rows, 30):
        columns.extend(range(start, start + 30), metadata[start : start + 30])
    assert tracemalloc.get_traced_memory()[0] < 62 * cells
    tracemalloc.stop()
    assert columns.nbytes() < 22 * cells

    def selected(columns, raw, count):
        return np.flatnonzero(columns.select(parse(raw), np.ones(count, np.bool_), NOTHING.metadata)).tolist()

    assert selected(columns, {"7 3": 3}, rows) == [7] and selected(columns, {"7 3": 4}, rows) == []
    assert selected(columns, {"late": {"$exists": True}}, rows) == list(range(150, rows))
    assert selected(columns, {"n": {"$lt": 5}}, rows) == list(range(5))
    assert selected(columns, {"299 3": {"$exists": True}}, 299) == []  # a view from before that row
    numbers = np.where(np.arange(rows) % 3 == 1, np.arange(rows) // 3, -1)
    kept = columns.kept(numbers)
    assert selected(kept, {"7 3": 3}, 100) == [2] and selected(kept, {"8 3": 3}, 100) == []
    assert selected(kept, {"late": {"$gte": 0}}, 100) == list(range(50, 100))
    assert columns.kept(np.full(rows, -1)).nbytes() == 0
    again = Columns.of_arrays(joined(columns.arrays(250)))
    assert selected(again, {"7 3": 3}, 250) == [7] and selected(again, {"260 3": {"$exists": True}}, 250) == []
    assert selected(again, {"late": {"$lt": 153}}, 250) == [150, 151, 152]
    assert again.nbytes() < columns.nbytes() and not Columns.of_arrays(joined(Columns().arrays(0))).nbytes()
    # What came later is carried over, whether its key has a column by now or not.
    before = columns.kept(np.where(np.arange(160) % 2 == 0, np.arange(160) // 2, -1))
    before.append(columns, 160, np.arange(80, 80 + rows - 160))
    assert selected(before, {"7 3": 3}, 220) == [] and selected(before, {"8 3": 3}, 220) == [4]
    assert selected(before, {"201 3": 3}, 220) == [121]
    assert selected(before, {"late": {"$lt": 162}}, 220) == [75, 76, 77, 78, 79, 80, 81]
    assert selected(before, {"n": {"$gte": 298}}, 220) == [218, 219]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=1_100), max_size=30), st.data())
def test_records_are_given_back_by_row(given_records, data):
    records = Records()
    split = data.draw(st.integers(0, len(given_records)))
    records.extend(given_records[:split])
    records.leave(len(given_records) - split)
    later = np.arange(split, len(given_records))
    assert records.get(later) == [b""] * len(later)
    records.set(later, given_records[split:])
    held = [record if len(record) < 1_024 else b"" for record in given_records]
    assert records.get(np.arange(len(held))) == held
    rows = data.draw(st.lists(st.sampled_from(range(len(held))), unique=True)) if held else []
    kept = records.kept(np.array(rows, np.int64))
    assert kept.get(np.arange(len(rows))) == [held[row] for row in rows]
    assert kept.nbytes() == sum(len(held[row]) for row in rows) + 8 * len(rows)
    again = Records.of_arrays(joined(records.arrays(split)))
    again.extend(given_records[split:])
    assert again.get(np.arange(len(held))) == held


def test_records_fill_one_chunk_after_another():
    records, each = Records(), [bytes([n % 251]) * 1_000 for n in range(10_000)]
    records.extend(each)
    assert records.get(np.arange(10_000)) == each and len(records._chunks) == 3


_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.just([1]),
)


@given(st.one_of(*(st.lists(each, min_size=1) for each in (_values, st.booleans(), st.integers(), st.text()))))
def test_cells_of_one_type_are_encoded_as_each_is(values):
    kinds, encoded = _cells(values)
    assert list(zip(kinds.tolist(), encoded.tolist(), strict=True)) == [_encoded(value) for value in values]


def test_an_index_of_codes_is_extended_as_if_all_had_been_added():
    vectors = unit(np.random.default_rng(0), 3_000)
    spec = kinds.IndexSpec("ivf_pq", None)
    built = kinds.build(spec, 8, 2_000, lambda count: vectors[:count], iter([vectors[:2_000]]), lambda: False)
    extended = kinds.extend(built, iter([vectors[2_000:2_500], vectors[2_500:]]), lambda: False)
    assert built.count == 2_000  # which searches still see
    added = kinds.extend(built, iter([vectors[2_000:]]), lambda: False, copy=False)
    for one, other in zip(*(snapshot.scan(vectors[::50], 10, None) for snapshot in (extended, added)), strict=True):
        assert np.array_equal(one, other)
