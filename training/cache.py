"""The folder that holds what need not be computed twice."""

import os
from pathlib import Path


def default_cache() -> Path:
    """ISTHMUS_CACHE, else `isthmus` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ISTHMUS_CACHE") or Path(home) / "isthmus")
