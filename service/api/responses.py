"""Answers are written here: JSON by orjson (arrays as they are, NaN never), vectors in the encoding asked for."""

import base64
import math
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.responses import Response

from service.contract.vectors import truncate
from service.errors import InvalidRequest
from service.schemas.embed import Encoding
from service.store import Shown


class JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def previewed(shown: Shown | None) -> dict[str, Any] | None:
    """Return an item's preview as schemas.items.ItemPreview; None where it has none."""
    if shown is None:
        return None
    named = {"text": shown.text, "media_type": shown.media_type} | shown.about
    return {name: value for name, value in named.items() if value is not None}


def encoded(
    vector: NDArray[np.float32], dimensions: int | None, encoding: Encoding, field: str = "dimensions"
) -> NDArray[Any] | str:
    """Return the leading `dimensions` of a unit vector (D,), renormalised, all of them for None, as /embed's `encoding`
    says (see its schema). Raises InvalidRequest, which names the request's `field`."""
    if dimensions is not None:
        if dimensions > len(vector):
            raise InvalidRequest(f"{field} must be between 1 and {len(vector)}")
        try:
            vector = truncate(vector, dimensions)
        except ValueError:
            raise InvalidRequest(f"a vector has no direction in its first {dimensions} dimensions") from None
    match encoding:
        case "float":
            return vector
        case "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
        case "int8":
            return np.asarray(np.clip(np.rint(_int8_scale(len(vector)) * vector), -127, 127), dtype=np.int8)
        case "binary":
            return np.packbits(vector > 0)


def _int8_scale(dimensions: int) -> float:
    """Return the value of 127: five standard deviations of a unit vector's numbers, 5 / √n, or 1 where that is less.

    One scale for all vectors of a length, so that their inner products stay comparable. Against 127 for 1, on captions
    of Flickr8k in 384 dimensions: lowest cosine to the float vector 0.99993 instead of 0.9989, the same ten nearest in
    99.5 % instead of 98.1 %.
    """
    return 127.0 / min(1.0, 5.0 / math.sqrt(dimensions))
