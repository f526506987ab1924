"""The indexes on disk, so that a start need not read every vector again. Never trusted: SQLite is the truth."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import faiss

from service.contract.bundle import sha256_file
from service.store.index import Index

_HEADER = "snapshot.json"


def save(directory: Path, store_id: str, sequence: int, indexes: Mapping[int, Index]) -> None:
    """Write the indexes by collection key, holding every change up to `sequence`, replacing an older snapshot."""
    staging = directory.with_name(directory.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    files = []
    for collection, index in indexes.items():
        with index.frozen() as parts:
            for modality, part in parts.items():
                file = staging / f"{collection}-{modality}.faiss"
                faiss.write_index(part, str(file))
                files.append(
                    {"name": file.name, "sha256": sha256_file(file), "collection": collection, "modality": modality}
                )
    header = {"store": store_id, "sequence": sequence, "files": files}
    (staging / _HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
    # A crash between these two leaves no snapshot, which costs one slow start and no data.
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(staging, directory)


def load(directory: Path, store_id: str, latest: int, dimensions: int) -> tuple[int, dict[int, Index]]:
    """The snapshot's sequence and its indexes; (0, {}) where there is none that is whole and of this store."""
    try:
        return _load(directory, store_id, latest, dimensions)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # RuntimeError: FAISS cannot read it
        # Gone for good: were SQLite restored from an older copy, its sequence would one day pass the snapshot's, and
        # the snapshot would then look like a part of its history.
        shutil.rmtree(directory, ignore_errors=True)
        return 0, {}


def _load(directory: Path, store_id: str, latest: int, dimensions: int) -> tuple[int, dict[int, Index]]:
    header = json.loads((directory / _HEADER).read_text(encoding="utf-8"))
    if header["store"] != store_id or header["sequence"] > latest:
        raise ValueError("a snapshot of other rows")
    parts: dict[int, dict[str, faiss.IndexIDMap]] = {}
    for entry in header["files"]:
        file = directory / entry["name"]
        if sha256_file(file) != entry["sha256"]:
            raise ValueError("a damaged snapshot")
        part = faiss.read_index(str(file))
        if not isinstance(part, faiss.IndexIDMap) or part.d != dimensions:
            raise ValueError("a snapshot of another kind of index")
        parts.setdefault(entry["collection"], {})[entry["modality"]] = part
    return header["sequence"], {collection: Index(dimensions, held) for collection, held in parts.items()}
