"""The folder of what need not be computed twice, files that are written whole or not at all, and forms of tables."""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def default_cache() -> Path:
    """ISTHMUS_CACHE, else `isthmus` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ISTHMUS_CACHE") or Path(home) / "isthmus")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; what is there takes the place of `path` where the block ends well.

    The path is the process's own: several processes may make one file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    yield partial
    os.replace(partial, path)


def write(path: Path, text: str) -> None:
    """Writes a text as a file, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


QUOTING = "a text that begins with a quotation mark ends with one, and those inside are doubled"
"""What a comma-separated table has to keep to."""


class Commas(csv.excel):
    """RFC 4180. Without `strict`, a quotation mark that nothing closes takes all rows after it into one text."""

    strict = True


class Tabs(csv.excel_tab):
    """IANA's text/tab-separated-values, which has no quoting: a caption may begin with a quotation mark."""

    quoting = csv.QUOTE_NONE


def dialect(name: str) -> type[csv.Dialect]:
    """Return how a table of this name is written."""
    return Tabs if ".tsv" in name.lower() else Commas


def wrong_header(columns: Sequence[str] | None, name: str) -> str | None:
    """Return what is wrong with the column names of a table, or None."""
    columns = columns or ()
    between = "tabs" if dialect(name) is Tabs else "commas"
    if len(columns) == 1 and (other := next((mark for mark in ",;|\t" if mark in columns[0]), None)):
        return (
            f"{other!r} is between its columns, and in a table of this name it is {between} (.csv: commas, .tsv: tabs)"
        )
    if twice := next((column for column in columns if column and columns.count(column) > 1), None):
        return f"two columns are called {twice}"
    return None
