"""Items, collections and label sets. `interface.py` says what a store is; there are two:

sqlite.py   one process, one directory: durable rows in SQLite, and the indexes in memory that are derived from them
milvus/     many processes over one Milvus
"""

from service.store.background import Background
from service.store.browsing import Facets, Order
from service.store.errors import SpaceMismatch, StoreDamaged, StoreError, StoreInUse
from service.store.filters import Filter, parse
from service.store.interface import Hit, Part, Store, VectorSearch
from service.store.items import Collection, Entry, Item, Moment, Preview
from service.store.keywords import KeywordSearch
from service.store.kinds import PRECISIONS, Effort, IndexRequest, Kind, Precision, Rules
from service.store.labels import LabelSet
from service.store.previews import Shown
from service.store.schema import DEFAULT_COLLECTION
from service.store.sqlite import SqliteStore

__all__ = [
    "DEFAULT_COLLECTION",
    "PRECISIONS",
    "Background",
    "Collection",
    "Effort",
    "Entry",
    "Facets",
    "Filter",
    "Hit",
    "IndexRequest",
    "Item",
    "KeywordSearch",
    "Kind",
    "LabelSet",
    "Moment",
    "Order",
    "Part",
    "Precision",
    "Preview",
    "Rules",
    "Shown",
    "SpaceMismatch",
    "SqliteStore",
    "Store",
    "StoreDamaged",
    "StoreError",
    "StoreInUse",
    "VectorSearch",
    "parse",
]
