"""Arrays of numbers for encoders of any other sense: a `.npy` file → float32 of the shape that the manifest states.

A point cloud is an array (n, 3), a reading of six sensors over time an array (n, 6). Nothing is unpickled, and nothing
is allocated that the manifest does not allow.
"""

import io
import math
import re
from typing import Annotated, Final, Literal, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, model_validator

from service.contract.errors import BadMedia, MediaTooLarge, UnsupportedMedia

NPY: Final = b"\x93NUMPY"
"""First bytes of every `.npy` file."""
_TYPES: Final = ("<f2", "<f4", "<f8")
_LONGEST_HEADER = 1_024
"""Characters of a header that are parsed: NumPy's own have 128 or fewer."""
_VERSIONS = ((1, 0), (2, 0), (3, 0))
_PYTHON_2 = re.compile(rb"(?<=\d)L(?=[,)])")
"""What Python 2 wrote behind the sizes of a shape, of which NumPy warns."""
_MOST_NUMBERS, _MOST_PREPARED = 16_000_000, 1_000_000
"""Numbers of a file, and of what is made of it: a file of one row is repeated to as many rows as the encoder takes."""
_Size = Annotated[int, Field(gt=0, le=_MOST_NUMBERS)]


class ArrayPreprocessing(BaseModel):
    """Says how a tower wants its arrays: the shape of a file, the rows taken of it, and the standardisation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["array"] = "array"
    shape: tuple[_Size, ...] = Field(min_length=1, max_length=4)
    """Shape of an array; of each of its rows, where `rows` is given."""
    rows: _Size | None = None
    """Number of rows that the encoder takes. A file has any number of them, up to `most_rows`: of more rows, evenly
    spaced ones are taken; fewer are repeated from the first on. None: an array is exactly of `shape`."""
    most_rows: _Size | None = None
    """Largest number of rows of a file. None: 16 times `rows`."""
    mean: tuple[FiniteFloat, ...] = (0.0,)
    """Subtracted from the numbers: one for all, or one for each place of the last axis."""
    std: tuple[PositiveFloat, ...] = (1.0,)
    """The numbers are then divided by it."""

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.rows is None and self.most_rows is not None:
            raise ValueError("most_rows goes with rows")
        if self.rows is not None and self.row_limit < self.rows:
            raise ValueError("most_rows is smaller than rows")
        if math.prod(self.shape) * self.row_limit > _MOST_NUMBERS:
            raise ValueError(f"an array may hold at most {_MOST_NUMBERS:,} numbers")
        if self.size > _MOST_PREPARED:
            raise ValueError(f"an encoder may take at most {_MOST_PREPARED:,} numbers of an array, not {self.size:,}")
        if any(len(numbers) not in (1, self.shape[-1]) for numbers in (self.mean, self.std)):
            raise ValueError(f"mean and std have 1 number each, or {self.shape[-1]} as the last axis has")
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return the name of the graph's input: float32 (B, *prepared_shape)."""
        return ("array",)

    @property
    def row_limit(self) -> int:
        """Return the largest number of rows of a file; 1 where an array has no rows."""
        return 1 if self.rows is None else self.most_rows or 16 * self.rows

    @property
    def prepared_shape(self) -> tuple[int, ...]:
        """Return the shape of what `read` gives."""
        return self.shape if self.rows is None else (self.rows, *self.shape)

    @property
    def size(self) -> int:
        """Return how many numbers `read` gives."""
        return math.prod(self.prepared_shape)

    def read(self, data: bytes) -> NDArray[np.float32]:
        """Return a `.npy` file as float32 of `prepared_shape`. Raises BadMedia, UnsupportedMedia, MediaTooLarge."""
        return self.prepare(self._parsed(data))

    def prepare(self, array: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return an array with the wanted rows, standardised. Raises BadMedia where a number is not finite."""
        if self.rows is not None:
            count = len(array)
            places = np.arange(self.rows)
            array = array[places * count // self.rows if count > self.rows else places % count]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            chosen = array.astype(np.result_type(array, np.float32), order="C")
            chosen -= np.array(self.mean, chosen.dtype)
            chosen /= np.array(self.std, chosen.dtype)
            prepared: NDArray[np.float32] = chosen.astype(np.float32, copy=False)
        if not np.isfinite(prepared).all():
            raise BadMedia("the array holds a number that is not finite, or too large for float32")
        return prepared

    def _parsed(self, data: bytes) -> NDArray[np.floating]:
        if not data.startswith(NPY):
            raise UnsupportedMedia("the data is no .npy file: send an array as NumPy's `save` writes it")
        start = data[: 2 * _LONGEST_HEADER]
        stream = io.BytesIO(_PYTHON_2.sub(b" ", start))
        if len(start) > 7 and (version := tuple(start[6:8])) not in _VERSIONS:
            raise UnsupportedMedia(f"the .npy file is of version {version[0]}.{version[1]}: 1.0, 2.0 and 3.0 are read")
        try:
            version = npy.read_magic(stream)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(stream, max_header_size=_LONGEST_HEADER)
        except Exception:  # whatever a hostile header makes NumPy or Python's parser raise
            raise BadMedia("the header of the .npy file cannot be read") from None
        if dtype.str not in _TYPES:
            kind = "Python objects" if dtype.hasobject else f"the type {dtype.str[:32]}"
            raise UnsupportedMedia(
                f"the array holds {kind}: float16, float32 and float64 in little-endian order are read"
            )
        self._check(shape)
        body = memoryview(data)[stream.tell() :]
        if len(body) != math.prod(shape) * dtype.itemsize:
            raise BadMedia("the .npy file is shorter or longer than its header says")
        array: NDArray[np.floating] = np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
        if not np.isfinite(array).all():
            raise BadMedia("the array holds a number that is not finite")
        return array

    def _check(self, shape: tuple[int, ...]) -> None:
        expected = self.shape if self.rows is None else ("n", *self.shape)
        if len(shape) != len(expected) or shape[len(shape) - len(self.shape) :] != self.shape:
            told, given = (", ".join(map(str, sizes)) for sizes in (expected, shape[:8]))
            raise BadMedia(f"the array has the shape ({given:.64}), not ({told})")
        if any(type(size) is not int or size < 0 for size in shape):  # True is 1 to Python, and no size to NumPy
            raise BadMedia("the header of the .npy file states a size that is no whole number from 0 on")
        if self.rows is not None and shape[0] < 1:
            raise BadMedia("the array has no rows")
        if self.rows is not None and shape[0] > self.row_limit:
            rows = f"{shape[0]:,}"[:64]
            raise MediaTooLarge(f"the array has {rows} rows, more than the {self.row_limit:,} of this model")
