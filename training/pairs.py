"""Read pairs of media and text from tables and folders, check them, and split them without leaks."""

import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.contract.bundle import Modality
from training.data import shards
from training.data.shards import Medium, Member
from training.errors import TrainingError
from training.files import QUOTING, dialect, wrong_header
from training.recipe import PairSource, Recipe

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
SUFFIXES = {
    "image": {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"},
    "audio": {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif"},
    "array": {".npy"},
}
FILE_COLUMNS = ("file", "path", "filename", "file_name", "image", "audio", "media")
"""What the column of files is called in tables that no recipe describes."""
BROKEN = 0.1
"""Share of a set that may be broken: beyond it, it is another set than was meant."""
_TOLD = 10  # broken samples that are named
_HOW_TO_SET_ROOT = "set data.root (--set data.root=… or ISTHMUS_DATA)"


class PairError(TrainingError):
    """Pairs cannot be read: the message names the source, the row and what is wrong."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of one source and split."""

    name: str
    modality: Modality
    media: Sequence[Medium]
    texts: list[str]
    """Every distinct text once."""
    links: NDArray[np.int64]
    """(pairs, 2): index into media, index into texts."""
    labels: NDArray[np.int64] | None
    """(media,) index into classes; None when the texts are captions."""
    classes: list[str]
    """Readable class names, in order of first appearance in the whole source."""
    weight: float
    supervision: str = "pairs"
    """What the recipe says of it: what training may take of these pairs."""
    words: bool = False
    """Whether the texts are single words, each of several media."""


class Gathered:
    """Media and texts of rows, each once in the order of first appearance, and what belongs together."""

    def __init__(self, media: "dict[Any, int] | None" = None) -> None:
        self.media: dict[Any, int] = media or {}
        self.texts: dict[str, int] = {}
        self.links: list[tuple[int, int]] = []
        self.labels: list[int] = []

    def add(self, medium: Any, captions: Sequence[str], label: int | None = None) -> int:
        """Take in a row; the place of its medium. A medium keeps the label that it came with first."""
        index = self.media.setdefault(medium, len(self.media))
        if label is not None and index == len(self.labels):
            self.labels.append(label)
        self.links += [(index, self.texts.setdefault(caption, len(self.texts))) for caption in captions]
        return index

    def pairs(
        self,
        name: str,
        modality: Modality,
        media: Sequence[Medium],
        classes: list[str],
        weight: float = 1.0,
        **others: Any,
    ) -> Pairs:
        """The pairs of the media, which stand for those that were taken in."""
        links = np.asarray(self.links, np.int64).reshape(-1, 2)
        labels = np.asarray(self.labels, np.int64) if self.labels else None
        return Pairs(name, modality, media, list(self.texts), links, labels, classes, weight, **others)


@dataclass(frozen=True)
class _Row:
    media: str | Member
    text: str | None
    label: str | None
    split: Split


def read_pairs(recipe: Recipe, name: str) -> dict[Split, Pairs]:
    """Read one source of the recipe. Raises PairError naming the file and row of whatever is missing or empty.

    A media file may have several captions; all of them stay on its side of the split. Labels become one text per
    template.
    """
    source = recipe.pairs[name]
    rows = list(_rows(recipe, name, source))
    if not rows:
        raise PairError(f"pairs.{name}: no pairs were found")
    _check_rows(name, source, rows)
    folder = recipe.path(source.folder)
    classes = list(dict.fromkeys(source.names.get(row.label, readable(row.label)) for row in rows if row.label))
    places = {called: place for place, called in enumerate(classes)}
    templates = recipe.templates.get(source.modality, [])
    result: dict[Split, Pairs] = {}
    for split in SPLITS:
        gathered = Gathered()
        for row in rows:
            if row.split != split or (split != "test" and row.label in source.unseen):
                continue
            label = None
            if row.label is not None:
                called = source.names.get(row.label, readable(row.label))
                label, captions = places[called], [template.format(called) for template in templates]
            elif source.words is not None:
                words = [word.strip() for word in re.findall(source.words, row.text or "")]
                captions = list(dict.fromkeys(_formed(word, form) for form in source.word_forms for word in words))
            else:
                captions = [row.text or ""]
            gathered.add(row.media, captions, label)
        if split == "train" and source.supervision != "pairs":
            # Labels that training must not see are not read at all.
            gathered = Gathered(gathered.media if source.supervision == "concepts" else None)
            gathered.links = [(index, 0) for index in gathered.media.values()]
        if split == "validation" and source.supervision not in ("pairs", "choice"):
            gathered = Gathered()
        paths = [file if isinstance(file, Member) else folder / file for file in gathered.media]
        if missing := [path for path in paths if isinstance(path, Path) and not path.is_file()]:
            raise PairError(f"pairs.{name}: {_absent(missing, len(paths))}")
        kind = {"supervision": source.supervision, "words": source.words is not None}
        result[split] = gathered.pairs(name, source.modality, paths, classes, source.weight, **kind)
    if not len(result["train"].links) and source.supervision in ("pairs", "concepts"):
        raise PairError(f"pairs.{name}: the train split is empty")
    return result


def _absent(missing: Sequence[Path], total: int) -> str:
    """Say that media are not there."""
    hint = "; folders are separated by /, and not by \\" if "\\" in str(missing[0]) else ""
    others = f", nor are {len(missing) - 1:,} others of {total:,} media" if len(missing) > 1 else ""
    return f"{missing[0]} is named and is not there{others}{hint}"


def _check_rows(name: str, source: PairSource, rows: Sequence[_Row]) -> None:
    """Raises PairError for rows that contradict one another: of a medium in two splits, or with two labels."""
    before: dict[str | Member, _Row] = {}
    for row in rows:
        first = before.setdefault(row.media, row)
        if row.split != first.split:
            raise PairError(f"pairs.{name}: {row.media} is in two splits, {first.split} and {row.split}")
        if row.label != first.label:
            raise PairError(f"pairs.{name}: {row.media} has two labels, {first.label} and {row.label}")
    labels = {row.label for row in rows if row.label is not None}
    if unnamed := [label for label in labels if not (source.names.get(label) or readable(label))]:
        raise PairError(f"pairs.{name}: the label {min(unnamed)!r} has no letter or digit: say in names what it means")
    if unknown := [label for label in source.unseen if label not in labels]:
        raise PairError(f"pairs.{name}.unseen: {unknown[0]} is none of its labels")
    if unknown := sorted(set(source.prompts) - {source.names.get(label, readable(label)) for label in labels}):
        raise PairError(f"pairs.{name}.prompts: {unknown[0]} is none of its classes")


def read_labels(recipe: Recipe, name: str) -> set[str]:
    """The labels of a source as its table or folders spell them. Raises PairError."""
    return {row.label for row in _rows(recipe, name, recipe.pairs[name]) if row.label is not None}


def _formed(word: str, form: str) -> str:
    """A word as its form has it: `an astronaut` for the form `a {}`."""
    if form == "a {}" and word[:1].lower() in {*"aeiou"}:
        form = "an {}"
    return form.replace("{}", word)


def readable(label: str) -> str:
    """A class name as people write it: `car_side` → `car side`, `Door - wood creaks` → `door wood creaks`."""
    return " ".join(re.sub(r"[_\-,]+", " ", label).split()).lower()


def _rows(recipe: Recipe, name: str, source: PairSource) -> Iterator[_Row]:
    folder, by_file = recipe.path(source.folder), _split_files(recipe, name, source)
    by_value = {value: split for split, values in source.splits.items() for value in values}
    unnamed: Split = "test" if source.supervision == "none" else "train"
    excluded = _excluded(recipe, name, source)
    names, columns = set[str](), set[str]()
    for number, row in enumerate(table_rows(recipe, name, source), start=1):
        where = f"pairs.{name}: row {number}"
        try:
            medium = row[source.media]
            label = _said(row[source.label or "label"]) if source.text is None else None
            texts = [text for column in source.text_columns for text in _each(_plain(row[column], text=True))]
            value = _said(row[source.split_column]) if source.split_column else None
        except KeyError as error:
            raise PairError(f"{where} has no column {error}; it has {', '.join(row)}") from None
        except TypeError as error:
            raise PairError(f"{where}: {error}") from None
        if not isinstance(medium, str | Member) or (isinstance(medium, str) and not medium.strip()):
            raise PairError(f"{where}: {source.media} is no name of a file but {medium!r}")
        medium = medium if isinstance(medium, Member) else _inside(medium, folder)
        media = medium.name if isinstance(medium, Member) else medium
        if excluded or by_file:
            names.add(media)
        if source.where:
            columns.update(row)
        texts = texts if label is None else [label]
        if not source.skip_empty and not (texts and all(text.strip() for text in texts)):
            raise PairError(f"{where} ({media}) has an empty text")
        split = by_value.get(value) if value is not None else by_file.get(media) if by_file else unnamed
        if split is None or (split == "train" and media in excluded):
            continue
        if split == "train" and any(row.get(column) not in values for column, values in source.where.items()):
            continue
        if split == "train" and (source.supervision == "choice" or _held_out(source, media)):
            split = "validation"
        for text in texts:
            if text.strip():
                yield _Row(medium, text.strip() if label is None else None, label, split)
    lists = {f"split_files.{split}": {media for media in by_file if by_file[media] == split} for split in SPLITS}
    _check_lists(name, source, {"exclude": excluded, **lists}, names, columns)


def _check_lists(
    name: str, source: PairSource, lists: Mapping[str, set[str]], names: set[str], columns: set[str]
) -> None:
    """Raises PairError where a list names none of the media, or `where` a column that no row has."""
    for field, listed in lists.items():
        if names and listed and not listed & names:
            raise PairError(
                f"pairs.{name}: {field}: none of its names, such as {min(listed)}, is that of a medium, such as "
                f"{min(names)}"
            )
    if columns and (unknown := sorted(set(source.where) - columns)):
        there = ", ".join(sorted(columns))
        raise PairError(f"pairs.{name}: where: no row has a column {unknown[0]}; they have {there}")


def _split_files(recipe: Recipe, name: str, source: PairSource) -> dict[str, Split]:
    """The split of each medium that a split file names, one on a line. Raises PairError for one in two splits."""
    result: dict[str, Split] = {}
    for split, file in source.split_files.items():
        path = _file(recipe, name, f"split_files.{split}", file)
        if source.split_column:
            raise PairError(f"pairs.{name}: splits come from split_column or from split_files: give one of the two")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise PairError(f"pairs.{name}: split_files.{split}: {path} is not UTF-8: save it as UTF-8") from None
        for media in (_inside(line, recipe.path(source.folder)) for line in lines if line.strip()):
            if (other := result.setdefault(media, split)) != split:
                raise PairError(f"pairs.{name}: split_files: {media} is in two splits, {other} and {split}")
    return result


def _each(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _file(recipe: Recipe, name: str, field: str, named: Path) -> Path:
    """Return the path of a file that a field of a source names. Raises PairError where it is not there."""
    path = recipe.path(named)
    if not path.is_file():
        raise PairError(f"pairs.{name}: {field}: {path} is not there; {_HOW_TO_SET_ROOT}")
    return path


def _excluded(recipe: Recipe, name: str, source: PairSource) -> set[str]:
    if source.exclude is None:
        return set()
    path = _file(recipe, name, "exclude", source.exclude)
    rows = list(read_table(path, f"pairs.{name}: exclude"))
    if rows and "file" not in rows[0]:
        raise PairError(f"pairs.{name}: exclude: {path} has no column file")
    return {_inside(row["file"], recipe.path(source.folder)) for row in rows}


def _inside(file: str, folder: Path) -> str:
    """One name of a file that a table or a list names: from the folder of the media, where it lies there."""
    path = os.path.normpath(file.strip())
    if os.path.isabs(path) and Path(path).is_relative_to(folder.absolute()):
        return os.path.relpath(path, folder.absolute())
    return path


def media_name(medium: Medium, folder: Path) -> str:
    """The name by which lists know a medium of a source whose media lie in `folder`."""
    return medium.name if isinstance(medium, Member) else _inside(str(medium.absolute()), folder)


def group_of(pattern: str | None, name: str) -> str | None:
    """Return what the pattern's first group finds in a medium's name, or in the name without its folders."""
    match = pattern and (re.search(pattern, name) or re.search(pattern, name.rpartition("/")[2]))
    return match[1] if match else None


def _held_out(source: PairSource, media: str) -> bool:
    if not source.validation_fraction:
        return False
    key = group_of(source.group, media) or media
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32 < source.validation_fraction


def table_rows(recipe: Recipe, name: str, source: PairSource) -> Iterator[dict[str, Any]]:
    """The rows of a source's tables, by column; of a folder per label, rows that say the same. Raises PairError."""
    if source.table is None:
        folder = recipe.path(source.folder)
        if not folder.is_dir():
            raise PairError(f"pairs.{name}: {folder} is not there; {_HOW_TO_SET_ROOT}")
        for path in sorted(folder.glob("*/**/*")):
            inside = path.relative_to(folder)
            known = path.suffix.lower() in SUFFIXES.get(source.modality, SUFFIXES["array"])
            if known and not any(part.startswith(".") for part in inside.parts):
                yield {source.media: str(inside), "label": inside.parts[0]}
        return
    files = table_files(recipe, name, source)
    if inner := [file for file in files if file.endswith(shards.KINDS)]:
        yield from _shard_rows(name, source, inner)
    for file in files:
        if file not in inner:
            yield from read_table(Path(file), f"pairs.{name}")


def table_files(recipe: Recipe, name: str, source: PairSource) -> list[str]:
    """The files that a source's tables name; globs and addresses are resolved. Raises PairError for one without any."""
    named: list[str] = []
    for pattern in source.tables:
        try:
            files = shards.files(pattern, recipe.data.root)
        except (OSError, ValueError, ImportError) as error:
            raise PairError(f"pairs.{name}: {pattern} cannot be listed: {error}") from None
        absent = next((file for file in files if "://" not in file and not Path(file).is_file()), None)
        if absent is not None or not files:
            what = f"{absent} is not there" if absent else f"{pattern} matches no file"
            if splits := sorted({path.parent.name for path in recipe.path(Path(pattern)).glob("*/*.arrow")}):
                raise PairError(
                    f"pairs.{name}: {pattern} has the splits {', '.join(splits)}: name one, {pattern}/SPLIT"
                )
            raise PairError(f"pairs.{name}: {what}; {_HOW_TO_SET_ROOT}")
        named += files
    return named


def _shard_rows(name: str, source: PairSource, files: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of shards, as a table would have them. What is broken is counted, told of and left out.

    Raises PairError where it is more than a few.
    """
    ends = [file.rpartition("/")[2] for file in files]
    if (source.exclude or source.split_files) and len(set(ends)) < len(ends):
        twice = next(end for end in ends if ends.count(end) > 1)
        raise PairError(f"pairs.{name}: two shards are called {twice}: lists of their samples need them to differ")
    texts = source.text_columns
    said = texts or tuple(filter(None, [source.label]))
    columns = [*said, *([source.split_column] if source.split_column else []), *source.where]
    total, broken, damaged = 0, 0, 0
    told: list[str] = []
    for file in files:
        for row in shards.rows(file, source.media, list(dict.fromkeys(columns))):
            total += 1
            if not isinstance(row, str):
                medium = row[source.media]
                try:
                    row |= {column: _plain(row[column], column in texts) for column in columns}
                    if source.skip_empty or any(row[column] for column in said):
                        yield row
                        continue
                    row = f"{medium} has an empty text"
                except TypeError as error:
                    row = f"{medium}: {error}"
            broken += 1
            if isinstance(row, shards.Damage):
                damaged, damage = damaged + 1, row
            told += [row] if len(told) < _TOLD else []
    if damaged > max(1, BROKEN * len(files)):  # how many samples each has lost cannot be known
        raise PairError(f"pairs.{name}: {damaged:,} of {len(files):,} shards are damaged, such as: {damage}")
    if broken > max(1, BROKEN * total) or 0 < broken == total:
        raise PairError(f"pairs.{name}: {broken:,} of {total:,} samples cannot be used, the first: {told[0]}")
    if broken:
        lines = [f"pairs.{name}: {broken:,} of {total:,} samples cannot be used and are left out:", *told]
        print("\n  ".join(lines), file=sys.stderr)


def _plain(value: Any, text: bool) -> str | list[str]:
    """A value of a shard as a table has it; of a text that is a list, each that is not empty. Raises TypeError."""
    if isinstance(value, list) and text:
        return [one for one in map(_said, value) if one]
    return _said(value)


def _said(value: Any) -> str:
    if isinstance(value, dict | list | bytes):  # its Python spelling would become a caption
        raise TypeError(f"{str(value)[:40]!r} is no text but a {type(value).__name__}")
    text = _text(value).strip()
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise TypeError(f"{text[:40]!r} is no text: it has half of a character (a lone surrogate)")
    return text


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def read_table(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV, TSV or JSONL table, or of COCO's captions, by column: texts, and what JSON nests as it is.

    Raises PairError, which begins with `what` and names the row.
    """
    try:
        for row in _coco_captions(path) if path.suffix.lower() == ".json" else records(path):
            yield {key: value if isinstance(value, dict | list) else _text(value) for key, value in row.items()}
    except PairError as error:
        raise PairError(f"{what}: {error}") from None


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV, TSV or JSONL table as they stand there. Raises PairError, which names the row."""
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix.lower() == ".jsonl":
                for number, line in enumerate(stream, start=1):
                    if not line.strip():
                        continue
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise PairError(f"line {number} of {path} is no JSON object")
                    yield row
            else:
                reader = csv.DictReader(stream, dialect=dialect(path.name))
                if problem := wrong_header(reader.fieldnames, path.name):
                    raise PairError(f"{path}: {problem}")
                for number, row in enumerate(reader, start=1):
                    if None in row or None in row.values():
                        raise PairError(f"row {number} of {path} has not as many fields as the first line")
                    yield row
    except json.JSONDecodeError:
        raise PairError(f"line {number} of {path} is not JSON") from None
    except csv.Error as error:
        raise PairError(f"{path} cannot be read after row {number}: {error} ({QUOTING})") from None
    except UnicodeDecodeError:
        raise PairError(f"{path} is not UTF-8, in the rows after {number}: save it as UTF-8") from None
    except OSError as error:
        raise PairError(f"{path} cannot be read: {error.strerror}") from None


def _coco_captions(path: Path) -> Iterator[dict[str, str]]:
    """A row for each caption of a caption file of COCO's: `file_name` and `license` of its image, and `caption`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        images = {
            image["id"]: {"file_name": image["file_name"], "license": str(image.get("license", ""))}
            for image in content["images"]
        }
        rows = [images[note["image_id"]] | {"caption": note["caption"]} for note in content["annotations"]]
    except json.JSONDecodeError as error:
        raise PairError(f"line {error.lineno} of {path} is not JSON") from None
    except (OSError, UnicodeDecodeError) as error:
        raise PairError(f"{path} cannot be read: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise PairError(
            f"{path} is no caption file of COCO's, with images (id, file_name) and annotations (image_id, "
            f"caption): {type(error).__name__} {error}"
        ) from None
    yield from rows
