"""`isthmus index` stores what is in a folder, once, or whenever it changes."""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from isthmus_client import terminal
from isthmus_client.command_shared import Failure, server

if TYPE_CHECKING:
    from rich.progress import Progress

    from isthmus_client import Isthmus
    from isthmus_client.folder import Listing, Outcome

_DAMAGED = "the file ends early or is damaged in places: what can be read of it is stored"
_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 and the number of the signal."""
_ATTEMPTS, _LONGEST_PAUSE_S = 60, 5.0
"""Tries of each request once the server has answered, and seconds between two tries at most: a server has about two
minutes to restart."""
_PATIENCE_S = 3_600.0
"""Longest time that is waited where the server says how long to wait."""
_FILES_AT_ONCE = 16
"""Files of one request: few enough that the progress is seen."""
_SHOWN_NAMES = 5
_SHOW_CURSOR = "\x1b[?25h"  # which the progress bar hides
_QUIET_MS, _LONGEST_GROUP_MS = 1_000, 10_000
"""Milliseconds without a change after which a watched folder is looked at, and at most while changes go on: a file that
is still copied is better read when it is whole."""
_TRY_AGAIN_S = 30.0
"""Seconds until a watched folder is looked at again after the server could not be asked."""


@dataclass(frozen=True)
class _Options:
    folder: Path
    collection: str
    modality: str | None
    again: bool
    prune: bool
    as_json: bool


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, exists=True, path_type=Path))
@click.option("-c", "--collection", default="default", show_default=True, help="Where the items are stored.")
@click.option(
    "--modality", metavar="NAME", help="Of its arrays (.npy), where the bundle has several modalities that take arrays."
)
@click.option("--again", is_flag=True, help="Send unchanged files too, and replace what is stored of them.")
@click.option(
    "--prune",
    is_flag=True,
    help="Delete the items of this folder whose files are gone; an item whose file was renamed takes its new name.",
)
@click.option("--watch", is_flag=True, help="Stay, and do the same whenever something in the folder changes.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end, or after each change.")
@click.pass_context
def index(
    context: click.Context,
    /,
    folder: Path,
    collection: str,
    modality: str | None,
    again: bool,
    prune: bool,
    watch: bool,
    as_json: bool,
) -> None:
    """Store the files of a folder, once or as they change.

    Its images, sounds, videos and texts (.txt, .md), also those of its subfolders. An item's id is its file's path in
    the folder. Run the command again to send what is new or changed, or to go on after it was stopped. A file that
    cannot be read is named, and the others are stored. Where the server keeps previews, images and sounds whose preview
    is missing are sent again.

    Metadata of a/b.jpg: a JSON object in a/b.jpg.json or a/b.json, or a line with a file_name in metadata.jsonl.
    """
    from isthmus_client.folder import list_folder

    options = _Options(folder, collection, modality, again, prune, as_json)
    if watch:
        _watch(context, options)
    report = _Report(list_folder(folder), shown=sys.stderr.isatty() and not as_json)
    if not report.listing.files:
        others = f": it holds {_others(report.listing)}" if report.listing.others else ""
        raise Failure(f"there is no image, sound, video or text in {folder}{others}", "name the folder of your files")
    with server(context, background=True) as space:
        _index(space, options, report)
    report.notes()
    click.echo(json.dumps(report.as_json()) if as_json else report.summary())
    if report.counts["failed"]:
        context.exit(1)


def _index(space: "Isthmus", options: _Options, report: "_Report") -> None:
    """Bring the items of a collection up to date with the folder. Raises ClientError."""
    from isthmus_client import Batching, ClientError, Retries
    from isthmus_client.folder import TABLE, FolderIndex

    for name, why in report.listing.unreadable.items():
        report.error(name, why)
    with _ctrl_c_ends_it(report.last_words):
        run = FolderIndex(space, report.listing, options.collection, options.modality)
        # The server has answered: from here on, wait for it while it is restarted or overloaded.
        space.retries = Retries(attempts=_ATTEMPTS, most_s=_LONGEST_PAUSE_S, patience_s=_PATIENCE_S)
        space.batching = Batching(inputs=_FILES_AT_ONCE)
        for why in run.table_errors:
            report.error(TABLE, why)
        report.missing = run.missing
        try:
            with report.progress():
                if options.prune:
                    report.renamed = run.follow()
                run.send(again=options.again, report=report.outcome)
                if options.prune:
                    report.deleted = run.prune()
        except ClientError:
            report.line(report.stopped())
            raise
    for old, new in report.renamed.items():
        report.line(f"renamed: {_printable(old)} → {_printable(new)}")
    for name in report.deleted:
        report.line(f"deleted: {_printable(name)}")


@dataclass
class _Report:
    """Says of each file at once what is wrong with it, and counts the others."""

    listing: "Listing"
    shown: bool
    """Whether a progress bar is drawn."""
    said: set[tuple[str, str]] = field(default_factory=set)
    """Errors that were printed already: of a watched folder each is printed once."""
    counts: dict[str, int] = field(default_factory=lambda: {"indexed": 0, "failed": 0, "already": 0, "previews": 0})
    renamed: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Names in metadata.jsonl that are none of the folder's files."""
    long_texts: int = 0
    _done: int = 0
    _bar: "Progress | None" = None
    _advance: Callable[[], None] = lambda: None

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Draw a progress bar with the rate and the time left, where standard error is a terminal."""
        if not self.shown:
            yield
            return
        with terminal.progress("indexing") as bar:
            task = bar.add_task("indexing", total=len(self.listing.files))
            self._bar, self._advance = bar, lambda: bar.advance(task)
            yield
        self._bar = None

    def line(self, text: str) -> None:
        if self._bar is None:
            click.echo(text, err=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def error(self, name: str, why: str) -> None:
        self.counts["failed"] += 1
        if (name, why) not in self.said:
            self.said.add((name, why))
            self.line(f"error: {_printable(name)}: {why}")

    def outcome(self, outcome: "Outcome") -> None:
        if outcome.error is not None:
            self.error(outcome.name, outcome.error)
        else:
            self.counts["already" if outcome.unchanged else "previews" if outcome.previewed else "indexed"] += 1
        if outcome.truncated and outcome.modality == "text":
            self.long_texts += 1
        elif outcome.truncated:
            self.line(f"warning: {_printable(outcome.name)}: {_DAMAGED}")
        self._done += 1
        self._advance()

    def stopped(self) -> str:
        return f"stopped after {self._done:,} of {len(self.listing.files):,}; run again to continue"

    def last_words(self) -> str:
        return f"{_SHOW_CURSOR if self.shown else ''}\n{self.stopped()}\n"

    def notes(self) -> None:
        """Print remarks about the whole folder."""
        if self.long_texts:
            texts = _count(self.long_texts, "text")
            self.line(f"note: {texts} longer than the model reads: searches see the beginning only")
        if self.listing.links:
            self.line(f"note: links to folders are not followed: {_names(self.listing.links)}")
        if self.missing:
            files = _count(len(self.missing), "missing file")
            self.line(f"note: metadata.jsonl describes {files}, such as {_printable(self.missing[0])}")
        if self.listing.others:
            self.line(f"note: left alone: {_others(self.listing)}: {_names(self.listing.skipped)}")
        if self.listing.hidden:
            hidden = f"{len(self.listing.hidden):,} hidden"
            self.line(f"note: left alone: {hidden}: {_names(self.listing.hidden)}")

    def summary(self) -> str:
        parts = [f"{self.counts['indexed']:,} indexed"]
        previews = self.counts["previews"]
        counted_parts = (
            (previews, "preview filled in" if previews == 1 else "previews filled in"),
            (self.counts["already"], "were there already"),
            (len(self.renamed), "renamed"),
            (len(self.deleted), "deleted"),
            (self.counts["failed"], "failed"),
        )
        return ", ".join([*parts, *(f"{count:,} {label}" for count, label in counted_parts if count)])

    def as_json(self) -> dict[str, object]:
        """Return the counts, and the names of what was left alone."""
        counts = self.counts | {"renamed": len(self.renamed), "deleted": len(self.deleted)}
        return counts | {"skipped": [*self.listing.skipped, *self.listing.hidden, *self.listing.links]}

    def changed(self) -> bool:
        """Return whether anything was written."""
        return bool(self.counts["indexed"] or self.counts["previews"] or self.renamed or self.deleted)


def _watch(context: click.Context, options: _Options) -> NoReturn:
    """Index the folder now, and whenever something in it changes, until Ctrl-C."""
    from watchfiles import watch

    from isthmus_client.folder import list_folder

    root = options.folder.resolve()

    def visible(_: object, path: str) -> bool:
        return not any(part.startswith(".") for part in Path(path).relative_to(root).parts)

    def once(options: _Options, printed: set[tuple[str, str]], *, first: bool) -> None:
        report = _Report(list_folder(options.folder), sys.stderr.isatty() and not options.as_json, printed)
        with server(context, background=True) as space:
            # Of a folder without files, such as a disk that is not mounted any more, nothing is deleted.
            _index(space, replace(options, prune=options.prune and bool(report.listing.files)), report)
        if first:
            report.notes()
        if first or report.changed():
            click.echo(json.dumps(report.as_json()) if options.as_json else report.summary())

    printed: set[tuple[str, str]] = set()
    first = is_due = True
    not_before = 0.0
    with _watching(options.folder):
        # It wakes up every second, and watches from before the first look on: no change between the two is missed.
        for changes in watch(
            root,
            watch_filter=visible,
            debounce=_LONGEST_GROUP_MS,
            step=_QUIET_MS,
            rust_timeout=_QUIET_MS,
            yield_on_timeout=True,
        ):
            is_due = is_due or bool(changes)
            if not is_due or time.monotonic() < not_before:
                continue
            try:
                once(options, printed, first=first)
                if first:
                    click.echo(f"watching {_printable(str(options.folder))}; Ctrl-C ends it", err=True)
                first = is_due = False
                options = replace(options, again=False)
            except Failure as error:
                error.show()
                not_before = time.monotonic() + _TRY_AGAIN_S
    raise AssertionError("a watch has no end")


@contextmanager
def _watching(folder: Path) -> Iterator[None]:
    """Say what to do about errors of watching."""
    try:
        with _ctrl_c_ends_it(lambda: "\nstopped watching\n"):
            yield
    except OSError as error:
        polling = f"WATCHFILES_FORCE_POLLING=true isthmus index {shlex.quote(str(folder))} --watch"
        raise Failure(f"{folder} cannot be watched: {error}", f"look at it again and again: {polling}") from None


def _others(listing: "Listing") -> str:
    kinds = [f"{count} {suffix}" for suffix, count in listing.others.most_common()]
    listed_kinds = ", ".join([*kinds[:_SHOWN_NAMES], *(["…"] if len(kinds) > _SHOWN_NAMES else [])])
    return f"{_count(listing.others.total(), 'file')} of other kinds ({listed_kinds})"


def _names(names: list[str]) -> str:
    """Return the first of some names; --json gives all of them."""
    return ", ".join([*map(_printable, names[:_SHOWN_NAMES]), *(["…"] if len(names) > _SHOWN_NAMES else [])])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _printable(name: str) -> str:
    """Return a name as one line, whatever it holds."""
    return name if name.isprintable() else ascii(name)


@contextmanager
def _ctrl_c_ends_it(last_words: Callable[[], str]) -> Iterator[None]:
    """Let Ctrl-C end the process at once. Python alone would wait for requests that are under way, for minutes."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, last_words().encode())
        os._exit(_INTERRUPTED)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in a shell's background
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
