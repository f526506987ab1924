"""A folder of images, sounds and videos → items of a server, over HTTP. What is there already is not sent again.

With each item goes what its file was: `file` in its metadata, as `python -m service index` writes and reads it too.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from isthmus_client.calls import NewItem
from isthmus_client.client import Isthmus
from isthmus_client.errors import NotFound
from isthmus_client.inputs import IMAGE_SUFFIXES
from isthmus_client.results import Written

KEY = "file"
"""Of the metadata."""
_SOUNDS = ".wav .flac .ogg .oga .opus .mp3 .aiff .aif .caf .au .m4a .m4b .aac .3gp .amr .weba .wma"
_VIDEOS = ".mp4 .m4v .mov .mkv .webm .avi .flv .3g2"
SUFFIXES = IMAGE_SUFFIXES.union(_SOUNDS.split(), _VIDEOS.split())
"""Of the files that are sent; what they are, the service finds out by their content."""


def media_files(folder: Path) -> list[Path]:
    """The images, sounds and videos in a folder and its subfolders, sorted; hidden ones left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def item_id(folder: Path, path: Path) -> str:
    """An item is called by its path in the folder."""
    return path.relative_to(folder).as_posix()


def stamp(path: Path) -> dict[str, int]:
    """What tells without reading it that a file is as it was. Raises OSError."""
    status = os.stat(path, follow_symlinks=False)
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def digest(data: bytes) -> dict[str, str]:
    return {"sha256": hashlib.sha256(data).hexdigest()}


def unchanged(path: Path, metadata: Mapping[str, Any]) -> bool:
    """Whether a file is what an item was made of; so it is where the item does not say. Raises OSError."""
    held = metadata.get(KEY)
    if not isinstance(held, Mapping) or stamp(path).items() <= held.items():
        return True
    return digest(path.read_bytes()).items() <= held.items()


def known(space: Isthmus, collection: str) -> dict[str, Mapping[str, Any]]:
    """The metadata of what a collection holds, by id; nothing where it is not there."""
    with suppress(NotFound):
        return {item.id: item.metadata for item in space.items(collection=collection, limit=1_000)}
    return {}


def send(
    space: Isthmus, folder: Path, files: list[Path], collection: str, known: Mapping[str, Mapping[str, Any]]
) -> Iterator[Written]:
    """Store files, each with what it is, and the metadata that it has there; the outcome of each, in order."""
    return space.upsert_many(_item(folder, path, collection, known) for path in files)


def _item(folder: Path, path: Path, collection: str, known: Mapping[str, Mapping[str, Any]]) -> NewItem:
    id = item_id(folder, path)
    try:
        is_now = stamp(path)
        data = path.read_bytes()
    except OSError:
        return NewItem(id, path, collection=collection)  # as a file that cannot be read
    return NewItem(id, data, {**known.get(id, {}), KEY: is_now | digest(data)}, collection)
