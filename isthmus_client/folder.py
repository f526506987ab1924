"""The files of a folder become items of a server, over HTTP. A later run sends only files that are new or changed, or
whose preview the server lacks; a file that was renamed takes its item along.

Every item keeps what its file was under `file` in its metadata, so that any later run, from any machine, can tell. For
people who browse, `file.folder`, `file.date` and `file.month` say where it lies and when it was taken or written.

The metadata of `a/b.jpg` come from a JSON object in `a/b.jpg.json`, else in `a/b.json`. Its fields go on top of those
in the file's line of `metadata.jsonl`, which lies in the folder itself and has a `file_name` in each line, as in
Hugging Face's ImageFolder. A job of a tar reads the same files.
"""

import codecs
import datetime
import hashlib
import io
import json
import os
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from isthmus_client.calls import ListOptions, NewItem
from isthmus_client.client import Isthmus
from isthmus_client.errors import NotFound
from isthmus_client.inputs import IMAGE_SUFFIXES, is_media
from isthmus_client.results import Item, Written

KEY = "file"
"""The metadata field that says what an item's file was."""
FOLDER, DATE, MONTH = f"{KEY}.folder", f"{KEY}.date", f"{KEY}.month"
"""The metadata fields by which a folder is browsed. A date is in seconds since 1970, of the clock that the camera or
this machine showed, as if it were UTC."""
TABLE = "metadata.jsonl"
TEXT_SUFFIXES = (".txt", ".md")
_SOUNDS = (
    ".wav .wave .bwf .rf64 .flac .ogg .oga .opus .spx .mp3 .mp2 .mpga .aiff .aif .aifc .caf .au .snd .m4a .m4b .m4r "
    ".aac .adts .3gp .amr .awb .weba .mka .wma .w64"
)
_VIDEOS = ".mp4 .m4v .f4v .mov .qt .mkv .webm .avi .flv .3g2 .ogv .mts .m2ts .wmv .mpg .mpeg .vob"
_ARRAYS = ".npy"
SUFFIXES = IMAGE_SUFFIXES.union(_SOUNDS.split(), _VIDEOS.split(), [_ARRAYS])
"""Suffixes of images, sounds, videos and arrays. The server finds out by a file's content which of them it is."""
_UNCERTAIN_SUFFIXES = ("", ".ts")
"""A file of these is sent if it begins as an image, a sound or a video: most `.ts` files are programs."""
_PREVIEWED = ("image", "audio")
"""Modalities of which a server keeps previews; of a text it shows the text itself."""
_HEADER_BYTES = 512
_MAX_METADATA_BYTES = 16_384
"""The server's own limit."""
_MAX_TEXT_BYTES = 1_000_000
_MAX_FILE_BYTES = 256_000_000
"""A file is sent in one request, which takes about five times its size of memory here. The server's own limits are
lower, unless its operator raises them."""
_EXIF, _DATE, _DATE_ORIGINAL = 0x8769, 0x0132, 0x9003
"""Tags of EXIF: its own directory, when the file was changed, and when the picture was taken."""
_AT_ONCE = 1_000
"""Items that one request deletes or moves."""
_MAX_ID_CHARS = 256


class UnsuitableFile(Exception):
    """Raised where a file is not sent: the message says why."""


@dataclass
class Listing:
    """Lists the content of a folder and its subfolders, without hidden ones. Names are paths with slashes."""

    folder: Path
    files: list[str] = field(default_factory=list)
    """The images, sounds, videos and texts, in the order in which they are sent."""
    descriptions: set[str] = field(default_factory=set)
    """The JSON files."""
    others: Counter[str] = field(default_factory=Counter)
    """Number of files of other kinds, by suffix."""
    skipped: list[str] = field(default_factory=list)
    """Names of the files of other kinds."""
    hidden: list[str] = field(default_factory=list)
    """Hidden files and folders, whose names begin with a dot."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Why folders cannot be read, by name."""
    links: list[str] = field(default_factory=list)
    """Links to folders: they are not followed."""

    def description(self, name: str) -> str | None:
        """Return the JSON file that describes a file, where there is one."""
        beside = (f"{name}.json", os.path.splitext(name)[0] + ".json")
        return next((path for path in beside if path in self.descriptions), None)

    def leave_out_arrays(self) -> None:
        """Count arrays among the files of other kinds."""
        arrays = [name for name in self.files if name.lower().endswith(_ARRAYS)]
        self.files = [name for name in self.files if name not in {*arrays}]
        self.others[_ARRAYS] += len(arrays)
        self.skipped = sorted([*self.skipped, *arrays])


