"""The arguments of `isthmus` are read here: files, texts, and standard input."""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from isthmus_client.command_shared import Failure

if TYPE_CHECKING:
    from isthmus_client import Input


def read_inputs(arguments: Sequence[str], as_text: bool) -> Iterator[tuple[str, "Input"]]:
    """Yield the name and the input of each argument."""
    for argument in arguments:
        if argument == "-" and not as_text:
            yield from _standard_input()
        else:
            yield argument, _one_input(argument, as_text)


def _one_input(argument: str, as_text: bool) -> "Input":
    from isthmus_client.folder import SUFFIXES

    path = Path(argument)
    if as_text:
        return argument
    if path.is_dir():
        quoted = shlex.quote(argument)
        raise Failure(f"{argument} is a folder", f"its files: {quoted}/*; to index them: isthmus index {quoted}")
    if path.is_file():
        return path
    if Path(argument).suffix.lower() in SUFFIXES:
        raise Failure(f"there is no file {argument}", "mind the folder you are in; --text takes it for the words")
    return argument


def _standard_input() -> Iterator[tuple[str, "Input"]]:
    from isthmus_client.inputs import is_media

    data = sys.stdin.buffer.read()
    if is_media(data):
        yield "-", data
        return
    try:
        lines = [line.strip() for line in data.decode().splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise Failure("standard input is neither text nor an image or a sound that is known") from None
    if not lines:
        raise Failure("standard input is empty", "give a text per line, or the content of one file")
    yield from ((line, line) for line in lines)


def queries(
    arguments: Sequence[str], like: str | None, weights: Sequence[float], as_text: bool
) -> list[tuple[str, "Input"]]:
    """Return each query with its name: one per line of standard input, or one of all the arguments."""
    from isthmus_client.inputs import composed, stored

    if list(arguments) == ["-"] and like is None and not as_text:
        if weights:
            raise click.UsageError("--weight is for several QUERY arguments, not for lines of standard input")
        return list(_standard_input())
    if "-" in arguments and not as_text:
        raise click.UsageError("`-` stands alone: a query per line")
    parts = [(argument, _one_input(argument, as_text)) for argument in arguments]
    if like is not None:
        parts.append((like, stored(like)))
    if not parts:
        raise click.UsageError('say what to look for: isthmus search "a cat", a file, or --like ID')
    if weights and len(weights) != len(parts):
        raise click.UsageError(f"{len(weights)} weights for {len(parts)} parts of the query: one for each, or none")
    if len(parts) == 1:
        return parts
    pairs = zip((part for _, part in parts), weights or [1.0] * len(parts), strict=True)
    return [(" + ".join(name for name, _ in parts), composed(*pairs))]
