"""`python -m service backup | restore | check` run these functions on a store's directory."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import faiss
import numpy as np

from service.store import schema, snapshot
from service.store.errors import StoreDamaged, StoreError
from service.store.files import hold, sync
from service.store.kinds import IndexSnapshot, IndexSpec, Keys
from service.store.rows import SlotReader

_BATCH_ROWS = 10_000
_UNIT = 1e-3
"""Largest deviation of a stored vector's length from 1."""


def backup(store: Path, target: Path) -> int:
    """Copy a consistent state of a store's rows into one file, and return the number of items.

    The store may be served, and written to, meanwhile. Raises StoreError; a target that is there is not overwritten.
    """
    if target.exists():
        raise StoreError(f"{target} is there already: it is not overwritten")
    with closing(schema.open_existing(store / schema.FILE)) as source:
        _copy(source, target)
    with closing(schema.connect(target, read_only=True)) as copy:
        return _verify(copy, target)


def restore(source: Path, store: Path) -> int:
    """Make a store from a backup, in a directory without one, and return the number of items. Raises StoreError.

    Its indexes are built at its first start, in the background.
    """
    with closing(schema.open_existing(source)) as connection:
        count = _verify(connection, source)
        lock = hold(store)
        try:
            if (store / schema.FILE).exists():
                raise StoreError(f"{store} holds a store already: restore into another directory, or move it away")
            snapshot.clear(store / "snapshot")
            _copy(connection, store / schema.FILE)
        finally:
            os.close(lock)
    return count


def contents(store: Path) -> tuple[str, str | None, int]:
    """Return a store's space, the name of the bundle that filled it, and how many items it has. Raises StoreError."""
    with closing(schema.open_existing(store / schema.FILE)) as connection, schema.reading(store):
        [count] = connection.execute("SELECT count(*) FROM items").fetchone()
        return schema.meta(connection, "space") or "", schema.meta(connection, schema.BUNDLE), count


def _copy(source: sqlite3.Connection, target: Path) -> None:
    staged = target.with_name(target.name + ".new")
    staged.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(staged)) as copy:
            source.backup(copy)  # in one step, and so of one moment, whatever is written meanwhile
        sync(staged)
        os.replace(staged, target)
        sync(target.parent)
    except (OSError, sqlite3.Error) as error:
        staged.unlink(missing_ok=True)
        raise StoreError(f"{target} cannot be written: {error}") from None


def _verify(connection: sqlite3.Connection, path: Path) -> int:
    try:
        if (report := connection.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise StoreDamaged(f"{path} is damaged: {report}")
        return int(connection.execute("SELECT count(*) FROM items").fetchone()[0])
    except sqlite3.Error as error:
        raise StoreDamaged(f"{path} is damaged: {error}") from None


def check(store: Path) -> Iterator[tuple[bool, str]]:
    """Yield each check's result and its description. The store may be served meanwhile. Raises StoreError."""
    with closing(schema.open_existing(store / schema.FILE)) as connection:
        try:
            connection.execute("BEGIN")
            schema.check_version(connection, store)
            problems = [row[0] for row in connection.execute("PRAGMA integrity_check(10)")]
            yield problems == ["ok"], "database pages: " + "; ".join(problems)
            broken = connection.execute("PRAGMA foreign_key_check").fetchall()
            yield not broken, f"references: {len(broken)} broken"
            yield from _check_rows(connection)
            yield from _check_snapshot(connection, store / "snapshot")
        except sqlite3.Error as error:
            yield False, f"database: {error}"


def _check_rows(connection: sqlite3.Connection) -> Iterator[tuple[bool, str]]:
    for check, query in (
        ("items without a vector", "SELECT count(*) FROM items WHERE slot NOT IN (SELECT slot FROM vectors)"),
        ("vectors without an item", "SELECT count(*) FROM vectors WHERE slot NOT IN (SELECT slot FROM items)"),
        ("metadata that are no JSON", "SELECT count(*) FROM items WHERE NOT json_valid(metadata)"),
    ):
        count = connection.execute(query).fetchone()[0]
        yield not count, f"{check}: {count}"
    faults = total = 0
    for key, dimensions in connection.execute("SELECT key, dimensions FROM collections ORDER BY key").fetchall():
        rows = connection.execute(
            "SELECT vector FROM items JOIN vectors USING (slot) WHERE collection = ? ORDER BY slot", (key,)
        )
        while batch := rows.fetchmany(_BATCH_ROWS):
            full_vectors = [vector for (vector,) in batch if len(vector) == 4 * dimensions]
            vectors = np.frombuffer(b"".join(full_vectors), "<f4").reshape(-1, dimensions).astype(np.float64)
            lengths = np.sqrt((vectors * vectors).sum(axis=1))
            good = np.abs(lengths - 1) < _UNIT  # False for NaN too
            faults += len(batch) - int(np.count_nonzero(good))
            total += len(batch)
    yield not faults, f"vectors: {total}, of which {faults} are not finite and of unit length"


def _check_snapshot(connection: sqlite3.Connection, directory: Path) -> Iterator[tuple[bool, str]]:
    store, last_sequence = schema.meta(connection, "store") or "", int(schema.meta(connection, "sequence") or 0)
    collections = dict(connection.execute("SELECT key, dimensions FROM collections"))
    for path, header in snapshot.headers(directory):
        try:
            dimensions = collections[header["collection"]] if isinstance(header, dict) else 0
            saved = snapshot.read(path, header, store, last_sequence, dimensions)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            yield False, f"index {path.stem}: cannot be used ({error}); the next start builds it anew"
            continue
        rows = connection.execute(
            "SELECT slot FROM items WHERE collection = ? AND modality = ? ORDER BY slot",
            (saved.collection, saved.modality),
        )
        living = np.intersect1d(np.fromiter((row[0] for row in rows), np.int64), saved.slots)
        try:
            reader = SlotReader(connection, saved.collection, dimensions)
            differing = _differing(saved.built, saved.slots, living, reader)
        except ValueError as error:
            yield False, f"index {path.stem}: cannot be compared ({error})"
            continue
        kind = saved.built.spec.kind
        detail = "holds codes, not compared" if differing is None else f"{differing} differ from the rows"
        living_of_all = f"{len(living)} of its {saved.built.count} vectors live"
        yield not differing, f"index {path.stem}: {kind}, {living_of_all}, {detail}"


def _differing(built: IndexSnapshot, slots: Keys, living: Keys, reader: SlotReader) -> int | None:
    """Return how many vectors of a graph differ from the rows' vectors; None for an index of codes."""
    if built.spec != IndexSpec("hnsw", "float32"):
        return None
    differing = 0
    for start in range(0, len(living), _BATCH_ROWS):
        present, vectors = reader.vectors(living[start : start + _BATCH_ROWS])
        places = np.searchsorted(slots, present)
        indexed = faiss.downcast_index(built.index.storage).reconstruct_batch(places)
        differing += int(np.count_nonzero((indexed != vectors).any(axis=1)))
    return differing
