"""What the command prints for people: tables, bars, progress, and small pictures made of half blocks.

In a terminal rich draws tables and progress; into a pipe or a file goes plain text.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.progress import Progress

_EIGHTHS = "▏▎▍▌▋▊▉█"
_UPPER_HALF = "▀"
_CUBE = (0, 95, 135, 175, 215, 255)
"""The levels of a channel in the 6 × 6 × 6 colours of a terminal that has 256."""


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table, one per row after the header's, cut to the terminal's width; columns named in
    `right` are aligned to the right."""
    if sys.stdout.isatty():
        return _drawn(rows, header, right)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            f"{cell:>{w}}" if n in right else f"{cell:<{w}}"
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("   ".join(cells).rstrip())
    return lines


def _drawn(rows: Sequence[Sequence[str]], header: Sequence[str], right: Sequence[int]) -> list[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for place, name in enumerate(header):
        justify: Literal["left", "right"] = "right" if place in right else "left"
        drawn.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")
    for row in rows:
        drawn.add_row(*(Text(cell if cell.isprintable() else ascii(cell)) for cell in row))
    console = Console(width=width())
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().removesuffix("\n").split("\n")


def progress(label: str) -> "Progress":
    """A progress bar on standard error, with the rate and the time left."""
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        """Since the beginning: files are done in batches, so that a rate of the last moments would jump."""

        def render(self, task: progress.Task) -> Text:
            if not task.completed or not task.elapsed or task.total is None:
                return Text()
            rate = task.completed / task.elapsed
            left = timedelta(seconds=round((task.total - task.completed) / rate))
            return Text(
                f"{rate:,.0f} a second, {left} left" if rate >= 1 else f"{60 * rate:,.0f} a minute, {left} left"
            )

    return progress.Progress(
        progress.TextColumn(label),
        progress.BarColumn(),
        progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
        Rate(),
        console=Console(stderr=True),
        transient=True,
    )


def width() -> int:
    return shutil.get_terminal_size((120, 24)).columns


def bar(share: float, cells: int = 20) -> str:
    """A bar of up to so many cells for a share of 0 to 1; of plain characters where the output has no others."""
    share = min(1.0, max(0.0, share))
    if not _writes(_EIGHTHS):
        return "#" * round(share * cells)
    eighths = round(share * cells * 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def shows_pictures() -> bool:
    """Return whether standard output is a terminal with colours, and there is Pillow to read a picture with."""
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb":
        return False
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError:
        return False
    return _writes(_UPPER_HALF)


def picture(file: Path | IO[bytes], columns: int = 24) -> list[str]:
    """An image as lines of half blocks, two pixels to a character; nothing where it cannot be read as an image."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            opened.draft("RGB", (4 * columns, 4 * columns))
            small = ImageOps.exif_transpose(opened).convert("RGB")
        small.thumbnail((columns, columns))
    except (OSError, ValueError, Image.DecompressionBombError):
        return []
    deep = os.environ.get("COLORTERM") in ("truecolor", "24bit")
    lines = []
    for y in range(0, small.height - small.height % 2, 2):
        cells = []
        for x in range(small.width):
            upper, lower = (_colour(small.getpixel((x, y + half)), deep) for half in (0, 1))
            cells.append(f"\x1b[38;{upper};48;{lower}m{_UPPER_HALF}")
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def _colour(pixel: object, deep: bool) -> str:
    assert isinstance(pixel, tuple)
    if deep:
        return "2;" + ";".join(str(level) for level in pixel)
    red, green, blue = (min(range(6), key=lambda step: abs(_CUBE[step] - level)) for level in pixel)
    return f"5;{16 + 36 * red + 6 * green + blue}"


def _writes(characters: str) -> bool:
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
