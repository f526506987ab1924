"""The feature store: what is written is found, whole rows only, by several writers."""

from pathlib import Path

import numpy as np
import pytest

from training.encode import store as module
from training.encode.store import Keys, Store, as_keys, places


def keys(*numbers: int) -> Keys:
    return np.array([[number, number + 1] for number in numbers], np.uint64)


def row(*numbers: int) -> np.ndarray:
    return np.array([[number, -number, number / 4] for number in numbers], np.float32)


def filled(folder: Path, *numbers: int) -> Store:
    store = Store(folder, 3, np.float16, False)
    with store.writer() as writer:
        writer.add(keys(*numbers), {"pooled": row(*numbers)})  # type: ignore[dict-item]
    return store


def test_rows_come_in_the_order_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHARD", 2)
    store = Store(tmp_path, 3, np.float16, False)
    for number in range(0, 10, 2):
        filled(tmp_path, number, number + 1)
    assert len(list(tmp_path.glob("*.keys"))) == 5
    asked = [7, 0, 0, 99, 3]
    pooled, _, _ = store.read(keys(*asked))
    assert pooled.shape == (5, 3)
    assert np.array_equal(np.asarray(pooled)[[0, 1, 2, 4]], row(7, 0, 0, 3))
    assert np.isnan(pooled[3]).all()
    assert np.array_equal(pooled[1:3], row(0, 0))
    assert np.array_equal(pooled[np.array([4, 0])], row(3, 7))
    assert np.array_equal(pooled[:, 0][:2], [7, 0])
    assert store.missing(keys(5, 99, 98, 99)).tolist() == [1, 2]


@pytest.mark.parametrize("torn", ["pooled", "keys"])
def test_what_was_half_written_is_written_over(tmp_path: Path, torn: str) -> None:
    store = filled(tmp_path, 1, 2)
    with (tmp_path / f"000000.{torn}").open("ab") as file:
        file.write(b"half")  # the process was killed here
    assert store.missing(keys(1, 2, 3)).tolist() == [2]
    filled(tmp_path, 3)
    assert np.array_equal(store.read(keys(1, 2, 3))[0], row(1, 2, 3))


def test_two_writers_have_shards_of_their_own(tmp_path: Path) -> None:
    store = Store(tmp_path, 3, np.float16, False)
    with store.writer() as first, store.writer() as second:
        first.add(keys(1), {"pooled": row(1)})  # type: ignore[dict-item]
        second.add(keys(2), {"pooled": row(2)})  # type: ignore[dict-item]
        first.add(keys(3), {"pooled": row(3)})  # type: ignore[dict-item]
    assert np.array_equal(store.read(keys(1, 2, 3))[0], row(1, 2, 3))
    assert len(list(tmp_path.glob("*.keys"))) == 2


def test_local_vectors_are_as_many_as_an_item_has(tmp_path: Path) -> None:
    store = Store(tmp_path, 3, np.float16, True)
    for number in (1, 2, 5):
        with store.writer() as writer:
            own = {
                "pooled": row(number),
                "tokens": [np.full((number, 3), number)],
                "weights": [np.full(number, 1 / number)],
            }
            writer.add(keys(number), own)  # type: ignore[arg-type]
    size = sum(path.stat().st_size for path in tmp_path.glob("*.tokens"))
    assert size == (1 + 2 + 5) * 3 * 2  # no padding
    _, tokens, weights = store.read(keys(5, 1, 2))
    assert tokens is not None
    assert weights is not None
    assert tokens[np.array([1, 2])].shape == (2, 2, 3)
    assert np.array_equal(tokens[np.array([0])][0], np.full((5, 3), 5))
    assert np.allclose(np.asarray(weights).sum(1), 1, atol=1e-6)


def test_hashes_that_agree_in_their_first_half_are_told_apart() -> None:
    known = np.array([[1, 1], [1, 2], [1, 3], [2, 1]], np.uint64)
    wanted = np.array([[1, 3], [1, 4], [2, 1], [1, 1], [3, 0]], np.uint64)
    assert places(known, wanted).tolist() == [2, -1, 3, 0, -1]
    assert places(known[:0], wanted).tolist() == [-1] * 5
    assert as_keys([bytes(range(32)), bytes(32)]).shape == (2, 2)
