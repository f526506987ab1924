"""The interface of a store, whatever database holds the items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from service.contract.vectors import Vectors
from service.errors import InvalidRequest, NotFound
from service.store.background import Background
from service.store.browsing import Facets, Order
from service.store.filters import Filter
from service.store.items import Collection, Entry, Item, Metadata, Moment, Preview
from service.store.keywords import KeywordSearch
from service.store.kinds import Effort, IndexRequest, Kind, Precision
from service.store.labels import LabelSet, ListedLabelSet
from service.store.previews import Shown

MOST_FOUND_BYTES = 64 * 2**20
"""Largest metadata that one search may return, in bytes of JSON: in memory they take several times as much."""
TOO_MUCH_FOUND = (
    f"what is found holds more than {MOST_FOUND_BYTES // 2**20} MiB of metadata: ask for fewer results, or fewer "
    "queries at a time"
)


@dataclass(slots=True)  # a frozen one takes four times as long to make, and a search makes many
class Hit:
    item: Item
    score: float
    """Cosine similarity, -1 to 1."""
    moment: Moment | None = None
    """The part of the video that is most like the query."""
    shown: Shown | None = None
    """The item's preview, where it was asked for and exists."""


@dataclass(frozen=True)
class Part:
    """Says how the items of one modality of a collection are indexed at present."""

    modality: str
    kind: Kind
    precision: Precision | None
    """Precision of the codes; None where the kind of index has its own."""
    count: int
    indexed: int
    """Number of items in the index; the others are compared one by one."""
    building: bool


@dataclass(frozen=True)
class VectorSearch:
    """Asks for the `count` nearest items of a collection to each of the unit vectors (Q, D)."""

    collection: str
    queries: Vectors
    count: int
    modalities: Sequence[str] | None = None
    filter: Filter | None = None
    leave_out: Sequence[str | None] | None = None
    """For each query, one item that is not to be among its own results."""
    with_vector: bool = False
    with_shown: bool = False
    effort: Effort | None = None
    by_modality: bool = False
    """Whether to return the `count` nearest of each modality, one modality after the other."""


class Store(Protocol):
    """An open store. An awaited write is durable and can be searched; no method blocks the event loop.

    Every method that names a collection, an item or a label set that is not there raises NotFound, and every method
    NotReady where the store cannot answer. Where a method has a body, it is that of a store which lacks the feature.
    """

    kind: ClassVar[str]
    """The database's name, for messages."""
    shared: ClassVar[bool]
    """Whether other processes may write to it meanwhile."""

    async def ready(self) -> bool:
        """Return whether it can be read now, as far as can be told without doing so."""

    async def writable(self) -> bool:
        """Return whether it can be written now. Writes a little if the last write is long past or failed."""

    async def close(self) -> None:
        """Finish every write and search that has begun, and release the store."""

    # Items

    async def upsert(self, entries: Sequence[Entry]) -> None:
        """Write all the entries or none, each in place of the item of its collection and id; no id twice."""

    async def get(self, collection: str, id: str, with_vector: bool = False) -> Item: ...

    async def holds(self, collection: str, id: str) -> bool:
        """Return whether the item exists; False also where the collection does not."""

    async def vectors(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        """Return stored vectors (D,) by id."""

    async def moments_of(self, collection: str, ids: Sequence[str]) -> dict[str, list[Moment]]:
        """Return the moments, with their vectors, of those items that have some, by item id; none where there is no
        such collection."""

    async def page(
        self,
        collection: str | None,
        modality: str | None,
        cursor: str | None,
        limit: int,
        *,
        filter: Filter | None = None,
        order: Order | None = None,
    ) -> tuple[list[Item], str | None]:
        """Return items in a stable order, and the cursor of the next page, None at the end.

        The order is that of the first writing in SQLite, and by collection and id in Milvus. With a filter or an order,
        for which a collection is named, it is that of browsing.Order. Raises InvalidRequest for a cursor that no page
        came with, and where a store has neither filter nor order.
        """

    async def facets(
        self, collection: str, keys: Sequence[str] = (), *, modality: str | None = None, filter: Filter | None = None
    ) -> Facets:
        """Count the items that pass the filter, those of each modality, and those with each value of metadata keys.
        Raises InvalidRequest where a store cannot."""

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """Delete items with their moments, and return how many of them existed."""

    async def move(
        self, collection: str, ids: Mapping[str, str], metadata: Mapping[str, Metadata] | None = None
    ) -> int:
        """Give items other ids (old → new) with all that is stored of them, and return how many of them existed.

        Those whose old ids are in `metadata` get other metadata too.
        An item that had the new id is deleted. No id is there twice, among the old and the new ones together.
        """

    async def delete_matching(self, collection: str, filter: Filter) -> int: ...

    async def search(self, request: VectorSearch) -> list[list[Hit]]:
        """Return the items nearest to each query, best first, as the index finds them.

        The score of an item with moments is that of the whole or of its best moment, which the hit names. Scores are
        exact whatever the index. What is written or deleted while the search runs, it may see as it was before. Raises
        InvalidRequest where what is found is more than MOST_FOUND_BYTES.
        """

    async def background(self, collection: str, queries: Vectors) -> dict[str, Background]:
        """Return how alike the items of each modality are to queries (Q, D) that mean nothing: those of a sample, kept
        while the collection changes little. A modality with few items has none, and a store may have none at all."""
        return {}

    async def keyword_search(self, request: KeywordSearch) -> list[Hit]:
        """Return the best items by BM25 (the hits' score), with their vectors, best first. Raises InvalidRequest for a
        field that is none of the collection's keyword fields."""
        raise InvalidRequest(f"keywords: a {self.kind} store has no index of words")

    async def preview(self, collection: str, id: str) -> Preview:
        """Return an item's preview. Raises NotFound where it has none."""
        raise NotFound(f"a {self.kind} store keeps no previews")

    async def shown(self, collection: str, ids: Sequence[str]) -> dict[str, Shown]:
        """Return the preview (text, or details of the stored picture or sound) of every item that has one, by id."""
        return {}

    async def sample(self, collection: str, count: int) -> tuple[list[Item], int]:
        """Return up to `count` items with vectors, the same until something is written, and the number of all items."""

    async def version(self, collection: str) -> str:
        """Return a value that changes whenever an item of the collection is written or deleted."""

    # Collections

    async def collections(self) -> list[Collection]: ...

    async def collection(self, name: str) -> Collection: ...

    async def parts(self, name: str) -> list[Part]: ...

    async def create_collection(self, name: str, request: IndexRequest | None = None) -> bool:
        """Return whether it was created by this call: it is no error that it is there already.

        With `request` its index is to be of that kind from now on. Raises InvalidRequest for what this store has not.
        """

    async def set_keyword_fields(self, collection: str, fields: Sequence[str]) -> None:
        """Set the keyword fields, also for the items that exist already. Raises InvalidRequest."""
        if fields:
            raise InvalidRequest(f"keywords: a {self.kind} store has no index of words")

    async def drop_collection(self, name: str) -> None:
        """Delete a collection with its items and their moments."""

    # Label sets

    async def put_label_set(self, name: str, definition: Mapping[str, Any], vectors: Mapping[str, Vectors]) -> None: ...

    async def label_set(self, name: str) -> LabelSet: ...

    async def label_sets(self, after: str, limit: int) -> list[ListedLabelSet]:
        """Return the first label sets whose names come after `after`, by name."""

    async def label_set_version(self, name: str) -> str:
        """Return a value that changes whenever the label set is written."""

    async def delete_label_set(self, name: str) -> None: ...
