"""Indexes on disk, so that a start need neither build them nor read their vectors. Never trusted: SQLite is the truth.

One index is three files, NAME.faiss, NAME.slots.npy and NAME.rows.npz (metadata and records of its rows), and a header
NAME.json that is written last. What a slot holds never changes, so that a start takes from the rows only which slots
are there, and what was added since.
"""

import json
import logging
import os
import re
import shutil
import sqlite3
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import sha256_file
from service.store import rows, schema
from service.store.columns import Columns
from service.store.index import Index
from service.store.kinds import IndexSnapshot, IndexSpec, Keys
from service.store.records import Records

_FILES = (".faiss", ".slots.npy", ".rows.npz")
_WRITTEN = 2**18
"""Numbers written at a time, so that searches never wait for the interpreter meanwhile."""
_HEADER = re.compile(r"[0-9a-f]{32}\.json")

_log = logging.getLogger(__name__)


class SnapshotDamaged(ValueError):
    """Raised where a snapshot cannot be used: the message says what does not fit."""


@dataclass(frozen=True)
class Saved:
    collection: int
    modality: str
    built: IndexSnapshot
    slots: Keys
    rows: tuple[Columns, Records] | None = None
    """Metadata and records of the slots, and perhaps of later ones; None: they are in the rows alone."""


def save(directory: Path, store: str, sequence: int, saved: Saved) -> None:
    """Write an index that holds no change later than `sequence`, then drop the older one of its part."""
    directory.mkdir(exist_ok=True)
    older = [path for path, header in headers(directory) if _part(header) == (saved.collection, saved.modality)]
    name = uuid.uuid4().hex
    try:
        faiss.write_index(saved.built.index, str(directory / f"{name}.faiss"))
        np.save(directory / f"{name}.slots.npy", saved.slots, allow_pickle=False)
        if saved.rows is not None:
            pieces = [of_rows.arrays(len(saved.slots)) for of_rows in saved.rows]
            _save_pieces(directory / f"{name}.rows.npz", {**pieces[0], **pieces[1]})
        files = [suffix for suffix in _FILES if (directory / f"{name}{suffix}").exists()]
        header = {
            "store": store,
            "sequence": sequence,
            "collection": saved.collection,
            "modality": saved.modality,
            "chosen": asdict(saved.built.spec),
            "trained": saved.built.trained,
            "sha256": {suffix: sha256_file(directory / f"{name}{suffix}") for suffix in files},
        }
        staged = directory / f"{name}.new"
        staged.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        os.replace(staged, directory / f"{name}.json")
    except BaseException:
        for path in directory.glob(f"{name}.*"):  # on a full disk it would keep the rows from being written
            path.unlink(missing_ok=True)
        raise
    for path in older:
        _remove(path)


def load_indexes(connection: sqlite3.Connection, directory: Path, store: str, dimensions: int) -> dict[int, Index]:
    """Load the indexes of all collections, by key, and bring them up to date with the rows.

    Vectors that are in no index are read. Raises ValueError for an item without a vector.
    """
    # SQLite alone reads every row: a damaged page is found at the start, not in an answer.
    connection.execute("SELECT max(length(metadata)) FROM items NOT INDEXED").fetchone()
    saved = load(directory, store, schema.sequence(connection), dimensions)
    indexes = {}
    for collection in rows.collections(connection):
        index = indexes[collection.key] = Index(dimensions, collection.index_request)
        for part in saved:
            if part.collection == collection.key:
                index.load(part.modality, part.built, part.slots, part.rows)
        unindexed = rows.slots(connection, collection.key)
        for part in saved:
            if part.collection == collection.key and part.rows is not None:
                unindexed = unindexed[~index.revive(part.modality, unindexed)]
        reader = rows.SlotReader(connection, collection.key, dimensions)
        batches = rows.live(connection, collection.key, int(unindexed[0])) if unindexed.size else ()
        for slots, modalities, metadata, records in batches:
            is_unindexed = np.isin(slots, unindexed)
            for modality in dict.fromkeys(modalities):
                numbers = [place for place, name in enumerate(modalities) if name == modality and is_unindexed[place]]
                places = np.array(numbers, np.int64)
                of_parts = [metadata[place] for place in places], [records[place] for place in places]
                places = places[~index.revive(modality, slots[places], *of_parts)]
                if places.size:
                    read_slots, vectors = reader.vectors(slots[places])
                    if len(read_slots) != len(places):
                        raise ValueError("an item has no vector")
                    fresh = [metadata[place] for place in places], [records[place] for place in places]
                    index.put(modality, read_slots, vectors, *fresh)
    for part in saved:
        if part.collection not in indexes:
            forget(directory, part.collection)
    return indexes


