"""Metadata in memory, one column per key, so that a filter costs a few passes over arrays and reads no rows.

Derived from the rows in SQLite, like the indexes. A cell is the row's number in its part, a type, and eight bytes: a
number as a double, or as an integer where a double could be another one, a text as a 64-bit hash. The texts themselves
stay on disk: what asks for more than equality of them ($contains, ranges of texts) reads the rows that are still in
question.

A key gets a column once it has some rows. The cells of all rarer keys lie together in one, with the key's hash, so that
memory grows with the metadata and not with the number of different keys.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.store.filters import All, Bound, Contains, Exists, Filter, Is, Not, Some, passes

Mask = NDArray[np.bool_]
Scan = Callable[[NDArray[np.int64], str], Iterable[tuple[int, Mapping[str, Any]]]]
"""Return the metadata of those of the rows, by number in the part, whose JSON holds the text."""

_NULL, _FALSE, _TRUE, _NUMBER, _TEXT, _LIST, _OBJECT, _WIDE = range(1, 9)
"""Types of values. _WIDE: a 64-bit integer of at least 2**53 or at most -2**53, which a double would round."""
_CONSTANTS = {None: _NULL, False: _FALSE, True: _TRUE}
_EXACT, _LONGEST = 2**53, 2**63
_SPACING = 2**11
"""Doubles hold every multiple of it up to `_LONGEST`."""
_DOUBLE, _LONG = struct.Struct("<d"), struct.Struct("<q")


_ROOMY_FROM = 2**16
"""Size from which on an array that grows has room for more at once: the next rows then wait for no copy."""
_MARKS = 4_096
"""Rows of a block of marks: a write of some hundred rows here and there copies two megabytes at most."""
_OWN_COLUMN = 64
"""Smallest number of rows for which a key gets its own column: with fewer, the column would take more than its
cells."""
_RARE_CELLS = 1_024
"""Number of cells of rare keys at which frequent keys are first looked for; repeated each time that it has doubled."""
_COLUMN_ARRAYS, _RARE_ARRAYS = ("rows", "kinds", "values"), ("rare_keys", "rare_rows", "rare_kinds", "rare_values")
"""Names of the arrays of columns on disk."""
_CELLS_AT_ONCE = 100_000
"""Cells that are sorted by key at a time, which takes some 200 bytes for each."""


class Growing:
    """Holds an array that grows at its end. What held() gave out is never written to again."""

    def __init__(self, dtype: Any, width: int | None = None) -> None:
        self._array: NDArray[Any] = np.empty((64,) if width is None else (64, width), dtype)
        self._size = 0

    def extend(self, values: Any) -> None:
        size = self._size + len(values)
        if size > len(self._array):
            # Grow by an eighth: memory is scarce, and copying it is cheap.
            roomy = size * 9 // 8 if size > _ROOMY_FROM else size
            grown = np.empty((max(roomy, len(self._array) * 9 // 8), *self._array.shape[1:]), self._array.dtype)
            grown[: self._size] = self._array[: self._size]
            self._array = grown
        self._array[self._size : size] = values
        self._size = size

    def held(self) -> NDArray[Any]:
        return self._array[: self._size]


class Marks:
    """A truth value for each row, in blocks: a change copies the blocks that it touches, however many rows there are.
    What held() gave out never changes."""

    def __init__(self) -> None:
        self._blocks: list[Mask] = []
        self._size = 0

    def extend(self, values: Mask) -> None:
        while len(values):
            if self._size % _MARKS == 0:
                self._blocks.append(np.zeros(_MARKS, np.bool_))
            start = self._size % _MARKS
            chunk = values[: _MARKS - start]
            self._blocks[-1][start : start + len(chunk)] = chunk  # behind all that was given out
            self._size += len(chunk)
            values = values[len(chunk) :]

    def set(self, rows: NDArray[np.int64], value: bool) -> int:
        """Set rows, which ascend; return how many had the other value."""
        changes = 0
        numbers, starts = np.unique(rows // _MARKS, return_index=True)
        for number, start, end in zip(numbers.tolist(), starts, [*starts[1:], len(rows)], strict=False):
            offsets, block = rows[start:end] % _MARKS, self._blocks[number].copy()
            changes += int(np.count_nonzero(block[offsets] != value))
            block[offsets] = value
            self._blocks[number] = block
        return changes

    def held(self) -> tuple[Mask, ...]:
        return tuple(self._blocks)


def marked(blocks: Sequence[Mask], first: int, end: int) -> Mask:
    """Return the values of the rows from the first on, up to the end, of what held() gave out."""
    start = first // _MARKS
    marks: Mask = np.concatenate([np.zeros(0, np.bool_), *blocks[start : -(-end // _MARKS)]])
    return marks[first - start * _MARKS : end - start * _MARKS]


def differing(before: Sequence[Mask], now: Sequence[Mask], count: int) -> NDArray[np.int64]:
    """Return which of the first `count` rows have another value now, ascending."""
    numbers = [number for number, (old, new) in enumerate(zip(before, now, strict=False)) if old is not new]
    rows = [np.flatnonzero(before[number] != now[number]) + number * _MARKS for number in numbers]
    changed: NDArray[np.int64] = np.concatenate([np.empty(0, np.int64), *rows])
    return changed[changed < count]


Cells = tuple[NDArray[Any], ...]
"""Rows (ascending), types and values of a key's cells; before them the hashes of keys, where there are several."""
_CELL = (np.uint32, np.uint8, np.int64)


