"""Features of single items in a folder: one row each, found by the hash of what the item holds.

A store only grows. Each writer appends to shards of its own, `NNNNNN.keys` and one file per field, and a row is there
once its key is: a run that is killed loses the rows of one call, and processes may write side by side. A changed or
added item is one new row; an item that cannot be read has none.
"""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

KEY_BYTES = 16
_SHARD = 65_536  # rows
_SHARD_BYTES = 2**30
_PARTS = ("counts", "tokens", "weights")
"""Files of local vectors: how many a row has, the vectors one after another, and what averages them."""

Keys = NDArray[np.uint64]
"""(N, 2): the first 16 bytes of each item's hash."""


def as_keys(digests: Sequence[bytes]) -> Keys:
    """Hashes of at least 16 bytes → keys (N, 2)."""
    return np.frombuffer(b"".join(digest[:KEY_BYTES] for digest in digests), np.uint64).reshape(-1, 2)


def places(known: Keys, asked: Keys) -> NDArray[np.int64]:
    """Return the row of each wanted key among the known ones, or -1."""
    order = np.argsort(known[:, 0], kind="stable")
    first = known[order, 0]
    at = np.searchsorted(first, asked[:, 0])
    result = np.full(len(asked), -1, np.int64)
    left = np.flatnonzero(at < len(known))
    while len(left):  # more than once only where two hashes agree in their first half
        left = left[first[at[left]] == asked[left, 0]]
        right = known[order[at[left]], 1] == asked[left, 1]
        result[left[right]] = order[at[left[right]]]
        left = left[~right]
        at[left] += 1
        left = left[at[left] < len(known)]
    return result


class Rows:
    """Rows (N, d) of a store's shards as an array that is read when it is indexed; float32; NaN for an absent item."""

    def __init__(self, shards: Sequence[NDArray[Any]], rows: NDArray[np.int64], width: int) -> None:
        self._shards, self._rows = shards, rows
        self._starts = np.cumsum([0, *map(len, shards)])
        self.shape = (len(rows), width)
        self.dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        if isinstance(index, tuple):
            whole: NDArray[np.float32] = self[index[0]][(slice(None), *index[1:])]
            return whole
        chosen = np.atleast_1d(self._rows[index])
        result = np.full((len(chosen), self.shape[1]), np.nan, np.float32)
        of = np.searchsorted(self._starts, chosen, side="right") - 1
        for shard in np.unique(of[chosen >= 0]):
            mine = np.flatnonzero((of == shard) & (chosen >= 0))
            result[mine] = self._shards[shard][chosen[mine] - self._starts[shard]]
        return result if np.ndim(self._rows[index]) else result[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or np.float32, copy=False)


@dataclass(frozen=True)
class _Shard:
    """A shard as far as it is written."""

    keys: Keys
    pooled: NDArray[Any]
    counts: NDArray[np.int32]
    tokens: NDArray[np.float16]
    weights: NDArray[np.float32]
    ends: NDArray[np.int64]


class Ragged:
    """Local vectors of rows with their own counts: indexed by rows, they come padded with zeros to the longest."""

    def __init__(self, shards: Sequence[_Shard], rows: NDArray[np.int64], width: int, weights: bool) -> None:
        self._shards, self._rows, self._width, self._weights = shards, rows, width, weights
        self._starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        chosen = self._rows[rows]
        of = np.searchsorted(self._starts, chosen, side="right") - 1
        local = chosen - self._starts[of]
        counts = [int(self._shards[shard].counts[row]) for shard, row in zip(of, local, strict=True)]
        longest = max(counts, default=0)
        shape = (len(chosen), longest) if self._weights else (len(chosen), longest, self._width)
        result = np.zeros(shape, np.float32 if self._weights else np.float16)
        for place, (shard, row, count) in enumerate(zip(of, local, counts, strict=True)):
            end = self._shards[shard].ends[row]
            source = self._shards[shard].weights if self._weights else self._shards[shard].tokens
            result[place, :count] = source[end - count : end]
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or (np.float32 if self._weights else np.float16), copy=False)


