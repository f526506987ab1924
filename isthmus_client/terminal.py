"""What the command prints for people: tables, bars, and small pictures made of half blocks."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

_EIGHTHS = "▏▎▍▌▋▊▉█"
_UPPER_HALF = "▀"
_CUBE = (0, 95, 135, 175, 215, 255)
"""The levels of a channel in the 6 × 6 × 6 colours of a terminal that has 256."""


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, right: Sequence[int] = ()) -> list[str]:
    """Return lines of aligned columns, cut to the terminal's width; columns named in `right` are aligned to the
    right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in (header, *rows):
        cells = [
            f"{cell:>{w}}" if n in right else f"{cell:<{w}}"
            for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("   ".join(cells).rstrip())
    return [cut(line, width()) for line in lines] if sys.stdout.isatty() else lines


def cut(line: str, most: int) -> str:
    return line if len(line) <= most else line[: max(0, most - 1)] + "…"


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


def picture(path: Path, columns: int = 24) -> list[str]:
    """An image as lines of half blocks, two pixels to a character; nothing where it cannot be read as an image."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
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