class _Cells:
    """Holds arrays that grow together. They are published together, so that a reader sees whole cells."""

    def __init__(self, *dtypes: Any) -> None:
        self._arrays = [Growing(dtype) for dtype in dtypes]
        self.extend(*([] for _ in dtypes))

    def extend(self, *columns: Any) -> None:
        for array, values in zip(self._arrays, columns, strict=True):
            array.extend(values)
        self.cells: Cells = tuple(array.held() for array in self._arrays)


class Columns:
    """Holds the metadata of a part's rows. One thread extends; any may select."""

    def __init__(self) -> None:
        self._columns: dict[int, _Cells] = {}
        """Columns by the hash of the metadata key."""
        self._rare = _Cells(np.int64, *_CELL)
        """Cells of the keys that have no column of their own: those of one key are in the order of its rows."""
        self._looked_through = 0
        """Rare cells that were left after the last search for frequent keys."""

    def extend(self, numbers: Iterable[int], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Add the metadata of rows with these numbers, which ascend and come after those that were added before."""
        rows = list(numbers)
        start = 0
        while start < len(rows):
            end, cells = start + 1, len(metadata[start])
            while end < len(rows) and cells + len(metadata[end]) <= _CELLS_AT_ONCE:
                cells += len(metadata[end])
                end += 1
            self._extend(rows[start:end], metadata[start:end])
            start = end

    def _extend(self, rows: list[int], metadata: Sequence[Mapping[str, Any]]) -> None:
        rare: tuple[list[int], list[int], list[int], list[int]] = ([], [], [], [])
        for name, (key_rows, values) in _by_name(rows, metadata).items():
            key = _key(name)
            if key in self._columns:
                self._columns[key].extend(key_rows, *_cells(values))
            elif len(key_rows) < _OWN_COLUMN:
                kinds, encoded = zip(*map(_encoded, values), strict=True)
                for to, more in zip(rare, ([key] * len(key_rows), key_rows, kinds, encoded), strict=True):
                    to.extend(more)
            else:
                self._rare.extend(np.full(len(key_rows), key), key_rows, *_cells(values))
        if rare[0]:
            self._rare.extend(*rare)
        if len(self._rare.cells[0]) >= max(2 * self._looked_through, _RARE_CELLS):
            self._give_columns()

    def _give_columns(self) -> None:
        """Give a column to every key that has enough rows by now."""
        cells = self._rare.cells
        order = np.argsort(cells[0], kind="stable")
        keys, starts, counts = np.unique(cells[0][order], return_index=True, return_counts=True)
        often = counts >= _OWN_COLUMN
        for key, start, count in zip(keys[often].tolist(), starts[often], counts[often], strict=True):
            places = order[start : start + count]
            column = _Cells(*_CELL)
            column.extend(*(array[places] for array in cells[1:]))
            self._columns[key] = column
        # Only now: a reader that does not find the column uses the old cells.
        is_rare = np.isin(cells[0], keys[~often])
        rare = _Cells(np.int64, *_CELL)
        rare.extend(*(array[is_rare] for array in cells))
        self._rare, self._looked_through = rare, int(np.count_nonzero(is_rare))

    def kept(self, numbers: NDArray[np.int64]) -> "Columns":
        """Return the columns of the rows whose entry in `numbers`, their new number, is not -1.

        Order is kept, and rows beyond the entries are left out.
        """
        columns = Columns()
        columns.append(self, 0, numbers)
        columns._looked_through = len(columns._rare.cells[0])
        return columns

    def append(self, source: "Columns", first: int, numbers: NDArray[np.int64]) -> None:
        """Append, as kept() does, the cells of the rows of others from the number `first` on. Their new numbers come
        after those that are here."""
        rare: list[NDArray[Any]] = list(source._rare.cells)  # before the columns: see _give_columns()
        columns = dict(source._columns)
        for key, column in columns.items():
            start, end = np.searchsorted(column.cells[0], np.array([first, first + len(numbers)], np.uint32))
            new, kinds, values = _renumbered([array[start:end] for array in column.cells], first, numbers)
            if key not in self._columns and len(new) >= _OWN_COLUMN and not (self._rare.cells[0] == key).any():
                self._columns[key] = _Cells(*_CELL)
            if key in self._columns:
                self._columns[key].extend(new, kinds, values)
            elif len(new):
                self._rare.extend(np.full(len(new), key), new, kinds, values)
        is_left = ~np.isin(rare[0], list(columns))
        new, kinds, values, keys = _renumbered([array[is_left] for array in (*rare[1:], rare[0])], first, numbers)
        self._rare.extend(keys, new, kinds, values)

    def arrays(self, count: int) -> dict[str, list[NDArray[Any]]]:
        """Return the cells of the first `count` rows as arrays by name, each in pieces, of which of_arrays() makes
        columns again. Only the cells of rare keys are copied."""
        rare = self._rare.cells  # before the columns: see _give_columns()
        columns = {key: _head(column.cells, count) for key, column in dict(self._columns).items()}
        is_left = (rare[1] < count) & ~np.isin(rare[0], list(columns))
        pieces = zip(*columns.values(), strict=True) if columns else ([array] for array in _Cells(*_CELL).cells)
        return {
            "keys": [np.array(list(columns), np.int64)],
            "lengths": [np.array([len(rows) for rows, _, _ in columns.values()], np.int64)],
            **{name: list(arrays) for name, arrays in zip(_COLUMN_ARRAYS, pieces, strict=True)},
            **{name: [array[is_left]] for name, array in zip(_RARE_ARRAYS, rare, strict=True)},
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Columns":
        """Raises KeyError and ValueError for what arrays() did not make."""
        columns, ends = cls(), np.cumsum(arrays["lengths"])[:-1]
        cells = zip(*(np.split(arrays[name], ends) for name in _COLUMN_ARRAYS), strict=True)
        for key, key_cells in zip(arrays["keys"].tolist(), cells if len(arrays["keys"]) else (), strict=True):
            columns._columns[key] = _Cells(*_CELL)
            columns._columns[key].extend(*key_cells)
        columns._rare.extend(*(arrays[name] for name in _RARE_ARRAYS))
        columns._looked_through = len(columns._rare.cells[0])
        return columns

    def nbytes(self) -> int:
        groups = (self._rare.cells, *(column.cells for column in self._columns.values()))
        return sum(array.nbytes for cells in groups for array in cells)

    def _of(self, name: str) -> Cells:
        """Return rows, types and values of a key's cells, in the order of the rows."""
        key, (keys, rows, kinds, values) = _key(name), self._rare.cells  # before the columns: see _give_columns()
        if (column := self._columns.get(key)) is not None:
            return column.cells
        of_key = keys == key
        return rows[of_key], kinds[of_key], values[of_key]

    def numbers(self, name: str, count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the number that each of the first `count` rows holds under a key, NaN where it holds none; of an
        integer that a double would round the part that is a double, and what is above it."""
        rows, kinds, values = self.scalars(name, count)
        numbers, rest = np.full(count, np.nan), np.zeros(count, np.int64)
        is_wide = kinds == _WIDE
        numbers[rows[kinds == _NUMBER]] = values[kinds == _NUMBER].view(np.float64)
        rest[rows[is_wide]] = values[is_wide] & (_SPACING - 1)
        numbers[rows[is_wide]] = values[is_wide] - rest[rows[is_wide]]
        return numbers, rest

    def scalars(self, name: str, count: int) -> Cells:
        """Return rows, types and values of the cells of a key in the first `count` rows, without lists and objects.
        Two of the same type and value hold the same."""
        rows, kinds, values = _head(self._of(name), count)
        scalar = (kinds != _LIST) & (kinds != _OBJECT)
        return rows[scalar], kinds[scalar], values[scalar]

    def select(self, filter: Filter, among: Mask, scan: Scan) -> Mask:
        """Return the rows that are set in `among` and pass the filter."""
        match filter:
            case All(of):
                # Conditions that read rows come last, when the fewest rows are left.
                for condition in sorted(of, key=reads_rows):
                    among = self.select(condition, among, scan)
                return among
            case Some(of):
                passing = np.zeros_like(among)
                for condition in sorted(of, key=reads_rows):
                    passing |= self.select(condition, among & ~passing, scan)
                return passing
            case Not(of):
                return among & ~self.select(of, among, scan)
            case Is() | Bound() | Exists() | Contains():
                return self._condition(filter, among, scan)

    def _condition(self, filter: Is | Bound | Exists | Contains, among: Mask, scan: Scan) -> Mask:
        passing = np.zeros_like(among)
        # Rows that were added after `among` was made stand at the end.
        rows, kinds, values = _head(self._of(filter.name), len(among))
        if not rows.size:
            return passing
        match filter:
            case Exists():
                passing[rows] = True
            case Is(_, scalars):
                _mark(passing, rows, _is_any(scalars, kinds, values))
            case Bound(_, operator, int() | float() as value):
                matches = _compare(operator, values.view(np.float64), _between(value)) & (kinds == _NUMBER)
                if (is_wide := kinds == _WIDE).any():
                    # Integers greater than 1.5 are those greater than 1, and integers from 1.5 are those from 2.
                    integer = math.floor(value) if operator in ("$gt", "$lte") else math.ceil(value)
                    matches |= is_wide & _compare(operator, values, max(min(integer, _LONGEST), -_LONGEST - 1))
                _mark(passing, rows, matches)
            case Bound():
                self._read(filter, rows[kinds == _TEXT], "", among, passing, scan)
            case Contains(_, text):
                self._read(filter, rows[(kinds == _TEXT) | (kinds == _LIST)], text, among, passing, scan)
        return passing & among

    def _read(
        self, filter: Filter, rows: NDArray[np.uint32], holding: str, among: Mask, passing: Mask, scan: Scan
    ) -> None:
        candidates = rows[among[rows]].astype(np.int64)
        if candidates.size:
            for row, metadata in scan(candidates, holding):
                passing[row] = passes(filter, metadata)


def reads_rows(filter: Filter) -> bool:
    """Return whether the columns alone cannot say which rows pass."""
    match filter:
        case All(of) | Some(of):
            return any(map(reads_rows, of))
        case Not(of):
            return reads_rows(of)
        case Bound(_, _, value):
            return isinstance(value, str)
        case _:
            return isinstance(filter, Contains)


def _head(cells: Cells, count: int) -> Cells:
    """Return the cells, whose rows ascend, of the first `count` rows."""
    end = int(np.searchsorted(cells[0], np.uint32(count)))
    return tuple(array[:end] for array in cells)


def _renumbered(cells: Sequence[NDArray[Any]], first: int, numbers: NDArray[np.int64]) -> list[NDArray[Any]]:
    """Return cells, of which the first array has the rows, with new numbers of the rows: see Columns.append."""
    selected = (cells[0] >= first) & (cells[0] < first + len(numbers))
    selected[selected] = numbers[cells[0][selected] - first] >= 0
    return [numbers[cells[0][selected] - first], *(array[selected] for array in cells[1:])]


def _mark(passing: Mask, rows: NDArray[np.uint32], matches: Mask) -> None:
    """Set in `passing` those of the ascending rows that match."""
    if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1:  # none is left out: several times as quick
        passing[int(rows[0]) : int(rows[-1]) + 1] = matches
    else:
        passing[rows[matches]] = True


def _is_any(scalars: Sequence[Any], kinds: NDArray[np.uint8], values: NDArray[np.int64]) -> Mask:
    cells = [_encoded(value) for value in scalars]
    matches = np.zeros(len(kinds), np.bool_)
    for constant in {kind for kind, _ in cells if kind <= _TRUE}:
        matches |= kinds == constant
    for kind, dtype in ((_NUMBER, np.float64), (_WIDE, np.int64), (_TEXT, np.int64)):
        of_kind = np.array([value for cell_kind, value in cells if cell_kind == kind], np.int64).view(dtype)
        if of_kind.size == 1:
            matches |= (kinds == kind) & (values.view(dtype) == of_kind[0])
        elif of_kind.size:
            matches |= (kinds == kind) & np.isin(values.view(dtype), of_kind)
    return matches


def _between(bound: float) -> float:
    """Return a double that lies to all numbers that are kept as doubles as the bound does, which may be no double."""
    if abs(bound) >= _EXACT and -_LONGEST <= bound < _LONGEST:
        return math.copysign(2.0**60, bound)  # all that are near it are kept as integers
    return float(bound)


def _compare(operator: str, numbers: NDArray[Any], bound: float) -> Mask:
    # Cells that hold no number are read as doubles too, and may be NaN: comparisons with it are false, and silent.
    match operator:
        case "$gt":
            return numbers > bound
        case "$gte":
            return numbers >= bound
        case "$lt":
            return numbers < bound
        case _:
            return numbers <= bound


def _by_name(rows: list[int], metadata: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[Any]]]:
    """Return, for each metadata key, the rows that have it and their values."""
    if metadata and all(item.keys() == metadata[0].keys() for item in metadata):  # as below, several times as quick
        return {name: (rows, [item[name] for item in metadata]) for name in metadata[0]}
    cells: dict[str, tuple[list[int], list[Any]]] = {}
    for row, item in zip(rows, metadata, strict=True):
        for name, value in item.items():
            key_rows, values = cells.setdefault(name, ([], []))
            key_rows.append(row)
            values.append(value)
    return cells


def _cells(values: list[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return types and values of cells as _encoded() does for each, in few steps for values of one type."""
    types = set(map(type, values))
    if types <= {int, float}:
        doubles = np.array(values, np.float64)
        if not (np.abs(doubles) >= _EXACT).any():
            return np.full(len(values), _NUMBER, np.uint8), (doubles + 0.0).view(np.int64)  # -0.0 is 0.0
    if types == {bool}:
        return np.where(values, np.uint8(_TRUE), np.uint8(_FALSE)), np.zeros(len(values), np.int64)
    if types == {str}:
        codes = {value: _encoded(value)[1] for value in set(values)}
        return np.full(len(values), _TEXT, np.uint8), np.array([codes[value] for value in values], np.int64)
    kinds, encoded = zip(*map(_encoded, values), strict=True)
    return np.array(kinds, np.uint8), np.array(encoded, np.int64)


def _key(name: str) -> int:
    return _encoded(name)[1]


def _encoded(value: Any) -> tuple[int, int]:
    """Return a cell's type, and its value in eight bytes."""
    if value is None or value is True or value is False:
        return _CONSTANTS[value], 0
    if isinstance(value, str):
        digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
        return _TEXT, _LONG.unpack(digest)[0]
    if isinstance(value, int | float):
        if abs(value) >= _EXACT and -_LONGEST <= value < _LONGEST:
            return _WIDE, int(value)
        return _NUMBER, _LONG.unpack(_DOUBLE.pack(float(value) + 0.0))[0]  # -0.0 is 0.0
    return (_LIST if isinstance(value, list) else _OBJECT), 0
