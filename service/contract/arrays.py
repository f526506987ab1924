"""Arrays of numbers for encoders of any other sense: a `.npy` file → float32 of the shape that the manifest states.

A point cloud is an array (n, 3), a reading of six sensors over time an array (n, 6). Nothing is unpickled, and nothing
is allocated that the manifest does not allow.
"""

import io
import math
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
_MOST_NUMBERS = 16_000_000
_Size = Annotated[int, Field(gt=0, le=_MOST_NUMBERS)]


class ArrayPreprocessing(BaseModel):
    """How a tower wants its arrays: the shape of a file, the rows that are taken of it, and the standardisation."""

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

    def read(self, data: bytes) -> NDArray[np.float32]:
        """Return a `.npy` file as float32 of `prepared_shape`. Raises BadMedia, UnsupportedMedia, MediaTooLarge."""
        return self.prepare(self._parsed(data))

    def prepare(self, array: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return an array with the wanted rows, standardised. Raises BadMedia where a number is not finite."""
        if self.rows is not None:
            count = len(array)
            places = np.arange(self.rows)
            array = array[places * count // self.rows if count > self.rows else places % count]
        with np.errstate(over="ignore", invalid="ignore"):
            prepared: NDArray[np.float32] = ((array - np.array(self.mean)) / np.array(self.std)).astype(np.float32)
        if not np.isfinite(prepared).all():
            raise BadMedia("the array holds a number that is not finite, or too large for float32")
        return prepared

    def _parsed(self, data: bytes) -> NDArray[np.floating]:
        if not data.startswith(NPY):
            raise UnsupportedMedia("the data is no .npy file: send an array as NumPy's `save` writes it")
        stream = io.BytesIO(data)
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
            told = ", ".join(map(str, expected))
            raise BadMedia(f"the array has the shape ({', '.join(map(str, shape[:8]))}), not ({told})")
        if self.rows is not None and shape[0] < 1:
            raise BadMedia("the array has no rows")
        if self.rows is not None and shape[0] > self.row_limit:
            raise MediaTooLarge(f"the array has {shape[0]:,} rows, more than the {self.row_limit:,} of this model")
