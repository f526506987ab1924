"""The command line of a benchmark, and how it ends."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from benchmarks.servers import BenchmarkError


def parser_of(name: str, doc: str | None, *, bundle: bool = True) -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.NAME`, which the first line of its module describes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(doc or "").split("\n")[0])
    if bundle:
        parser.add_argument("--bundle", type=Path, default=Path("build/starter"))
    return parser


def finish(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark and end with its status; 2, and the reason, where nothing can be measured."""
    try:
        sys.exit(main())
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
