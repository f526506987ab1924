"""Items are written by functions of a transaction, which change an item's moments along with it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from service.store import keywords, moments, previews, rows, schema
from service.store.items import Entry, Item, Metadata
from service.store.kinds import IndexRequest, Keys
from service.store.writer import Configure, Drop, Put, Remove, Transaction


def ensure_collection(transaction: Transaction, name: str, space: str, dimensions: int) -> int:
    """Return the key of a collection, which is created where it does not exist."""
    key = rows.collection_key(transaction.connection, name)
    if key is None:
        key = schema.create_collection(transaction.connection, name, space, dimensions)
        transaction.changes.append(Configure(key, name, IndexRequest()))
    return key


def drop_collection(transaction: Transaction, key: int, name: str) -> None:
    moments_key = rows.collection_key(transaction.connection, moments.moments_table(name))
    for dropped in (key, moments_key):
        if dropped is not None:
            rows.drop_collection(transaction.connection, dropped)
            transaction.changes.append(Drop(dropped))


def upsert(transaction: Transaction, collection: int, name: str, entries: Sequence[Entry]) -> None:
    """Write entries of one collection, in place of the items with their ids and of these items' moments."""
    connection = transaction.connection
    forget_moments(transaction, name, [entry.id for entry in entries])
    by_modality: dict[str, list[Entry]] = {}
    for entry in entries:
        by_modality.setdefault(entry.modality, []).append(entry)
    for modality, batch in by_modality.items():
        first = transaction.take(len(batch))
        keys, replaced, records = rows.upsert(connection, collection, batch, first)
        rows.forget_details(connection, keys[[entry.id in replaced for entry in batch]])
        keywords.put(connection, collection, keys, batch)
        previews.put(connection, keys, batch)
        slots = np.arange(first, first + len(batch))
        vectors = np.stack([entry.vector for entry in batch])
        metadata = [entry.metadata for entry in batch]
        older = np.sort(np.array(list(replaced.values()), np.int64))
        transaction.changes.append(Put(collection, modality, slots, vectors, metadata, records, older))


def delete(transaction: Transaction, collection: int, name: str, slots: Keys) -> int:
    """Delete the items in these slots with their moments, and return their number."""
    forget_moments(transaction, name, rows.ids_of_slots(transaction.connection, collection, slots))
    return _delete(transaction, collection, slots)


def move(
    transaction: Transaction, collection: int, name: str, ids: Mapping[str, str], metadata: Mapping[str, Metadata]
) -> int:
    """Move items as Store.move does."""
    connection = transaction.connection
    slots = rows.slots_of_ids(connection, collection, list(ids))
    items = rows.items_by_slot(connection, collection, name, set(slots.tolist()), with_vector=True)
    new_ids = {item.id: ids[item.id] for item in items.values()}
    replaced = [new for old, new in new_ids.items() if new != old]
    delete(transaction, collection, name, rows.slots_of_ids(connection, collection, replaced))
    moved = {
        slot: replace(item, id=new_ids[item.id], metadata=metadata.get(item.id, item.metadata))
        for slot, item in items.items()
    }
    _rename(transaction, collection, moved)
    table = moments.moments_table(name)
    if (key := rows.collection_key(connection, table)) is not None:
        slots = _slots_of_moments(transaction, key, list(new_ids))
        parts = rows.items_by_slot(connection, key, table, set(slots.tolist()), with_vector=True)
        _rename(transaction, key, {slot: moments.moved(part, new_ids, metadata) for slot, part in parts.items()})
    return len(new_ids)


def forget_moments(transaction: Transaction, name: str, ids: Sequence[str]) -> None:
    """Delete the moments of these items of a collection."""
    key = rows.collection_key(transaction.connection, moments.moments_table(name))
    if key is not None:  # most collections have no moments
        slots = _slots_of_moments(transaction, key, ids)
        if slots.size:
            _delete(transaction, key, slots)


def _slots_of_moments(transaction: Transaction, key: int, ids: Sequence[str]) -> Keys:
    return rows.slots_of_prefixes(transaction.connection, key, [f"{id}{moments.SEPARATOR}" for id in ids])


def _delete(transaction: Transaction, collection: int, slots: Keys) -> int:
    rows.delete(transaction.connection, collection, slots)
    transaction.changes.append(Remove(collection, slots))
    return int(slots.size)


def _rename(transaction: Transaction, collection: int, items: Mapping[int, Item]) -> None:
    """Write items, by the slots of their rows, under their new ids."""
    for modality in {item.modality for item in items.values()}:
        batch = {slot: item for slot, item in sorted(items.items()) if item.modality == modality}
        first = transaction.take(len(batch))
        records = rows.rename(transaction.connection, collection, batch, first)
        slots = np.arange(first, first + len(batch))
        vectors = np.stack([item.vector for item in batch.values() if item.vector is not None])
        metadata = [item.metadata for item in batch.values()]
        older = np.array(list(batch), np.int64)
        transaction.changes.append(Put(collection, modality, slots, vectors, metadata, records, older))
