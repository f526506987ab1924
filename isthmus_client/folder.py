"""A folder of images and sounds → items of a server, over HTTP. What is there already is not sent again."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from isthmus_client.calls import NewItem
from isthmus_client.client import Isthmus
from isthmus_client.errors import NotFound
from isthmus_client.results import Written

SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
        *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif"),
    }
)
"""Of the files that are sent; what they are, the service finds out by their content."""


def media_files(folder: Path) -> list[Path]:
    """The images and sounds in a folder and its subfolders, sorted; hidden ones left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def item_id(folder: Path, path: Path) -> str:
    """An item is called by its path in the folder."""
    return path.relative_to(folder).as_posix()


def known_ids(space: Isthmus, collection: str) -> set[str]:
    """The ids that a collection holds; none where it is not there."""
    with suppress(NotFound):
        return {item.id for item in space.items(collection=collection, limit=1_000)}
    return set()


def send(space: Isthmus, folder: Path, files: list[Path], collection: str) -> Iterator[Written]:
    """Store files; the outcome of each, in order."""
    return space.upsert_many(NewItem(item_id(folder, path), path, collection=collection) for path in files)
