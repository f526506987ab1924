"""Items of a job as they stand in its input → what a client would have sent."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from service.errors import BodyTooLarge, MalformedRequest
from service.jobs.ledger import Refusal
from service.jobs.plan import Piece
from service.retrieval.indexing import NewItem
from service.schemas.exact_json import parse_json
from service.schemas.inputs import File
from service.schemas.items import InvalidItem, read_item
from service.settings import Limits
from service.store import Entry

_LONGEST_ID = 256
"""Of one that is shown with an error."""

Outcome = Entry | Refusal


@dataclass(frozen=True)
class Work:
    """The items of a chunk, and how they are embedded."""

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
