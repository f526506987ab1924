"""Metadata in memory, one column per key, so that a filter costs a few passes over arrays and reads no rows.

Derived from the rows in SQLite, like the indexes. A cell is the row's number in its part, a type, and eight bytes: a
number as a double, a text as a 64-bit hash. The texts themselves stay on disk: what asks for more than equality of them
($contains, ranges of texts) reads the rows that are still in question.
"""

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.store.filters import All, Bound, Contains, Exists, Filter, Is, Not, Some, passes

Mask = NDArray[np.bool_]
Scan = Callable[[NDArray[np.int64], str], Iterable[tuple[int, Mapping[str, Any]]]]
"""Metadata of those of the rows, by number in the part, whose JSON holds the text."""

_NULL, _FALSE, _TRUE, _NUMBER, _TEXT, _LIST, _OBJECT = range(1, 8)
_CONSTANTS = {None: _NULL, False: _FALSE, True: _TRUE}
_DOUBLE, _LONG = struct.Struct("<d"), struct.Struct("<q")


class Growing:
    """An array that grows at its end. What held() gave out is never written to again."""

    def __init__(self, dtype: Any, width: int | None = None) -> None:
        self._array: NDArray[Any] = np.empty((64,) if width is None else (64, width), dtype)
        self._size = 0

    def extend(self, values: Any) -> None:
        size = self._size + len(values)
        if size > len(self._array):
            # By an eighth: memory is what there is least of, and a copy of it is cheap.
            grown = np.empty((max(size, len(self._array) * 9 // 8), *self._array.shape[1:]), self._array.dtype)
            grown[: self._size] = self._array[: self._size]
            self._array = grown
        self._array[self._size : size] = values
        self._size = size

    def held(self) -> NDArray[Any]:
        return self._array[: self._size]


class _Column:
    def __init__(self) -> None:
        self._rows, self._kinds, self._values = Growing(np.uint32), Growing(np.uint8), Growing(np.int64)
        self.cells: tuple[NDArray[np.uint32], NDArray[np.uint8], NDArray[np.int64]]
        """Rows in ascending order, types, values. Replaced as one, so that a reader sees whole cells."""
        self._publish()

    def extend(self, rows: Any, kinds: Any, values: Any) -> None:
        self._rows.extend(rows)
        self._kinds.extend(kinds)
        self._values.extend(values)
        self._publish()

    def _publish(self) -> None:
        self.cells = (self._rows.held(), self._kinds.held(), self._values.held())


class Columns:
    """The metadata of a part's rows. One thread extends; any may select."""

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}

    def extend(self, numbers: Iterable[int], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Add the metadata of rows with these numbers, which ascend and come after those that were added before."""
        rows = list(numbers)
        for name, (own, values) in _by_name(rows, metadata).items():
            if name not in self._columns:
                self._columns[name] = _Column()
            self._columns[name].extend(own, *_cells(values))

    def kept(self, numbers: NDArray[np.int64]) -> "Columns":
        """Of the rows with a number in `numbers` that is not -1, which is the row's new number; order is kept."""
        columns = Columns()
        for name, column in self._columns.items():
            rows, kinds, values = column.cells
            new = numbers[rows]
            chosen = new >= 0
            if chosen.any():
                columns._columns[name] = _Column()
                columns._columns[name].extend(new[chosen], kinds[chosen], values[chosen])
        return columns

    def nbytes(self) -> int:
        return sum(array.nbytes for column in self._columns.values() for array in column.cells)

    def select(self, filter: Filter, among: Mask, scan: Scan) -> Mask:
        """Which of the rows that are set in `among` pass."""
        match filter:
            case All(of):
                # What reads rows comes last, when fewest are left.
                for each in sorted(of, key=reads_rows):
                    among = self.select(each, among, scan)
                return among
            case Some(of):
                found = np.zeros_like(among)
                for each in sorted(of, key=reads_rows):
                    found |= self.select(each, among & ~found, scan)
                return found
            case Not(of):
                return among & ~self.select(of, among, scan)
            case Is() | Bound() | Exists() | Contains():
                return self._condition(filter, among, scan)

    def _condition(self, filter: Is | Bound | Exists | Contains, among: Mask, scan: Scan) -> Mask:
        found = np.zeros_like(among)
        column = self._columns.get(filter.name)
        if column is None:
            return found
        rows, kinds, values = column.cells
        # Rows that were added after `among` was made stand at the end.
        count = int(np.searchsorted(rows, np.uint32(len(among))))
        rows, kinds, values = rows[:count], kinds[:count], values[:count]
        match filter:
            case Exists():
                found[rows] = True
            case Is(_, wanted):
                _mark(found, rows, _is_any(wanted, kinds, values))
            case Bound(_, operator, int() | float() as value):
                chosen = _compare(operator, values.view(np.float64), float(value))
                _mark(found, rows, chosen & (kinds == _NUMBER))
            case Bound():
                self._read(filter, rows[kinds == _TEXT], "", among, found, scan)
            case Contains(_, text):
                self._read(filter, rows[(kinds == _TEXT) | (kinds == _LIST)], text, among, found, scan)
        return found & among

    def _read(
        self, filter: Filter, rows: NDArray[np.uint32], holding: str, among: Mask, found: Mask, scan: Scan
    ) -> None:
        candidates = rows[among[rows]].astype(np.int64)
        if candidates.size:
            for row, metadata in scan(candidates, holding):
                found[row] = passes(filter, metadata)


def reads_rows(filter: Filter) -> bool:
    """Whether the columns alone cannot say which rows pass."""
    match filter:
        case All(of) | Some(of):
            return any(map(reads_rows, of))
        case Not(of):
            return reads_rows(of)
        case Bound(_, _, value):
            return isinstance(value, str)
        case _:
            return isinstance(filter, Contains)


def _mark(found: Mask, rows: NDArray[np.uint32], chosen: Mask) -> None:
    """Set those of the rows, which ascend, that are chosen."""
    if len(rows) and int(rows[-1]) - int(rows[0]) == len(rows) - 1:  # none is left out: several times as quick
        found[int(rows[0]) : int(rows[-1]) + 1] = chosen
    else:
        found[rows[chosen]] = True


def _is_any(wanted: Sequence[Any], kinds: NDArray[np.uint8], values: NDArray[np.int64]) -> Mask:
    cells = [_encoded(value) for value in wanted]
    chosen = np.zeros(len(kinds), np.bool_)
    for constant in {kind for kind, _ in cells if kind <= _TRUE}:
        chosen |= kinds == constant
    for kind, dtype in ((_NUMBER, np.float64), (_TEXT, np.int64)):
        of_kind = np.array([value for each, value in cells if each == kind], np.int64).view(dtype)
        if of_kind.size == 1:
            chosen |= (kinds == kind) & (values.view(dtype) == of_kind[0])
        elif of_kind.size:
            chosen |= (kinds == kind) & np.isin(values.view(dtype), of_kind)
    return chosen


def _compare(operator: str, held: NDArray[np.float64], bound: float) -> Mask:
    # Cells that hold no number are read as doubles too, and may be NaN: comparisons with it are false, and silent.
    match operator:
        case "$gt":
            return held > bound
        case "$gte":
            return held >= bound
        case "$lt":
            return held < bound
        case _:
            return held <= bound


def _by_name(rows: list[int], metadata: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[Any]]]:
    """For each key the rows that have it, and its values."""
    if metadata and all(held.keys() == metadata[0].keys() for held in metadata):  # as below, several times as quick
        return {name: (rows, [held[name] for held in metadata]) for name in metadata[0]}
    found: dict[str, tuple[list[int], list[Any]]] = {}
    for row, held in zip(rows, metadata, strict=True):
        for name, value in held.items():
            own, values = found.setdefault(name, ([], []))
            own.append(row)
            values.append(value)
    return found


def _cells(values: list[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Types and values of cells: what _encoded() says of each, for values of one type in a few steps."""
    types = set(map(type, values))
    if types <= {int, float}:
        return np.full(len(values), _NUMBER, np.uint8), np.array(values, np.float64).view(np.int64)
    if types == {bool}:
        return np.where(values, np.uint8(_TRUE), np.uint8(_FALSE)), np.zeros(len(values), np.int64)
    if types == {str}:
        known = {value: _encoded(value)[1] for value in set(values)}
        return np.full(len(values), _TEXT, np.uint8), np.array([known[value] for value in values], np.int64)
    kinds, encoded = zip(*map(_encoded, values), strict=True)
    return np.array(kinds, np.uint8), np.array(encoded, np.int64)


def _encoded(value: Any) -> tuple[int, int]:
    """A cell's type, and its value in eight bytes."""
    if value is None or value is True or value is False:
        return _CONSTANTS[value], 0
    if isinstance(value, str):
        digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
        return _TEXT, _LONG.unpack(digest)[0]
    if isinstance(value, int | float):
        return _NUMBER, _LONG.unpack(_DOUBLE.pack(float(value)))[0]
    return (_LIST if isinstance(value, list) else _OBJECT), 0
