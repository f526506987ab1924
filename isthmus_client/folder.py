"""The files of a folder → items of a server, over HTTP. A later run sends only the files that are new or changed.

Every item keeps what its file was under `file` in its metadata, so that any later run, from any machine, can tell.

The metadata of `a/b.jpg` come from a JSON object in `a/b.jpg.json`, else in `a/b.json`. Its fields go on top of those
in the file's line of `metadata.jsonl`, which lies in the folder itself and has a `file_name` in each line, as in
Hugging Face's ImageFolder. A job of a tar reads the same files.
"""

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from isthmus_client.calls import NewItem
from isthmus_client.client import Isthmus
from isthmus_client.errors import NotFound
from isthmus_client.inputs import IMAGE_SUFFIXES, is_media
from isthmus_client.results import Written

KEY = "file"
"""The metadata field that says what an item's file was."""
TABLE = "metadata.jsonl"
TEXT_SUFFIXES = (".txt", ".md")
_SOUNDS = ".wav .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .caf .au .m4a .m4b .aac .3gp .amr .weba .wma .w64"
_VIDEOS = ".mp4 .m4v .mov .mkv .webm .avi .flv .3g2 .ogv .mts .m2ts"
SUFFIXES = IMAGE_SUFFIXES.union(_SOUNDS.split(), _VIDEOS.split())
"""Suffixes of images, sounds and videos. The server finds out by a file's content which of them it is."""
_UNCERTAIN_SUFFIXES = ("", ".ts")
"""A file of these is sent if it begins as an image, a sound or a video: most `.ts` files are programs."""
_HEADER_BYTES = 512
_MAX_METADATA_BYTES = 16_384
"""The server's own limit."""
_MAX_TEXT_BYTES = 1_000_000
_MAX_FILE_BYTES = 256_000_000
"""A file is sent in one request, which takes about five times its size of memory here. The server's own limits are
lower, unless its operator raises them."""
_DELETED_AT_ONCE = 1_000


class UnsuitableFile(Exception):
    """A file is not sent: the message says why."""


@dataclass
class Listing:
    """The content of a folder and its subfolders, without hidden files and folders. Names are paths with slashes."""

    folder: Path
    files: list[str] = field(default_factory=list)
    """The images, sounds, videos and texts, in the order in which they are sent."""
    descriptions: set[str] = field(default_factory=set)
    """The JSON files."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of files of other kinds, by suffix."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why folders cannot be read, by name."""
    links: list[str] = field(default_factory=list)
    """Links to folders: they are not followed."""

    def description(self, name: str) -> str | None:
        """The JSON file that describes a file, where there is one."""
        beside = (f"{name}.json", os.path.splitext(name)[0] + ".json")
        return next((other for other in beside if other in self.descriptions), None)


