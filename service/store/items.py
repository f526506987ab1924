"""Items, collections, moments and previews: plain types, whatever database holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.contract.vectors import Vectors
from service.store.kinds import IndexRequest

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Preview:
    """A small file of our own making that shows what an item was made from."""

    media_type: str
    data: bytes
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """A part of a video."""

    modality: str
    """Modality of the moment: image is a frame from its middle, audio its sound."""
    start: float
    end: float
    """End of the moment, in seconds."""
    vector: Vectors | None
    """Unit vector (D,); None where it was not asked for."""


@dataclass(frozen=True)
class Entry:
    """Holds an item as a client writes it, before it has a place in the store."""

    collection: str
    id: str
    modality: str
    metadata: Metadata
    vector: Vectors
    """Unit vector (D,)."""
    text: str | None = None
    """The text of a text item: its words can be searched for."""
    preview: Preview | None = None
    moments: Sequence[Moment] = ()
    """Moments of a video or a long sound; a store keeps them in a collection of their own (store/moments.py)."""
    truncated: bool = False
    """Whether only a part of what was given is in the vector; told to who wrote it, and not stored."""
    dates: tuple[str, str] | None = None
    """When an item that comes from another store was created and updated; else the clock says it."""
    mapped: float | None = None
    """Where the vector was mapped from another space: how far it may be off, as 1 less the cosine similarity."""


@dataclass(slots=True)  # a frozen one takes four times as long to make, and a search makes many
class Item:
    collection: str
    id: str
    modality: str
    metadata: Metadata
    created: str
    updated: str
    vector: Vectors | None
    size: int = field(default=0, compare=False)
    """Size of the metadata, in bytes of JSON, or a little more; 0 where it is not known."""


@dataclass(frozen=True)
class Collection:
    name: str
    space: str
    dimensions: int
    created: str
    index_request: IndexRequest
    count: int
    keywords: Sequence[str]
    """Metadata keys whose words can be searched for, besides the text of text items."""
