"""Read what is to be embedded once, and cut it into shards: files of rows, each of which any worker can do."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from service.contract.bundle import Manifest
from training.errors import TrainingError
from training.files import write
from training.pairs import FILE_COLUMNS, SUFFIXES, records

_SUFFIXES = {suffix for suffixes in SUFFIXES.values() for suffix in suffixes}


class EmbedError(TrainingError):
    """A set cannot be embedded: the message names the file or row and what is wrong."""


@dataclass(frozen=True)
class Row:
    id: str
    file: str | None
    text: str | None
    metadata: dict[str, Any]


@dataclass(frozen=True)
class Task:
    rows: Path
    target: Path
    failures: Path

    @staticmethod
    def of(described: dict[str, str]) -> "Task":
        return Task(**{name: Path(value) for name, value in described.items()})

    def described(self) -> dict[str, str]:
        return {name: str(value.absolute()) for name, value in asdict(self).items()}


def plan(out: Path, manifest: Manifest, data: Sequence[Path], root: Path | None, size: int) -> None:
    """Write the shards' rows under `out`, unless a plan of the same is there. Raises EmbedError."""
    described = {
        "space": manifest.space,
        "data": [[str(path.resolve()), _stamp(path)] for path in data],
        "root": None if root is None else str(root.resolve()),
        "shard": size,
    }
    stated = out / "plan.json"
    if stated.exists():
        if json.loads(stated.read_text()) != described:
            raise EmbedError(f"{out} was begun with another bundle, other data or another --shard: give another --out")
        return
    folder = out / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    for rows in folder.glob("*.jsonl"):
        rows.unlink()  # of a plan that was not finished: what it had more than this one would be embedded too
    number, count = 0, 0
    stream = None
    try:
        for path in data:
            for row in _rows(path, root):
                if stream is None:
                    stream = (folder / f"{number:06}.jsonl").open("w", encoding="utf-8")
                stream.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
                count += 1
                if count == size:
                    stream.close()
                    stream, count, number = None, 0, number + 1
    finally:
        if stream is not None:
            stream.close()
    if number == count == 0:
        raise EmbedError(f"{', '.join(map(str, data))}: no image, sound or text is there")
    # Last: without it the plan is made again.
    write(stated, json.dumps(described))


def tasks(out: Path) -> list[Task]:
    return [
        Task(rows, out / f"{rows.stem}.parquet", out / "failures" / rows.name)
        for rows in sorted((out / "rows").glob("*.jsonl"))
    ]


def read_rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as stream:
        return [Row(**json.loads(line)) for line in stream]


def _stamp(path: Path) -> list[float]:
    """Return what changes where a table does. A folder is what it was when the plan was made."""
    if not path.exists():
        raise EmbedError(f"{path} is not there")
    return [] if path.is_dir() else [path.stat().st_size, path.stat().st_mtime]


def _rows(path: Path, root: Path | None) -> Iterator[Row]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if file.suffix.lower() in _SUFFIXES and not any(part.startswith(".") for part in inside.parts):
                yield Row(str(inside), str(file.absolute()), None, {})
        return
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise EmbedError(f"{path} is neither a folder nor a .csv, .tsv or .jsonl table")
    base = root or path.parent
    for number, record in enumerate(records(path), start=1):
        named = next((name for name in FILE_COLUMNS if record.get(name) not in (None, "")), None)
        medium, text = record.get(named) if named else None, record.get("text")
        if (medium is None) == (text in (None, "")):
            raise EmbedError(f"row {number} of {path} needs one of: {', '.join(FILE_COLUMNS)}; or text")
        if not isinstance(text if medium is None else medium, str):
            raise EmbedError(f"row {number} of {path}: {named or 'text'} is no text")
        id = record.get("id", medium)
        if id in (None, ""):
            id = f"{path.stem}/{number}"
        metadata = {name: value for name, value in record.items() if name not in ("id", "text", named)}
        place = None if medium is None else str((base / medium).absolute())
        yield Row(str(id), place, text if medium is None else None, metadata)
