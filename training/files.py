"""The folder of what need not be computed twice, and files that are written whole or not at all."""

import os
from collections.abc import Iterator
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