def list_folder(folder: Path) -> Listing:
    listing = Listing(folder)

    def note_unreadable(error: OSError) -> None:
        listing.unreadable[_name(folder, error.filename)] = f"the folder cannot be read: {error.strerror}"

    for path, folders, names in os.walk(folder, onerror=note_unreadable):
        listing.hidden += (_name(folder, path, name) for name in sorted(folders + names) if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        listing.links += (_name(folder, path, name) for name in folders if os.path.islink(os.path.join(path, name)))
        for name in sorted(names):
            if not name.startswith("."):
                _note_file(listing, _name(folder, path, name))
    if unused := listing.descriptions.difference(map(listing.description, listing.files)):
        listing.others[".json"] = len(unused)
        listing.skipped = sorted([*listing.skipped, *unused])
    return listing


def _note_file(listing: Listing, name: str) -> None:
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".json":
        listing.descriptions.add(name)
    elif _is_indexed(listing.folder / name, suffix):
        listing.files.append(name)
    elif name != TABLE:
        listing.others[suffix or "without a suffix"] += 1
        listing.skipped.append(name)


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
    """Says what became of one file."""

    name: str
    error: str | None = None
    """Why the file is not stored."""
    unchanged: bool = False
    """True where the stored item is left as it is."""
    previewed: bool = False
    """True where the file was sent only because the server had no preview of it."""
    modality: str | None = None
    truncated: bool = False
    """The text is longer than the model reads; or the file is damaged, and what can be read of it is stored."""


Report = Callable[[Outcome], None]


class FolderIndex:
    """Runs once over a folder: `follow` renamed files, `send` the others, `prune` items of files that are gone."""

    def __init__(self, space: Isthmus, listing: Listing, collection: str, modality: str | None = None) -> None:
        """Read what the collection holds. `modality`: that of arrays, where the bundle has several that take them.
        Raises ClientError."""
        self._modality = modality
        self._space, self._listing, self._collection = space, listing, collection
        self._mark = listing.folder.resolve().name
        if any(name.lower().endswith(_ARRAYS) for name in listing.files):
            towers = [tower for model in space.models() for tower in model.towers.values()]
            if not any(tower["preprocessing"]["kind"] == "array" for tower in towers):
                listing.leave_out_arrays()
        self._previews = space.keeps_previews()
        self._known = self._read_known()
        self._only_previewed: set[str] = set()
        """Names of the files that are sent for their previews alone."""
        self._table, self.table_errors = _read_table(listing.folder / TABLE)
        self._too_large: tuple[int, str] | None = None
        """The size of the smallest file that the server refused because of its size, and what it said."""

    @property
    def missing(self) -> list[str]:
        """Return the names in metadata.jsonl that are none of the folder's files."""
        return sorted(self._table.keys() - set(self._listing.files))

    def send(self, *, again: bool, report: Report) -> None:
        """Send the files that are new or changed, or with `again` all; report each file once. Raises ClientError."""
        sizes: dict[str, int] = {}
        for outcome in self._space.upsert_many(self._changed(sizes, again, report)):
            size = sizes.pop(outcome.id)
            if outcome.error and outcome.error.code == "body_too_large":
                limit = (size, outcome.error.detail)
                self._too_large = min(self._too_large or limit, limit)
            report(_outcome(outcome, outcome.id in self._only_previewed))

    def _read_known(self) -> dict[str, Item]:
        """Return what the collection holds, by id; nothing where there is no such collection."""
        options: ListOptions = {"collection": self._collection, "limit": 1_000}
        if self._previews:
            options["include"] = "preview"
        try:
            return {item.id: item for item in self._space.items(**options)}
        except NotFound as error:
            if error.code != "not_found":  # what answers is no Isthmus
                raise
            return {}

    def follow(self) -> dict[str, str]:
        """Move the items of files that were renamed to their files' new names (old → new). Raises ClientError.

        A file that is new here and has the content of one that is gone is that one, renamed.
        """
        by_digest: dict[str, list[str]] = {}
        for name in self._missing_ids():
            by_digest.setdefault(_stamp_of(self._known[name].metadata)["sha256"], []).append(name)
        sizes = {_stamp_of(self._known[name].metadata).get("bytes") for names in by_digest.values() for name in names}
        moves: dict[str, str] = {}
        for name in self._listing.files if by_digest else ():
            if name in self._known or not _is_id(name):
                continue
            candidates = by_digest.get(_digest(self._listing.folder / name, sizes) or "")
            if candidates:
                same_name = [candidate for candidate in candidates if _basename(candidate) == _basename(name)]
                candidates.remove(name_before := (same_name or candidates)[0])
                moves[name_before] = name
        move_iterator = iter(moves.items())
        while batch := dict(islice(move_iterator, _AT_ONCE)):
            metadata = {old: {**self._known[old].metadata, FOLDER: self._place(new)} for old, new in batch.items()}
            self._space.move(batch, metadata=metadata, collection=self._collection)
        if moves:
            self._known = self._read_known()
        return moves

    def _changed(self, sizes: dict[str, int], again: bool, report: Report) -> Iterator[NewItem]:
        """Yield the items to send. Notes the size of each file, and reports the files that are not sent."""
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
        """Return the item of a file; None where the stored one stays. Raises UnsuitableFile, OSError."""
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UnsuitableFile("the name is not valid UTF-8") from None
        stored_item = self._known.get(name)
        old_stamp = {} if stored_item is None else _stamp_of(stored_item.metadata)
        if not old_stamp and stored_item is not None and not again:
            return None
        lacks_preview = stored_item is not None and self._lacks_preview(stored_item)
        path = self._listing.folder / name
        status = path.stat()
        described = self._descriptions(name)
        stamp = _stamp(status)
        if described:
            stamp["described"] = hashlib.sha256(b"\0".join(described)).hexdigest()
        if not again and not lacks_preview and _same(stamp, old_stamp, "bytes", "modified", "described"):
            return None
        text = name.lower().endswith(TEXT_SUFFIXES)
        self._check_size(status.st_size, _MAX_TEXT_BYTES if text else _MAX_FILE_BYTES)
        data = _read(path, status.st_size + 1)
        stamp["sha256"] = hashlib.sha256(data).hexdigest()
        if not again and _same(stamp, old_stamp, "sha256", "described"):
            if not lacks_preview:
                return None
            self._only_previewed.add(name)
        if self._previews:
            stamp["previewed"] = True
        stored_metadata = {} if stored_item is None else stored_item.metadata
        metadata = {key: value for key, value in stored_metadata.items() if key not in old_stamp.get("fields", ())}
        fields: dict[str, Any] = {}
        for description in described:
            fields |= _object(description, f"the file's metadata ({self._listing.description(name)})")
        stamp |= {"folder": self._mark} | ({"fields": sorted(fields)} if fields else {})
        browsed = {FOLDER: self._place(name), **_date_fields(data, status.st_mtime)}
        content, modality = _text(data) if text else data, self._modality if name.lower().endswith(_ARRAYS) else None
        return NewItem(name, content, metadata | fields | browsed | {KEY: stamp}, self._collection, modality)

    def _place(self, name: str) -> str:
        """Return the folder of a file, with the name of the whole: `Pictures/2024/rome`."""
        return "/".join([self._mark, *name.split("/")[:-1]])

    def _lacks_preview(self, item: Item) -> bool:
        """Return whether the server would keep a preview of this item, and was not given the file for it yet."""
        if not self._previews or item.modality not in _PREVIEWED or (item.preview or {}).get("media_type"):
            return False
        return not _stamp_of(item.metadata).get("previewed")

    def _descriptions(self, name: str) -> list[bytes]:
        """Return the JSON objects that describe a file; the later goes on top of the earlier. Raises UnsuitableFile."""
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

    def prune(self) -> list[str]:
        """Delete the items of this folder's files that are gone, and return their ids. Raises ClientError."""
        names = self._missing_ids()
        name_iterator = iter(names)
        while batch := list(islice(name_iterator, _AT_ONCE)):
            self._space.delete(batch, collection=self._collection)
        return names

    def _missing_ids(self) -> list[str]:
        """Return the ids of the items of this folder's files that are gone."""
        absent = sorted(self._known.keys() - set(self._listing.files))
        ours = [name for name in absent if _stamp_of(self._known[name].metadata).get("folder") == self._mark]
        return [name for name in ours if _is_gone(self._listing.folder / name)]


def _date_fields(data: bytes, modified_s: float) -> dict[str, Any]:
    """Return the fields of a file's date: when the camera took its photograph, or when it was written."""
    date_time = _photo_time(data) or datetime.datetime.fromtimestamp(modified_s, datetime.UTC).astimezone()
    return {DATE: int(date_time.replace(tzinfo=datetime.UTC).timestamp()), MONTH: f"{date_time:%Y-%m}"}


def _photo_time(data: bytes) -> datetime.datetime | None:
    """Return the date in a picture's EXIF; None without Pillow, which comes with the command."""
    try:
        from PIL import Image
    except ImportError:
        return None
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
            exif = image.getexif()
            date = exif.get_ifd(_EXIF).get(_DATE_ORIGINAL) or exif.get(_DATE)
            return datetime.datetime.strptime(f"{str(date).strip(chr(0) + ' ')} +0000", "%Y:%m:%d %H:%M:%S %z")
    except Exception:  # no picture, or EXIF that is damaged: there is the file's own date
        return None


def _read_table(path: Path) -> tuple[dict[str, str], list[str]]:
    """Return the metadata in a table, as JSON, by the name of the file; and what is wrong with its lines."""
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


def _object(data: bytes, label: str) -> dict[str, Any]:
    """Return a JSON object. Raises UnsuitableFile."""
    if len(data) > _MAX_METADATA_BYTES:
        raise UnsuitableFile(f"{label} is larger than {_MAX_METADATA_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8-sig"), parse_constant=_refuse)
        # Infinite numbers and halves of characters can be read, but not sent.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise UnsuitableFile(f"{label} is not valid JSON") from None
    if not isinstance(value, dict):
        raise UnsuitableFile(f"{label} is not a JSON object")
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def _text(data: bytes) -> str:
    # Editors of Windows write UTF-16, with a byte-order mark.
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        raise UnsuitableFile("the text is not UTF-8, nor UTF-16 with a byte-order mark: save it as UTF-8") from None
    if "\0" in text:
        raise UnsuitableFile("the text is no UTF-8: it holds NUL characters, as UTF-16 without a byte-order mark does")
    return text


