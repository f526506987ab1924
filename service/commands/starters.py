"""A starter is the bundle that is served where none is named: that of this checkout, or of an installed package.

A package of a starter (isthmus-starter) names a function that gives its folder, as an entry point of the group
`isthmus.starters`: `default`, or another name, which `--starter` takes. Nothing but the standard library is needed.
"""

import os
from importlib.metadata import entry_points
from pathlib import Path

GROUP = "isthmus.starters"
DEFAULT = "default"
_MANIFEST = "manifest.json"
NEXT = (
    "name one by --bundle FOLDER or ISTHMUS_BUNDLE; in a checkout `make starter` builds one in build/starter, and "
    "`make wheels` the package isthmus-starter, with which none has to be named"
)


class StarterError(ValueError):
    """Raised where a starter does not exist here: the message says which do, and what to do."""


def chosen(bundle: str | Path | None, starter: str | None = None) -> str | Path | None:
    """Return the bundle to open; None leaves it to the settings (ISTHMUS_BUNDLE, or ./starter). Raises StarterError."""
    if bundle is not None and starter is not None:
        raise StarterError("--bundle and --starter both name a bundle: leave one out")
    if bundle is not None:
        return bundle
    if starter is None and ("ISTHMUS_BUNDLE" in os.environ or (Path("starter") / _MANIFEST).is_file()):
        return None
    return find(starter or DEFAULT)


def find(name: str = DEFAULT) -> Path:
    """Return a starter's folder: ./build/starter, ./build/starter-NAME, or an installed package's. Raises
    StarterError."""
    default_folder = Path("build") / ("starter" if name == DEFAULT else f"starter-{name}")
    if (default_folder / _MANIFEST).is_file():
        return default_folder
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        names = ", ".join(f"--starter {name}" for name in sorted(installed))
        also = f" (but {names})" if names else ""
        problem = "no bundle is named, and no starter" if name == DEFAULT else f"no starter {name!r}"
        raise StarterError(f"{problem} is installed here{also}: {NEXT}")
    try:
        folder: Path = installed[name].load()()
    except (ImportError, AttributeError) as error:
        raise StarterError(f"the package of the starter {name!r} is damaged: {error}; install it again") from None
    return folder
