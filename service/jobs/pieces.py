"""Items of a job as they stand in its input → what a client would have sent; and work and outcomes as bytes."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import orjson

from service.contract.vectors import Vectors
from service.errors import BodyTooLarge, MalformedRequest
from service.jobs.ledger import Refusal
from service.jobs.plan import Piece
from service.retrieval.indexing import NewItem
from service.schemas.exact_json import parse_json
from service.schemas.inputs import File
from service.schemas.items import InvalidItem, read_item
from service.settings import Limits
from service.store import Entry, Moment, Preview

_LONGEST_ID = 256
"""Of one that is shown with an error."""
_UNIT_TOLERANCE = 1e-3

Outcome = Entry | Refusal


@dataclass(frozen=True)
class Work:
    """A chunk as it is handed out."""

    collection: str
    """Of items that do not name one."""
    keeping: Set[str]
    """The collections that keep token vectors."""
    pieces: Sequence[Piece]
    previews: bool = False
    """Whether the server keeps them."""
    urls: bool = False
    """Whether the server fetches them."""
    meter: str | None = None
    """Of the job, as `Job.meter` has it."""


def read_piece(piece: Piece, collection: str, limits: Limits) -> NewItem | Refusal:
    """The item, read as though a client had sent it, or what is wrong with it."""
    if piece.kind == "refused":
        return Refusal(piece.line, piece.name or None, "invalid_item", piece.detail)
    id: str | None = piece.name or None
    try:
        body = _body(piece)
        if isinstance(given := body.get("id"), str):
            id = given.encode("utf-8", "replace").decode()[:_LONGEST_ID]
        item = read_item({"collection": collection} | body, limits)
        return NewItem(item.id, item.content, item.metadata, item.collection, item.modality or "vector")
    except _Unreadable as error:
        return Refusal(piece.line, id, "malformed_item", str(error))
    except InvalidItem as error:
        return Refusal(piece.line, id, "invalid_item", str(error))


class _Unreadable(Exception): ...


def _body(piece: Piece) -> dict[str, Any]:
    if piece.kind == "line":
        return _object(piece.data, "the line")
    body: dict[str, Any] = {"id": piece.name, "metadata": {}}
    for described in piece.metadata:
        body["metadata"] |= _object(described, "the file's metadata")
    if piece.kind == "text":
        try:
            body["text"] = piece.data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise _Unreadable("the text is not UTF-8") from None
    else:
        body["file"] = File(piece.name, piece.data)
    return body


def _object(data: bytes, what: str) -> dict[str, Any]:
    try:
        held = parse_json(data)
    except MalformedRequest:
        raise _Unreadable(f"{what} is not valid JSON") from None
    except BodyTooLarge:
        raise _Unreadable(f"{what} holds too many values") from None
    if not isinstance(held, dict):
        raise _Unreadable(f"{what} is not a JSON object")
    return held


# As bytes: a line of JSON, then raw bytes one after the other.


def encode_work(work: Work) -> bytes:
    pieces = []
    blobs: list[bytes] = []
    for piece in work.pieces:
        held = {"line": piece.line, "kind": piece.kind, "name": piece.name, "detail": piece.detail}
        pieces.append(held | {"size": len(piece.data), "metadata": [len(each) for each in piece.metadata]})
        blobs += (piece.data, *piece.metadata)
    head = {"collection": work.collection, "keeping": sorted(work.keeping), "previews": work.previews}
    return _packed(head | {"urls": work.urls, "meter": work.meter, "pieces": pieces}, blobs)


def decode_work(data: bytes) -> Work:
    """What `encode_work` wrote. Raises ValueError for anything else."""
    head, rest = _unpacked(data)
    try:
        pieces = []
        for each in head["pieces"]:
            content, *described = (rest.take(size) for size in (each["size"], *each["metadata"]))
            pieces.append(
                Piece(each["line"], each["kind"], each["name"], content, tuple(described), detail=each["detail"])
            )
        # An older server says nothing of URLs, and has none fetched.
        urls, meter = head.get("urls", False), head.get("meter")
        return Work(head["collection"], frozenset(head["keeping"]), pieces, head["previews"], urls, meter)
    except (KeyError, TypeError) as error:
        raise ValueError("no work") from error


def encode_outcomes(outcomes: Sequence[Outcome]) -> bytes:
    head: list[Mapping[str, Any]] = []
    blobs: list[bytes] = []
    for each in outcomes:
        if isinstance(each, Refusal):
            head.append(asdict(each))
            continue
        entry = {name: getattr(each, name) for name in ("collection", "id", "modality", "metadata", "text")}
        of = [(moment, moment.vector) for moment in each.moments if moment.vector is not None]
        entry["moments"] = [(moment.modality, moment.start, moment.end) for moment, _ in of]
        arrays = [array for array in (each.vector, *(vector for _, vector in of), each.tokens) if array is not None]
        entry["shapes"] = [array.shape for array in arrays]
        blobs += (array.astype("<f4").tobytes() for array in arrays)
        if (seen := each.preview) is not None:
            entry["preview"] = {"media_type": seen.media_type, "about": seen.about, "size": len(seen.data)}
            blobs.append(seen.data)
        head.append(entry)
    return _packed({"outcomes": head}, blobs)


def decode_outcomes(data: bytes, dimensions: int) -> list[Outcome]:
    """What `encode_outcomes` wrote. Raises ValueError for anything else, and for what are no unit vectors (D,)."""
    head, rest = _unpacked(data)
    try:
        outcomes: list[Outcome] = []
        for each in head["outcomes"]:
            if "shapes" not in each:
                outcomes.append(Refusal(**each))
                continue
            arrays = [rest.array(shape, dimensions) for shape in each.pop("shapes")]
            vector, of = arrays[0], each.pop("moments")
            held = zip(of, arrays[1 : 1 + len(of)], strict=True)
            moments = tuple(_moment(modality, start, end, found) for (modality, start, end), found in held)
            tokens = arrays[1 + len(of)] if len(arrays) > 1 + len(of) else None
            seen = each.pop("preview", None)
            preview = None if seen is None else _preview(seen["media_type"], seen["about"], rest.take(seen["size"]))
            outcomes.append(Entry(**each, vector=vector, tokens=tokens, moments=moments, preview=preview))
        return outcomes
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError("no outcomes") from error


def _moment(modality: str, start: float, end: float, vector: Vectors) -> Moment:
    if modality not in {"image", "audio"}:
        raise ValueError("a moment of another kind")
    return Moment(modality, float(start), float(end), vector)


def _preview(media_type: str, about: Mapping[str, Any], data: bytes) -> Preview:
    if media_type not in {"image/webp", "audio/mpeg"} or not isinstance(about, dict):
        raise ValueError("a preview of another kind")
    return Preview(media_type, data, about)


def _packed(head: Mapping[str, Any], blobs: Sequence[bytes]) -> bytes:
    return b"".join((orjson.dumps(head), b"\n", *blobs))


def _unpacked(data: bytes) -> tuple[Any, "_Rest"]:
    end = data.find(b"\n")
    if end < 0:
        raise ValueError("no head")
    return orjson.loads(memoryview(data)[:end]), _Rest(memoryview(data)[end + 1 :])


class _Rest:
    def __init__(self, data: memoryview) -> None:
        self._data = data

    def take(self, size: int) -> bytes:
        if not 0 <= size <= len(self._data):
            raise ValueError("it is cut off")
        taken, self._data = self._data[:size], self._data[size:]
        return bytes(taken)

    def array(self, shape: Sequence[int], dimensions: int) -> Vectors:
        if shape[-1] != dimensions or min(shape) < 0:
            raise ValueError("vectors of another length")
        found = np.frombuffer(self.take(4 * int(np.prod(shape))), "<f4").astype(np.float32).reshape(shape)
        lengths = np.linalg.norm(found.astype(np.float64), axis=-1)
        if not (np.abs(lengths - 1) <= _UNIT_TOLERANCE).all():  # NaN compares false
            raise ValueError("no unit vectors")
        return found