def unchanged(path: Path, metadata: Mapping[str, Any]) -> bool:
    """Return whether an item was made of this file; True, too, where the item does not say. Raises OSError."""
    old_stamp = _stamp_of(metadata)
    if not old_stamp or _same(_stamp(path.stat()), old_stamp, "bytes", "modified"):
        return True
    return _same({"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}, old_stamp, "sha256")


def _stamp_of(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the stamp of the file that an item was made of; an empty one for an item that was not made of a file."""
    stamp = metadata.get(KEY)
    return stamp if isinstance(stamp, Mapping) and isinstance(stamp.get("sha256"), str) else {}


def _stamp(status: os.stat_result) -> dict[str, Any]:
    """Return the size and time of change of a file, which is not read again while both stay the same."""
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}


def _same(stamp: Mapping[str, Any], old_stamp: Mapping[str, Any], *keys: str) -> bool:
    return all(stamp.get(key) == old_stamp.get(key) for key in keys)


def _is_gone(path: Path) -> bool:
    """Return whether the file does not exist; False, too, where that cannot be found out."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False


def _digest(path: Path, sizes: Collection[Any]) -> str | None:
    """Return the SHA-256 of a file whose size is one of these; None for another, and for one that cannot be read."""
    try:
        size = path.stat().st_size
        return hashlib.sha256(_read(path, size + 1)).hexdigest() if size in sizes else None
    except OSError:
        return None


def _basename(name: str) -> str:
    return name.rpartition("/")[2]


def _is_id(name: str) -> bool:
    """Return whether the server takes that name for an id."""
    return len(name) <= _MAX_ID_CHARS and not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def _outcome(response: Written, previewed: bool) -> Outcome:
    error = response.error.detail if response.error else None
    return Outcome(response.id, error, previewed=previewed, modality=response.modality, truncated=response.truncated)
