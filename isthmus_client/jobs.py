"""Bulk jobs: the upload, and the waiting for their end. No I/O but the reading of the upload.

A request for a job names it by an Idempotency-Key, one of its own unless the caller gives another, so that asking again
where no answer came makes no second job.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

from isthmus_client import results
from isthmus_client.calls import Call, NewItem
from isthmus_client.results import Job

Source = Path | Sequence[NewItem]
"""A file of JSON lines or a tar (`.jsonl`, `.ndjson`, `.tar`, `.tgz`; `.gz` behind it or not), or items."""
Report = Callable[[Job], None]

LINES, TAR = "application/jsonl", "application/x-tar"
_KINDS = {".jsonl": LINES, ".ndjson": LINES, ".tar": TAR, ".tgz": TAR}
_BLOCK_BYTES = 2**18
_FIRST_PAUSE_S = 0.1


@dataclass(frozen=True)
class Upload:
    """Holds a body that is made anew for each try, and is never in memory as a whole."""

    blocks: Callable[[], Iterator[bytes]]

    async def awaited(self) -> AsyncIterator[bytes]:
        import asyncio

        blocks = self.blocks()
        while (block := await asyncio.to_thread(next, blocks, None)) is not None:
            yield block


def kind_of(path: Path) -> str | None:
    """Return the media type that a file's name stands for; None where it is neither JSON lines nor a tar."""
    name = path.name.lower().removesuffix(".gz")
    return _KINDS.get(Path(name).suffix)


def create(source: Source, collection: str | None, key: str | None) -> Call[Job]:
    """Return the call that creates a job. Raises ValueError for a file whose name says no form, and OSError."""
    if isinstance(source, Path):
        kind = kind_of(source)
        if kind is None:
            raise ValueError(f"{source} is neither JSON lines (.jsonl) nor a tar (.tar), by its name")
        source.open("rb").close()
        upload = Upload(partial(_of_file, source))
    else:
        kind, upload = LINES, Upload(partial(_of_items, source))
    parameters = None if collection is None else {"collection": collection}
    headers = {"idempotency-key": key or uuid4().hex, "content-type": kind}
    return Call("POST", "/jobs", results.reader(Job), upload, parameters, headers=headers)


def pauses(every_s: float) -> Iterator[float]:
    """Yield the seconds between two looks at a job: short at first, so that a small job is not waited for."""
    pause = _FIRST_PAUSE_S
    while True:
        yield min(pause, every_s)
        pause *= 2


def _of_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _of_items(items: Sequence[NewItem]) -> Iterator[bytes]:
    for item in items:
        yield json.dumps(item.to_wire()).encode() + b"\n"