def list_folder(folder: Path) -> Listing:
    listing = Listing(folder)

    def note_unreadable(error: OSError) -> None:
        listing.unreadable[_name(folder, error.filename)] = f"the folder cannot be read: {error.strerror}"

    for path, folders, names in os.walk(folder, onerror=note_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        listing.links += (_name(folder, path, name) for name in folders if os.path.islink(os.path.join(path, name)))
        for name in sorted(names):
            if not name.startswith("."):
                _note_file(listing, _name(folder, path, name))
    if unused := listing.descriptions.difference(map(listing.description, listing.files)):
        listing.others[".json"] = len(unused)
    return listing


def _note_file(listing: Listing, name: str) -> None:
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".json":
        listing.descriptions.add(name)
    elif _is_indexed(listing.folder / name, suffix):
        listing.files.append(name)
    elif name != TABLE:
        listing.others[suffix or "without a suffix"] += 1


def _name(folder: Path, *parts: str) -> str:
    return Path(*parts).relative_to(folder).as_posix()


def _is_indexed(path: Path, suffix: str) -> bool:
    if suffix not in _UNCERTAIN_SUFFIXES:
        return suffix in SUFFIXES or suffix in TEXT_SUFFIXES
    try:
        return is_media(_read(path, _HEADER_BYTES))
    except OSError:
        return False


def _read(path: Path, most: int) -> bytes:
    """Read at most so many bytes of a plain file, or of one that a link leads to. Raises OSError."""
    # Opening a pipe would otherwise wait for whoever writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(0, "not a plain file", str(path))
        return file.read(most)


@dataclass(frozen=True)
class Outcome:
    """The result of indexing one file."""

    name: str
    error: str | None = None
    """Why the file is not stored."""
    unchanged: bool = False
    """True where the stored item is left as it is."""
    modality: str | None = None
    truncated: bool = False
    """The text is longer than the model reads; or the file is damaged, and what can be read of it is stored."""


Report = Callable[[Outcome], None]


class FolderIndex:
    """One run over a folder: `send` its files, and `prune` what is stored of files that are gone."""

    def __init__(self, space: Isthmus, listing: Listing, collection: str) -> None:
        """Reads what the collection holds. Raises ClientError."""
        self._space, self._listing, self._collection = space, listing, collection
        self._mark = listing.folder.resolve().name
        self._known = _known(space, collection)
        self._table, self.table_errors = _read_table(listing.folder / TABLE)
        self._too_large: tuple[int, str] | None = None
        """The size of the smallest file that the server refused because of its size, and what it said."""

    @property
    def missing(self) -> list[str]:
        """Names in metadata.jsonl that are none of the folder's files."""
        return sorted(self._table.keys() - set(self._listing.files))

    def send(self, *, again: bool, report: Report) -> None:
        """Send the files that are new or changed, or with `again` all; report each file once. Raises ClientError."""
        sizes: dict[str, int] = {}
        for written in self._space.upsert_many(self._changed(sizes, again, report)):
            size = sizes.pop(written.id)
            if written.error and written.error.code == "body_too_large":
                refused = (size, written.error.detail)
                self._too_large = min(self._too_large or refused, refused)
            report(_outcome(written))

    def _changed(self, sizes: dict[str, int], again: bool, report: Report) -> Iterator[NewItem]:
        """The items to send. Notes the size of each file, and reports the files that are not sent."""
        for name in self._listing.files:
            try:
                item = self._item(name, again)
            except UnsuitableFile as error:
                report(Outcome(name, error=str(error)))
            except OSError as error:
                report(Outcome(name, error=error.strerror or str(error)))
            else:
                if item is None:
                    report(Outcome(name, unchanged=True))
                else:
                    sizes[name] = item.metadata[KEY]["bytes"]
                    yield item

    def _item(self, name: str, again: bool) -> NewItem | None:
        """The item of a file; None where the stored one stays. Raises UnsuitableFile, OSError."""
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UnsuitableFile("the name is not valid UTF-8") from None
        stored = self._known.get(name)
        former = {} if stored is None else _stamp_of(stored)
        if former is None and not again:
            return None
        former = former or {}
        path = self._listing.folder / name
        status = path.stat()
        described = self._described(name)
        is_now = _stamp(status)
        if described:
            is_now["described"] = hashlib.sha256(b"\0".join(described)).hexdigest()
        if not again and _same(is_now, former, "bytes", "modified", "described"):
            return None
        text = name.lower().endswith(TEXT_SUFFIXES)
        self._check_size(status.st_size, _MAX_TEXT_BYTES if text else _MAX_FILE_BYTES)
        data = _read(path, status.st_size + 1)
        is_now["sha256"] = hashlib.sha256(data).hexdigest()
        if not again and _same(is_now, former, "sha256", "described"):
            return None
        metadata = {key: value for key, value in (stored or {}).items() if key not in former.get("fields", ())}
        fields: dict[str, Any] = {}
        for description in described:
            fields |= _object(description, f"the file's metadata ({self._listing.description(name)})")
        is_now |= {"folder": self._mark} | ({"fields": sorted(fields)} if fields else {})
        return NewItem(name, _text(data) if text else data, metadata | fields | {KEY: is_now}, self._collection)

    def _described(self, name: str) -> list[bytes]:
        """The JSON objects that describe a file; the later goes on top of the earlier. Raises UnsuitableFile."""
        described = [self._table[name].encode()] if name in self._table else []
        beside = self._listing.description(name)
        if beside is not None:
            try:
                described.append(_read(self._listing.folder / beside, _MAX_METADATA_BYTES + 1))
            except OSError as error:
                raise UnsuitableFile(f"the file's metadata ({beside}) cannot be read: {error.strerror}") from None
        return described

    def _check_size(self, size: int, most: int) -> None:
        if size > most:
            raise UnsuitableFile(f"the file is larger than {most} bytes")
        if self._too_large is not None and size >= self._too_large[0]:
            raise UnsuitableFile(self._too_large[1])

    def prune(self) -> tuple[list[str], int]:
        """Delete the items of this folder's files that are gone. Raises ClientError.

        Returns their ids, and the number of items of missing files that stay, because they do not say of which folder:
        an earlier version stored them.
        """
        gone, unmarked = [], 0
        for name in sorted(self._known.keys() - set(self._listing.files)):
            former = _stamp_of(self._known[name])
            if former is not None and _is_gone(self._listing.folder / name):
                if former.get("folder") == self._mark:
                    gone.append(name)
                else:
                    unmarked += "folder" not in former
        waiting = iter(gone)
        while some := list(islice(waiting, _DELETED_AT_ONCE)):
            self._space.delete(some, collection=self._collection)
        return gone, unmarked


def _known(space: Isthmus, collection: str) -> dict[str, Mapping[str, Any]]:
    """The metadata of what a collection holds, by id; nothing where there is no such collection."""
    try:
        return {item.id: item.metadata for item in space.items(collection=collection, limit=1_000)}
    except NotFound as error:
        if error.code != "not_found":  # what answers is no Isthmus
            raise
        return {}


def _read_table(path: Path) -> tuple[dict[str, str], list[str]]:
    """The metadata in a table, as JSON, by the name of the file; and what is wrong with its lines."""
    table: dict[str, str] = {}
    errors: list[str] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return table, errors
    except OSError as error:
        return table, [error.strerror or str(error)]
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fields = _object(line, f"line {number}")
                name = fields.pop("file_name", None)
                if not isinstance(name, str):
                    raise UnsuitableFile(f"line {number} has no file_name")
            except UnsuitableFile as error:
                errors.append(str(error))
            else:
                table[name.removeprefix("./")] = json.dumps(fields, ensure_ascii=False)
    return table, errors


def _object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises UnsuitableFile."""
    if len(data) > _MAX_METADATA_BYTES:
        raise UnsuitableFile(f"{what} is larger than {_MAX_METADATA_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse)
        # Infinite numbers and halves of characters can be read, but not sent.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise UnsuitableFile(f"{what} is not valid JSON") from None
    if not isinstance(value, dict):
        raise UnsuitableFile(f"{what} is not a JSON object")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UnsuitableFile("the text is not UTF-8") from None


def unchanged(path: Path, metadata: Mapping[str, Any]) -> bool:
    """Return whether an item was made of this file; True, too, where the item does not say. Raises OSError."""
    former = _stamp_of(metadata)
    if former is None or _same(_stamp(path.stat()), former, "bytes", "modified"):
        return True
    return _same({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}, former, "sha256")


def _stamp_of(metadata: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the stamp of the file that an item was made of; None for an item that was not made of a file."""
    stamp = metadata.get(KEY)
    return stamp if isinstance(stamp, Mapping) and "sha256" in stamp else None


def _stamp(status: os.stat_result) -> dict[str, Any]:
    """Return the size and time of change of a file, which is not read again while both stay the same."""
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def _same(is_now: Mapping[str, Any], former: Mapping[str, Any], *keys: str) -> bool:
    return all(is_now.get(key) == former.get(key) for key in keys)


def _is_gone(path: Path) -> bool:
    """Return whether the file does not exist; False, too, where that cannot be found out."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _outcome(written: Written) -> Outcome:
    error = written.error.detail if written.error else None
    return Outcome(written.id, error, modality=written.modality, truncated=written.truncated)
