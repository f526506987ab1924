"""Read what a bundle is evaluated on: a folder per class, a table of `file,label`, or a table of `file,caption`."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from service.contract.bundle import Modality
from training.errors import TrainingError
from training.pairs import FILE_COLUMNS, SUFFIXES, Gathered, Pairs, read_table, readable
from training.recipe import checked, parse_yaml

_LABEL = ("label", "class", "category")
_CAPTION = ("caption", "text")
_Medium = Literal["image", "audio"]
_MEDIA: tuple[_Medium, ...] = ("image", "audio")
_MODALITY: dict[str, _Medium] = {suffix: modality for modality in _MEDIA for suffix in SUFFIXES[modality]}


class DataError(TrainingError):
    """A data set cannot be evaluated on: the message names the file or row and what is wrong."""


def name_of(data: Path) -> str:
    """Return what a data set is called: its file's name, or its folder's where that says nothing."""
    return data.resolve().parent.name if data.stem == "index" else data.resolve().stem


class Wording(BaseModel):
    """Says how classes are put into words: the file of --templates, as YAML or JSON, or with a template per line."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    templates: list[str] | dict[Modality, list[str]] = []
    """Prompts with one {} for the class name; per modality where they differ."""
    names: dict[str, str] = {}
    """Class names for labels that do not read as such."""
    prompts: dict[str, list[str]] = {}
    """Whole prompts of some classes, by label or name: instead of the templates, as `/classify` has them."""

    def of(self, modality: Modality, default: list[str]) -> list[str]:
        templates = self.templates.get(modality, []) if isinstance(self.templates, dict) else self.templates
        return templates or default or ["{}"]

    def prompts_of(self, name: str) -> list[str]:
        """The whole prompts of a class by its name, or by the labels that are called so."""
        labels = [name] if name in self.prompts else [label for label, called in self.names.items() if called == name]
        return [prompt for label in labels for prompt in self.prompts.get(label, [])]


def read_wording(path: Path | None) -> Wording:
    """Reads how classes are put into words. Raises DataError naming the key that is wrong."""
    if path is None:
        return Wording()
    try:
        text = path.read_text(encoding="utf-8-sig")
        values: Any = parse_yaml(text) if path.suffix in (".yaml", ".yml", ".json") else None
        if values is None:
            values = {"templates": [line.strip() for line in text.splitlines() if line.strip()]}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    wording = checked(Wording, values, f"{path}: ", DataError)
    every = wording.templates.values() if isinstance(wording.templates, dict) else [wording.templates]
    for template in (template for templates in every for template in templates):
        if template.count("{}") != 1:
            raise DataError(f"{path}: the template {template!r} must hold {{}} once")
    return wording


def read_data(
    data: Path,
    root: Path | None = None,
    where: Mapping[str, set[str]] | None = None,
    by: Literal["label", "caption"] | None = None,
    names: Mapping[str, str] | None = None,
) -> dict[_Medium, Pairs]:
    """The media of a data set by modality, with labels or captions; both modalities share one list of classes.

    `root` is where a table's files lie (default: the table's folder); `where` keeps the rows whose columns hold one of
    the values; `by` decides for a table that has labels and captions. Raises DataError, and PairError for
    a table that cannot be read.
    """
    if data.is_dir():
        rows = _folder_rows(data) if not where else _no_columns(data)
        root, by = root or data, "label"
    elif data.is_file():
        rows, by = _table_rows(data, where or {}, by)
        root = root or data.parent
    else:
        raise DataError(f"{data} is not there")
    classes: dict[str, int] = {}
    sets = {modality: Gathered() for modality in _MEDIA}
    for where_from, file, said in rows:
        if (modality := _MODALITY.get(Path(file).suffix.lower())) is None:
            raise DataError(f"{where_from}: {file} is neither an image nor a sound by its name")
        if not said.strip():
            raise DataError(f"{where_from}: {file} has an empty {by}")
        if by == "caption":
            sets[modality].add(file, [said.strip()])
            continue
        name = (names or {}).get(said, readable(said)) or said
        label = classes.setdefault(name, len(classes))
        first = sets[modality].labels[sets[modality].add(file, (), label)]
        if first != label:
            raise DataError(f"{where_from}: {file} has two labels, {list(classes)[first]} and {name}")
    result: dict[_Medium, Pairs] = {}
    for modality, gathered in sets.items():
        if gathered.media:
            paths = [root / file for file in gathered.media]
            if missing := [path for path in paths if not path.is_file()]:
                others = f"{len(missing) - 1} more of {len(paths)} files"
                raise DataError(f"{missing[0]} and {others} are not there: --root?")
            result[modality] = gathered.pairs(name_of(data), modality, paths, list(classes))
    if not result:
        raise DataError(f"{data} holds no image and no sound" + (" in the rows of --where" if where else ""))
    if by == "label" and len(classes) < 2:
        raise DataError(f"{data} has the one class {next(iter(classes))}: nothing to tell apart")
    return result


_Row = tuple[str, str, str]  # where it was read, the file, its label or caption


def _folder_rows(folder: Path) -> Iterator[_Row]:
    for path in sorted(folder.glob("*/**/*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() in _MODALITY and not any(part.startswith(".") for part in inside.parts):
            yield str(folder), str(inside), inside.parts[0]


def _no_columns(folder: Path) -> Iterator[_Row]:
    raise DataError(f"{folder} is a folder per class: it has no columns for --where")


def _table_rows(
    path: Path, where: Mapping[str, set[str]], by: Literal["label", "caption"] | None
) -> tuple[Iterator[_Row], Literal["label", "caption"]]:
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path} is neither a folder nor a .csv, .tsv or .jsonl table")
    first = next(read_table(path, "data"), None)
    if first is None:
        raise DataError(f"{path} has no rows")
    columns = {name.strip().lower(): name for name in first}
    file, label, caption = (
        next((columns[name] for name in known if name in columns), None) for known in (FILE_COLUMNS, _LABEL, _CAPTION)
    )
    if file is None or (label is None and caption is None):
        raise DataError(
            f"{path} has the columns {', '.join(first)}: one of {', '.join(FILE_COLUMNS)} is needed, and one of "
            f"{', '.join(_LABEL)} or of {', '.join(_CAPTION)}"
        )
    if unknown := sorted(set(where) - set(first)):
        raise DataError(f"--where: {path} has no column {unknown[0]}; it has {', '.join(first)}")
    if by is None:
        if label is not None and caption is not None:
            raise DataError(f"{path} has {label} and {caption}: say --by label or --by caption")
        by = "caption" if label is None else "label"
    said = label if by == "label" else caption
    if said is None:
        raise DataError(f"{path} has no {by} column; it has {', '.join(first)}")

    def rows() -> Iterator[_Row]:
        for number, row in enumerate(read_table(path, "data"), start=1):
            if all(row.get(column) in values for column, values in where.items()):
                if not (isinstance(row.get(said), str) and isinstance(row.get(file), str)):
                    raise DataError(f"row {number} of {path} has no text in each of the columns {file} and {said}")
                yield f"row {number} of {path}", row[file].strip(), row[said]

    return rows(), by


def write_items(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what was found for every item, as a table to sort and filter."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
