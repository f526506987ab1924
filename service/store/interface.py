"""What the service asks of a store, whatever holds the items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from service.contract.vectors import Vectors
from service.store.filters import Filter
from service.store.kinds import Effort, Kind, Precision, Wanted
from service.store.labels import LabelSet
from service.store.previews import Shown
from service.store.rows import Collection, Entry, Item, Moment, Preview

MOST_FOUND_BYTES = 64 * 2**20
"""Of the metadata that one search may find, in JSON: in memory they become several times as much."""
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
    """What of a video is most like the query."""
    shown: Shown | None = None
    """What there is to see of the item, where that was asked for and there is something."""


@dataclass(frozen=True)
class Part:
    """How the items of one modality of a collection are searched now."""

    modality: str
    kind: Kind
    precision: Precision | None
    """None where the codes are the kind's own."""
    count: int
    indexed: int
    """Of the count; the rest is searched one by one."""
    building: bool


class Store(Protocol):
    """An open store. An awaited write is durable and can be searched; no method blocks the event loop.

    Every method that names a collection, an item or a label set that is not there raises NotFound, and every method
    NotReady where the store cannot answer.
    """

    async def ready(self) -> bool:
        """Whether it can be read now, as far as can be told without doing so."""

    async def writable(self) -> bool:
        """Whether it can be written now. Writes a little where nobody did for a while, or the last write failed."""

    async def close(self) -> None:
        """Finish every write and search that was begun, and let go of the store."""

    # Items

    async def upsert(self, entries: Sequence[Entry]) -> None:
        """Write all the entries or none, each replacing the item of its collection and id, with its moments; no id
        twice."""

    async def get(self, collection: str, id: str, with_vector: bool = False) -> Item: ...

    async def holds(self, collection: str, id: str) -> bool:
        """False for a collection that is not there, too."""

    async def vectors(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        """(D,) by id."""

    async def page(
        self, collection: str | None, modality: str | None, cursor: str | None, limit: int
    ) -> tuple[list[Item], str | None]:
        """Items in an order that stays as it is, and the cursor to go on from, None at the end.

        The order is that of the first writing in SQLite, and by collection and id in Milvus. Raises InvalidRequest for
        a cursor that no page came with.
        """

    async def delete(self, collection: str, ids: Sequence[str]) -> int:
        """How many were there, and are gone with their moments."""

    async def delete_matching(self, collection: str, filter: Filter) -> int: ...

    async def search(
        self,
        collection: str,
        queries: Vectors,
        count: int,
        *,
        modalities: Sequence[str] | None = None,
        filter: Filter | None = None,
        leave_out: Sequence[str | None] | None = None,
        with_vector: bool = False,
        with_shown: bool = False,
        effort: Effort | None = None,
        by_modality: bool = False,
    ) -> list[list[Hit]]:
        """The `count` nearest items to each of the unit vectors (Q, D), best first, as the index finds them.

        The score of an item with moments is that of the whole or of its best moment, which the hit names.
        `by_modality`: the `count` nearest of each modality, one modality after the other. Scores are exact whatever the
        index. `leave_out` names for each query one item that is not to be among its own results. What is written or
        deleted while the search runs, it may see as it was before. Raises InvalidRequest where what is found is more
        than MOST_FOUND_BYTES.
        """

    async def keyword_search(
        self,
        collection: str,
        query: str,
        count: int,
        *,
        field: str | None = None,
        every: bool = False,
        modalities: Sequence[str] | None = None,
        filter: Filter | None = None,
        leave_out: str | None = None,
    ) -> list[Hit]:
        """The `count` best items for the words of a query by BM25 (the hits' score), with their vectors, best first.

        `field` is `text` or one of the collection's keyword fields (raises InvalidRequest for another), None all of
        them; see keywords.search. The item `leave_out` is not among them.
        """

    async def tokens(self, collection: str, ids: Sequence[str]) -> dict[str, Vectors]:
        """The token vectors (N, D) of those items that have any."""

    async def preview(self, collection: str, id: str) -> Preview:
        """Raises NotFound where the item has none, as every item of a store that keeps none."""

    async def shown(self, collection: str, ids: Sequence[str]) -> dict[str, Shown]:
        """What there is to see of those items that there is anything of: their text, what their preview is like."""

    async def sample(self, collection: str, count: int) -> tuple[list[Item], int]:
        """Up to `count` items with their vectors, the same ones until something is written, and how many there are."""

    async def version(self, collection: str) -> str:
        """What changes whenever an item of the collection is written or deleted, so that a map is made anew."""

    # Collections

    async def collections(self) -> list[Collection]: ...

    async def collection(self, name: str) -> Collection: ...

    async def parts(self, name: str) -> list[Part]: ...

    async def create_collection(self, name: str, wanted: Wanted | None = None) -> bool:
        """Whether it was created by this call: it is no error that it is there already.

        With `wanted` its index is to be of that kind from now on. Raises InvalidRequest for what this store has not.
        """

    async def keyword_fields(self, collection: str) -> list[str]:
        """The metadata keys whose words can be searched for, besides the text of text items."""

    async def set_keyword_fields(self, collection: str, fields: Sequence[str]) -> None:
        """Make these the keyword fields, also of the items that are there. Raises InvalidRequest."""

    async def keeps_tokens(self, collection: str) -> bool:
        """Whether items are stored with their token vectors; False for a collection that is not there yet."""

    async def keep_tokens(self, collection: str, wanted: bool) -> None:
        """Keep token vectors of what is written from now on, or throw away those that are kept."""

    async def drop_collection(self, name: str) -> None:
        """Delete a collection with its items and their moments."""

    # Label sets

    async def put_label_set(self, name: str, definition: Mapping[str, Any], vectors: Mapping[str, Vectors]) -> None: ...

    async def label_set(self, name: str) -> LabelSet: ...

    async def label_set_version(self, name: str) -> str:
        """What changes whenever the set is written."""

    async def delete_label_set(self, name: str) -> None: ...