class Store:
    """The rows of one encoder: pooled features (d,) of a type, and with `tokens` local vectors in float16 too."""

    def __init__(self, folder: Path, width: int, dtype: Any, tokens: bool) -> None:
        self._folder, self._width, self._dtype, self._tokens = folder, width, np.dtype(dtype), tokens
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def largest(self) -> float:
        """The largest number that its type holds."""
        return float(np.finfo(self._dtype).max)

    def absent(self, keys: Keys) -> NDArray[np.int64]:
        """Return the keys that have no row."""
        return np.flatnonzero(places(self._keys(), keys) < 0)

    def missing(self, keys: Keys) -> NDArray[np.int64]:
        """Return the keys that have no row yet; of equal ones the first."""
        absent = self.absent(keys)
        if not len(absent):
            return absent
        _, first = np.unique(keys[absent], axis=0, return_index=True)
        return absent[np.sort(first)]

    def read(self, keys: Keys) -> tuple[Rows, Ragged | None, Ragged | None]:
        """Pooled features, local vectors and their weights, in the order of the keys."""
        shards = [self._shard(path) for path in self._paths()]
        known = np.concatenate([shard.keys for shard in shards]) if shards else np.zeros((0, 2), np.uint64)
        rows = places(known, keys)
        pooled = Rows([shard.pooled for shard in shards], rows, self._width)
        if not self._tokens:
            return pooled, None, None
        return pooled, Ragged(shards, rows, self._width, False), Ragged(shards, rows, self._width, True)

    @contextmanager
    def writer(self) -> Iterator["Writer"]:
        """Append rows; other processes may do so too."""
        writer = Writer(self._folder, self._width, self._dtype, self._tokens)
        try:
            yield writer
        finally:
            writer.close()

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("*.keys"))

    def _keys(self) -> Keys:
        parts = [_read(path, np.uint64, (2,)) for path in self._paths()]
        return np.concatenate(parts) if parts else np.zeros((0, 2), np.uint64)

    def _shard(self, path: Path) -> _Shard:
        keys = _read(path, np.uint64, (2,))
        pooled = _read(path.with_suffix(".pooled"), self._dtype, (self._width,))[: len(keys)]
        counts = np.zeros(0, np.int32)
        tokens, weights = np.zeros((0, self._width), np.float16), np.zeros(0, np.float32)
        if self._tokens:
            counts = _read(path.with_suffix(".counts"), np.int32, ())[: len(keys)]
            tokens = _read(path.with_suffix(".tokens"), np.float16, (self._width,))
            weights = _read(path.with_suffix(".weights"), np.float32, ())
        return _Shard(keys, pooled, counts, tokens, weights, np.cumsum(counts, dtype=np.int64))


class Writer:
    """Appends rows to shards that no other process holds."""

    def __init__(self, folder: Path, width: int, dtype: np.dtype[Any], tokens: bool) -> None:
        self._folder, self._width, self._dtype = folder, width, dtype
        self._names = ("pooled", *(_PARTS if tokens else ()))
        self._keys: IO[bytes] | None = None
        self._files: dict[str, IO[bytes]] = {}
        self._rows = self._bytes = 0

    def add(self, keys: Keys, rows: Mapping[str, Sequence[NDArray[Any]]]) -> None:
        """Rows with their keys: `pooled` (n, d) and, of local vectors, each row's own `tokens` and `weights`."""
        if self._keys is None or self._rows >= _SHARD or self._bytes >= _SHARD_BYTES:
            self._open()
        assert self._keys is not None
        parts: dict[str, NDArray[Any]] = {"pooled": np.asarray(rows["pooled"], self._dtype)}
        if "tokens" in self._names:
            parts["counts"] = np.array([len(row) for row in rows["tokens"]], np.int32)
            parts["tokens"] = np.concatenate([np.asarray(row, np.float16) for row in rows["tokens"]])
            parts["weights"] = np.concatenate([np.asarray(row, np.float32) for row in rows["weights"]])
        for name, values in parts.items():
            self._bytes += self._files[name].write(np.ascontiguousarray(values).tobytes())
            self._files[name].flush()
        self._keys.write(keys.tobytes())  # last: now they are there
        self._keys.flush()
        self._rows += len(keys)

    def close(self) -> None:
        for file in (*self._files.values(), *([self._keys] if self._keys else [])):
            file.close()
        self._keys, self._files = None, {}

    def _open(self) -> None:
        """The first shard with room that nobody writes to, cut to its whole rows; else a new one."""
        self.close()
        number = 0
        while True:
            path = self._folder / f"{number:06}.keys"
            number += 1
            keys = path.open("a+b")
            try:
                fcntl.flock(keys, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                keys.close()
                continue
            self._rows = path.stat().st_size // KEY_BYTES
            whole = self._whole(path)
            self._bytes = sum(whole.values())
            if self._rows < _SHARD and self._bytes < _SHARD_BYTES:
                break
            keys.close()
        keys.truncate(self._rows * KEY_BYTES)
        self._keys = keys
        for name in self._names:
            file = path.with_suffix(f".{name}").open("ab")
            file.truncate(whole[name])
            self._files[name] = file

    def _whole(self, path: Path) -> dict[str, int]:
        """Bytes of each file that its whole rows take."""
        whole = {"pooled": self._rows * self._width * self._dtype.itemsize}
        if "tokens" in self._names:
            counts = path.with_suffix(".counts")
            total = int(_read(counts, np.int32, ())[: self._rows].sum()) if counts.is_file() else 0
            whole |= {"counts": 4 * self._rows, "tokens": 2 * self._width * total, "weights": 4 * total}
        return whole


def _read(path: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """A mapped file of whole rows; empty where there is none."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    rows = path.stat().st_size // size if path.is_file() else 0
    if not rows:
        return np.zeros((0, *shape), dtype)
    return np.memmap(path, dtype, "r", shape=(rows, *shape))
