"""The fields of an item that an answer has besides its score, kept in memory, so that a search reads no rows.

Derived from the rows in SQLite, like the columns. A record is as rows.record() makes it. The long ones are left on
disk, so that what a part takes is bounded by its number of rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.store.columns import Growing

_LENGTH_BITS, _OFFSET_BITS = 10, 24
_START_BITS = _LENGTH_BITS + _OFFSET_BITS
_LONGEST, _OFFSETS = 2**_LENGTH_BITS - 1, 2**_OFFSET_BITS - 1
_CHUNK = 2**22
"""Bytes from which on a chunk takes no more: memory grows by so much at a time, and nothing is copied to make room."""


class Records:
    """Holds the records of a part's rows, by their numbers. One thread writes; any may read."""

    def __init__(self) -> None:
        self._chunks: list[bytearray] = []
        self._places = Growing(np.int64)
        """Chunk, offset and length in one number; 0 where memory has no record of the row."""

    def __len__(self) -> int:
        return len(self._places.held())

    def extend(self, records: Sequence[bytes]) -> None:
        """Append the records of the next rows; an empty record means none."""
        self._places.extend([self._place(record) for record in records])

    def leave(self, count: int) -> None:
        """Leave the next rows without records, until set() gives them some."""
        self._places.extend(np.zeros(count, np.int64))

    def set(self, rows: NDArray[np.int64], records: Sequence[bytes]) -> None:
        self._places.held()[rows] = [self._place(record) for record in records]

    def get(self, rows: NDArray[np.int64]) -> list[bytes]:
        """Return the records of these rows, empty for a row without one."""
        records = []
        for place in self._places.held()[rows].tolist():
            start, length = place >> _LENGTH_BITS & _OFFSETS, place & _LONGEST
            records.append(bytes(self._chunks[place >> _START_BITS][start : start + length]) if length else b"")
        return records

    def kept(self, rows: NDArray[np.int64]) -> "Records":
        """Return the records of these rows, in their order: of each chunk one with what is kept of it."""
        records, chunks = Records(), list(self._chunks)
        places = self._places.held()[rows]
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], np.arange(len(chunks) + 1) << _START_BITS)
        for number, chunk in enumerate(chunks):
            places_of_chunk = order[bounds[number] : bounds[number + 1]]
            places_of_chunk = places_of_chunk[places[places_of_chunk] != 0]
            lengths, old = places[places_of_chunk] & _LONGEST, places[places_of_chunk] >> _LENGTH_BITS & _OFFSETS
            starts = np.cumsum(lengths) - lengths
            # Numbers of the bytes that are kept.
            bytes_kept = np.repeat(old - starts, lengths) + np.arange(lengths.sum())
            records._chunks.append(bytearray(np.frombuffer(bytes(chunk), np.uint8)[bytes_kept]))
            places[places_of_chunk] = number << _START_BITS | starts << _LENGTH_BITS | lengths
        records._places.extend(places)
        return records

    def arrays(self, count: int) -> dict[str, list[Any]]:
        """Return the records of the first `count` rows as arrays by name, each in pieces, of which of_arrays() makes
        records again. Later rows may be appended meanwhile: of the chunk that grows there is a copy, of the others not.
        """
        places, chunks = self._places.held()[:count], list(self._chunks)
        pieces: list[NDArray[np.uint8]] = []
        if last := int(places.max(initial=0)):
            # Records are appended: what lies after the last of these rows is of later rows.
            number, end = last >> _START_BITS, (last >> _LENGTH_BITS & _OFFSETS) + (last & _LONGEST)
            parts: list[bytes | bytearray] = [*chunks[:number], bytes(chunks[number][:end])]
            pieces = [np.frombuffer(chunk, np.uint8) for chunk in parts]
        return {
            "places": [places],
            "chunks": [np.array(list(map(len, pieces)), np.int64)],
            "bytes": pieces or [np.empty(0, np.uint8)],
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Records":
        """Raises KeyError and ValueError for what arrays() did not make."""
        records = cls()
        if len(sizes := arrays["chunks"]):
            records._chunks = [bytearray(chunk) for chunk in np.split(arrays["bytes"], np.cumsum(sizes)[:-1])]
        records._places.extend(arrays["places"])
        return records

    def nbytes(self) -> int:
        return sum(map(len, self._chunks)) + self._places.held().nbytes

    def _place(self, record: bytes) -> int:
        if not 0 < len(record) <= _LONGEST:
            return 0
        if not self._chunks or len(self._chunks[-1]) >= _CHUNK:
            self._chunks.append(bytearray())
        chunk = self._chunks[-1]
        start = len(chunk)
        chunk += record
        return (len(self._chunks) - 1) << _START_BITS | start << _LENGTH_BITS | len(record)
