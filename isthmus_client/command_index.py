"""`isthmus index`: store what is in a folder."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from isthmus_client.command_shared import Failure, server

if TYPE_CHECKING:
    from isthmus_client.folder import Listing, Outcome

_DAMAGED = "the file ends early or is damaged in places: what can be read of it is stored"
_STOPPED = "stopped: what is stored stays; run the same command again to go on"
_ATTEMPTS, _LONGEST_PAUSE_S = 60, 5.0
"""Tries of each request once the server has answered, and seconds between two tries at most: a server has about two
minutes to restart."""
_PATIENCE_S = 3_600.0
"""Longest time that is waited where the server says how long to wait."""
_KINDS_SHOWN = 5
_STEPS = 500
"""Times that the progress bar of a large folder is drawn."""
_CLEAR_LINE = "\r\x1b[K"
_SHOW_CURSOR = "\x1b[?25h"  # which the progress bar hides


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.option("-c", "--collection", default="default", show_default=True, help="Where the items are stored.")
@click.option("--again", is_flag=True, help="Send unchanged files too, and replace what is stored of them.")
@click.option("--prune", is_flag=True, help="Delete the items of this folder whose files are gone.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end.")
@click.pass_context
def index(context: click.Context, /, folder: Path, collection: str, again: bool, prune: bool, as_json: bool) -> None:
    """Store the images, sounds, videos and texts (.txt, .md) of a folder and its subfolders.

    An item's id is its file's path in the folder. Run the command again to send what is new or changed, or to go on
    after it was stopped. A file that cannot be read is named, and the others are stored.

    Metadata of a/b.jpg: a JSON object in a/b.jpg.json or a/b.json, or a line with a file_name in metadata.jsonl.
    """
    from isthmus_client import ClientError, Retries
    from isthmus_client.folder import TABLE, FolderIndex, list_folder

    listing = list_folder(folder)
    report = _Report(listing, shown=sys.stderr.isatty() and not as_json)
    for name, why in listing.unreadable.items():
        report.error(name, why)
    if not listing.files:
        others = f": it holds {_others(listing)}" if listing.others else ""
        raise Failure(f"there is no image, sound, video or text in {folder}{others}", "name the folder of your files")
    with server(context, background=True) as space:
        run = FolderIndex(space, listing, collection)
        # The server has answered: from here on, wait for it while it is restarted or overloaded.
        space.retries = Retries(attempts=_ATTEMPTS, most_s=_LONGEST_PAUSE_S, patience_s=_PATIENCE_S)
        for why in run.table_errors:
            report.error(TABLE, why)
        try:
            with report.progress(), _ctrl_c_ends_it(report):
                run.send(again=again, report=report.outcome)
                deleted, unmarked = run.prune() if prune else ([], 0)
        except ClientError:
            report.line(_STOPPED)
            raise
    for name in deleted:
        report.line(f"deleted: {_shown(name)}")
    report.notes(run.missing, unmarked)
    if as_json:
        click.echo(json.dumps(report.counts | {"deleted": len(deleted)}))
    else:
        click.echo(report.summary(len(deleted)))
    if report.counts["failed"]:
        context.exit(1)


class _Report:
    """Says of each file at once what is wrong with it, and counts the others."""

    def __init__(self, listing: "Listing", *, shown: bool) -> None:
        self._listing, self.shown = listing, shown
        self.counts = {"indexed": 0, "failed": 0, "already": 0}
        self._long_texts = 0
        self._advance: Callable[[int], None] = lambda count: None

    @contextmanager
    def progress(self) -> Iterator[None]:
        """A progress bar, where standard error is a terminal."""
        count = len(self._listing.files)
        bar = click.progressbar(
            length=count,
            label="indexing",
            show_pos=True,
            file=sys.stderr,
            hidden=not self.shown,
            update_min_steps=max(1, count // _STEPS),
        )
        with bar:
            self._advance = bar.update
            yield

    def line(self, text: str) -> None:
        click.echo(f"{_CLEAR_LINE if self.shown else ''}{text}", err=True)

    def error(self, name: str, why: str) -> None:
        self.counts["failed"] += 1
        self.line(f"error: {_shown(name)}: {why}")

    def outcome(self, outcome: "Outcome") -> None:
        if outcome.error is not None:
            self.error(outcome.name, outcome.error)
        else:
            self.counts["already" if outcome.unchanged else "indexed"] += 1
        if outcome.truncated and outcome.modality == "text":
            self._long_texts += 1
        elif outcome.truncated:
            self.line(f"warning: {_shown(outcome.name)}: {_DAMAGED}")
        self._advance(1)

    def notes(self, missing: list[str], unmarked: int) -> None:
        """Print remarks about the whole folder."""
        if self._long_texts:
            texts = _count(self._long_texts, "text")
            self.line(f"note: {texts} longer than the model reads: searches see the beginning only")
        if self._listing.links:
            self.line(f"note: links to folders are not followed: {', '.join(map(_shown, self._listing.links))}")
        if missing:
            files = _count(len(missing), "missing file")
            self.line(f"note: metadata.jsonl describes {files}, such as {_shown(missing[0])}")
        if unmarked:
            items = _count(unmarked, "item")
            self.line(f"note: {items} of missing files kept: stored by an earlier version, which noted no folder")
        if self._listing.others:
            self.line(f"note: left alone: {_others(self._listing)}")

    def summary(self, deleted: int) -> str:
        parts = [f"{self.counts['indexed']} indexed"]
        if self.counts["already"]:
            parts.append(f"{self.counts['already']} were there already")
        if deleted:
            parts.append(f"{deleted} deleted")
        if self.counts["failed"]:
            parts.append(f"{self.counts['failed']} failed")
        return ", ".join(parts)


def _others(listing: "Listing") -> str:
    kinds = [f"{count} {suffix}" for suffix, count in listing.others.most_common()]
    shown = ", ".join([*kinds[:_KINDS_SHOWN], *(["…"] if len(kinds) > _KINDS_SHOWN else [])])
    return f"{_count(listing.others.total(), 'file')} of other kinds ({shown})"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _shown(name: str) -> str:
    """A name as one line, whatever it holds."""
    return name if name.isprintable() else ascii(name)


@contextmanager
def _ctrl_c_ends_it(report: _Report) -> Iterator[None]:
    """Ctrl-C ends the process at once. Python alone would wait for the requests that are under way, for minutes."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{_SHOW_CURSOR if report.shown else ''}\n{_STOPPED}\n".encode())
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in a shell's background
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