def forget(directory: Path, collection: int, modality: str | None = None) -> None:
    """Delete the index files of a collection, or of one part of it."""
    for path, header in headers(directory):
        if _part(header) == (collection, modality or _part(header)[1]):
            _remove(path)


def load(directory: Path, store: str, latest: int, dimensions: int) -> list[Saved]:
    """Load the indexes that are whole and of this store. The others are deleted, and what no header names."""
    indexes, names = [], set()
    for path, header in headers(directory):
        try:
            indexes.append(read(path, header, store, latest, dimensions))
            names.add(path.stem)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:  # RuntimeError: FAISS cannot read it
            # Gone for good: were SQLite restored from an older copy, its sequence would one day pass the snapshot's,
            # and the snapshot would then look like a part of its history.
            _log.warning("an index is built anew: its snapshot cannot be used (%s)", error)
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.partition(".")[0] not in names and path.is_file():
                path.unlink()
    return indexes


def read(path: Path, header: object, store: str, latest: int, dimensions: int) -> Saved:
    """Raises SnapshotDamaged, OSError, and what FAISS raises for a file that it cannot read."""
    if not isinstance(header, dict) or header["store"] != store or header["sequence"] > latest:
        raise SnapshotDamaged("it is of other rows")
    files = {suffix: path.with_name(path.stem + suffix) for suffix in _FILES}
    if not {".faiss", ".slots.npy"} <= header["sha256"].keys():
        raise SnapshotDamaged("a checksum is missing")
    for suffix, digest in header["sha256"].items():
        if sha256_file(files[suffix]) != digest:
            raise SnapshotDamaged("its checksum does not match")
    index = faiss.read_index(str(files[".faiss"]))
    slots = np.load(files[".slots.npy"], allow_pickle=False)
    if not isinstance(slots, np.ndarray):
        raise SnapshotDamaged("it is an archive")
    if index.d != dimensions or slots.shape != (index.ntotal,) or (np.diff(slots) <= 0).any():
        raise SnapshotDamaged("it is of another shape")
    kind, precision = header["chosen"]["kind"], header["chosen"]["precision"]
    # Earlier versions called an ivf_pq with a rotation ivf_opq. An index of another kind that is gone is searched until
    # the one that replaces it is built.
    built = IndexSnapshot(IndexSpec("ivf_pq" if kind == "ivf_opq" else kind, precision), index, header["trained"])
    derived = None
    if ".rows.npz" in header["sha256"]:
        with np.load(files[".rows.npz"], allow_pickle=False) as arrays:  # it reads each as it is asked for
            derived = Columns.of_arrays(arrays), Records.of_arrays(arrays)
        if len(derived[1]) != len(slots):
            raise SnapshotDamaged("it is of another shape")
    return Saved(header["collection"], header["modality"], built, slots, derived)


def _save_pieces(path: Path, arrays: Mapping[str, Sequence[NDArray[Any]]]) -> None:
    """Write what np.savez() would write of each name's pieces in a row, without a copy of them all in memory."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, pieces in arrays.items():
            header = {
                "descr": np.lib.format.dtype_to_descr(pieces[0].dtype),
                "fortran_order": False,
                "shape": (sum(map(len, pieces)),),
            }
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for piece in pieces:
                    for start in range(0, len(piece), _WRITTEN):
                        file.write(np.ascontiguousarray(piece[start : start + _WRITTEN]).data)


def headers(directory: Path) -> Iterator[tuple[Path, object]]:
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if _HEADER.fullmatch(path.name):
                header: object = None
                with suppress(OSError, ValueError):
                    header = json.loads(path.read_text(encoding="utf-8"))
                yield path, header


def _part(header: object) -> tuple[object, object]:
    return (header.get("collection"), header.get("modality")) if isinstance(header, dict) else (None, None)


def _remove(header: Path) -> None:
    for suffix in (".json", *_FILES):
        header.with_name(header.stem + suffix).unlink(missing_ok=True)


def clear(directory: Path) -> None:
    """Delete every index file."""
    shutil.rmtree(directory, ignore_errors=True)
