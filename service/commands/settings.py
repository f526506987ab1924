"""`settings`: docs/configuration.md, which is what service/settings.py says, as a table."""

import argparse
from collections.abc import Collection, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from service.commands import serve
from service.settings import Settings

HELP = "print docs/configuration.md: every setting"
_KINDS = {
    Path: "a path",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    SecretStr: "text",
}
_BOUNDS = (("gt", "over"), ("ge", "from"), ("lt", "under"), ("le", "to"))


def configure(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run() -> int:
    print(markdown([name.replace("-", "_") for name in serve.FLAGS]), end="")
    return 0


def markdown(flags: Collection[str]) -> str:
    """Return the page of settings. `flags` are the settings that `serve` takes as flags too."""
    lines = [
        "# Settings",
        "",
        "Written by `python -m service settings` from `service/settings.py`; `make settings` writes it again.",
        "Each is an environment variable. Those with † are flags of `python -m service serve` too, which go before the",
        "variable: `--redis-url` is `ISTHMUS_REDIS_URL`. What is wrong stops the start with a line that names it.",
        "",
        "| variable | default | takes | |",
        "|---|---|---|---|",
        *(_row(name, field, name in flags) for name, field in Settings.model_fields.items()),
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, field: FieldInfo, flag: bool) -> str:
    description = " ".join((field.description or "").split())
    cells = (f"`ISTHMUS_{name.upper()}`{' †' if flag else ''}", _default(field.default), _takes(field), description)
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _default(value: Any) -> str:
    if value is None or value == ():
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    if isinstance(value, int) and value >= 2**20 and value % 2**20 == 0:
        return f"`{value}` ({value // 2**20} MiB)"
    return f"`{value}`"


def _takes(field: FieldInfo) -> str:
    kinds = list(_kinds(field.annotation))
    limits = {name: getattr(rule, name) for rule in field.metadata for name, _ in _BOUNDS if hasattr(rule, name)}
    bounds = " ".join(f"{word} {limits[name]:g}" for name, word in _BOUNDS if name in limits)
    patterns = [rule.pattern for rule in field.metadata if getattr(rule, "pattern", None)]
    return ", ".join([*kinds, *([bounds] if bounds else []), *(f"`{pattern}`" for pattern in patterns)])


def _kinds(annotation: Any) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _kinds(arguments[0])
    elif origin is Literal:
        yield " ".join(f"`{argument}`" for argument in arguments)
    elif origin is tuple:
        yield f"{', '.join(_kinds(arguments[0]))}; several with commas between"
    elif origin is Union or arguments:
        yield from (kind for argument in arguments if argument is not NoneType for kind in _kinds(argument))
    else:
        yield _KINDS[annotation]
