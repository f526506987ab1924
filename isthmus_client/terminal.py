"""The command prints tables, bars, progress and small pictures for people, sharp where the terminal can draw
them (kitty, iTerm2 and sixel graphics) and of half blocks elsewhere.

In a terminal rich draws tables and progress; into a pipe or a file goes plain text.
"""

import base64
import io
import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.progress import Progress

_EIGHTHS = "▏▎▍▌▋▊▉█"
_UPPER_HALF = "▀"
_KITTY, _ITERM, _SIXEL = ("xterm-kitty", "xterm-ghostty"), ("iTerm.app", "WezTerm"), ("foot", "mlterm", "contour")
"""Terminals that draw pictures: beginnings of TERM, values of TERM_PROGRAM, and beginnings of TERM."""
_MULTIPLEXERS = ("screen", "tmux")
"""Beginnings of TERM in programs that pass no graphics on."""
_CHUNK = 4_096
"""Characters of one escape code of kitty's protocol."""
_CELL_PX, _SIXEL_COLOURS = 10, 128
_CUBE = (0, 95, 135, 175, 215, 255)
"""The levels of a channel in the 6 × 6 × 6 colours of a terminal that has 256."""


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table, header first, cut to the terminal's width; `right`: columns aligned to the right."""
    if sys.stdout.isatty():
        return _rich_lines(rows, header, right)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            f"{cell:>{w}}" if n in right else f"{cell:<{w}}"
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("   ".join(cells).rstrip())
    return lines


def _rich_lines(rows: Sequence[Sequence[str]], header: Sequence[str], right: Sequence[int]) -> list[str]:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rich_table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for place, name in enumerate(header):
        justify: Literal["left", "right"] = "right" if place in right else "left"
        rich_table.add_column(name, justify=justify, no_wrap=True, overflow="ellipsis")
    for row in rows:
        rich_table.add_row(*(Text(cell if cell.isprintable() else ascii(cell)) for cell in row))
    console = Console(width=width())
    with console.capture() as captured:
        console.print(rich_table)
    return captured.get().removesuffix("\n").split("\n")


def progress(label: str) -> "Progress":
    """Return a progress bar on standard error, with the rate and the time left."""
    from rich import progress
    from rich.console import Console
    from rich.text import Text

    class Rate(progress.ProgressColumn):
        """Shows the rate since the beginning: files are done in batches, and a rate of the last moments would jump."""

        def render(self, task: progress.Task) -> Text:
            if not task.completed or not task.elapsed or task.total is None:
                return Text()
            rate = task.completed / task.elapsed
            eta = timedelta(seconds=round((task.total - task.completed) / rate))
            return Text(f"{rate:,.0f} a second, {eta} left" if rate >= 1 else f"{60 * rate:,.0f} a minute, {eta} left")

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
    """Return a bar of up to so many cells for a share of 0 to 1; of plain characters where the output has no others."""
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


def graphics() -> Literal["kitty", "iterm", "sixel"] | None:
    """Return the protocol by which the terminal draws pictures, as its environment says; None where it says none."""
    name, program = os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")
    if "TMUX" in os.environ or name.startswith(_MULTIPLEXERS):
        return None
    if "KITTY_WINDOW_ID" in os.environ or name.startswith(_KITTY):
        return "kitty"
    if program in _ITERM:
        return "iterm"
    return "sixel" if name.startswith(_SIXEL) else None


def picture(file: Path | IO[bytes], columns: int = 24) -> list[str]:
    """Return an image as lines to print, so many characters wide at most; none where it is no image."""
    from PIL import Image, ImageOps

    protocol = graphics()
    side = columns if protocol is None else columns * _CELL_PX
    try:
        with Image.open(file) as image:
            image.draft("RGB", (4 * side, 4 * side))
            small = ImageOps.exif_transpose(image).convert("RGB")
        small.thumbnail((side, side))
    except (OSError, ValueError, Image.DecompressionBombError):
        return []
    match protocol:
        case "kitty":
            return [_kitty(_png(small))]
        case "iterm":
            data = _png(small)
            return [f"\x1b]1337;File=inline=1;size={len(data)}:{base64.b64encode(data).decode()}\a"]
        case "sixel":
            return [_sixel(small)]
    return _half_blocks(small)


def _png(image: "Image") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _kitty(png: bytes) -> str:
    """Return a PNG as codes of kitty's graphics protocol, to which the terminal is not to reply."""
    data = base64.b64encode(png).decode()
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    first, last = "a=T,f=100,q=2,", len(chunks) - 1
    codes = [f"{'' if n else first}m={int(n < last)};{chunk}" for n, chunk in enumerate(chunks)]
    return "".join(f"\x1b_G{code}\x1b\\" for code in codes)


def _sixel(image: "Image") -> str:
    """Return a picture as DEC's sixels: bands of six rows, in which each colour has its own pass."""
    reduced = image.quantize(_SIXEL_COLOURS)
    palette, pixels = reduced.getpalette() or [], reduced.tobytes()
    width, height = reduced.size
    parts = [f'\x1bPq"1;1;{width};{height}']
    for number in sorted(set(pixels)):
        red, green, blue = (round(level / 2.55) for level in palette[3 * number : 3 * number + 3])
        parts.append(f"#{number};2;{red};{green};{blue}")
    for top in range(0, height, 6):
        rows = [pixels[y * width : (y + 1) * width] for y in range(top, min(top + 6, height))]
        passes = []
        for number in sorted(set(b"".join(rows))):
            bits = (sum((row[x] == number) << place for place, row in enumerate(rows)) for x in range(width))
            runs = ((letter, len(list(run))) for letter, run in itertools.groupby(chr(63 + bit) for bit in bits))
            passes.append(f"#{number}" + "".join(f"!{n}{letter}" if n > 3 else n * letter for letter, n in runs))
        parts.append("$".join(passes) + "-")
    return "".join(parts) + "\x1b\\"


def _half_blocks(small: "Image") -> list[str]:
    """Return a picture as lines in which each character shows two pixels."""
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
