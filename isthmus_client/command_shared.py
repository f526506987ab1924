"""Shared parts of the commands of `isthmus`: the server that they ask, errors that say what to do next, and a
command whose arguments another program reads."""

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from isthmus_client import Isthmus
    from isthmus_client.errors import ClientError

_START = (
    "start one with `isthmus serve` (in a checkout: `make serve`) and wait until it listens, "
    "or name one by --url or ISTHMUS_URL"
)
_ANOTHER_SERVER = "something else listens there: name the server by --url or ISTHMUS_URL"
_BACKGROUND_TIMEOUT_S = 600.0


class Failure(click.ClickException):
    """Shows an error, and what to do about it."""

    def __init__(self, message: str, next_step: str | None = None) -> None:
        super().__init__(message)
        self.next_step = next_step

    def show(self, file: Any = None) -> None:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {self.message}", err=True)
        if self.next_step:
            click.echo(f"{click.style('next:', bold=True)}  {self.next_step}", err=True)


def known_modalities(context: click.Context, parameter: click.Parameter, start: str) -> list[str]:
    """Return the modalities that every bundle may have, for shells that complete words; a bundle may have others."""
    return [name for name in ("image", "video", "audio", "text") if name.startswith(start)]


@contextmanager
def server(context: click.Context, *, background: bool = False) -> Iterator["Isthmus"]:
    """Yield the client; its errors become a line for people and the next step.

    What is sent in the `background` waits behind other requests, so that its answers may take longer.
    """
    from isthmus_client import ClientError, Isthmus, IsthmusWarning, Retries

    url, key = context.obj
    try:
        with (
            warnings.catch_warnings(),
            Isthmus(
                url,
                api_key=key,
                timeout_s=_BACKGROUND_TIMEOUT_S if background else 60.0,
                retries=Retries(attempts=3),
                background=background,
            ) as space,
        ):
            warnings.simplefilter("always", IsthmusWarning)
            warnings.showwarning = _show_warning
            yield space
    except ClientError as error:
        raise Failure(str(error), _next_step(error)) from None


def _show_warning(message: Warning | str, *place: object, **more: object) -> None:
    """Print a warning; replaces warnings.showwarning."""
    click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {message}", err=True)


def _next_step(error: "ClientError") -> str | None:
    from isthmus_client import errors

    steps: Sequence[tuple[type[ClientError], str]] = [
        (errors.Unreachable, _START),
        (errors.UnreadableAnswer, _ANOTHER_SERVER),
        (errors.NotAllowed, "give a key that may do this by --api-key or ISTHMUS_API_KEY"),
        (errors.Overloaded, "ask again later, or with less at once"),
        (errors.ServerFailed, "`isthmus doctor` looks at what the server needs; its log names the request"),
    ]
    step = next((step for kind, step in steps if isinstance(error, kind)), None)
    if isinstance(error, errors.NotFound) and error.detail.startswith("no collection"):
        return "a collection comes to be when something is put into it: `isthmus index FOLDER`"
    if isinstance(error, errors.NotFound) and error.detail.startswith("no item"):
        return "`isthmus list` shows what there is"
    if isinstance(error, errors.Refused) and error.code == "unknown":
        return _ANOTHER_SERVER
    return step


def parsed_filter(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"--filter is not JSON: {error}") from None


def plain_metadata(metadata: Mapping[str, Any]) -> str:
    """Return the metadata that fit into a line, without an index's own notes about a file."""
    return "  ".join(
        f"{name}={value}"
        for name, value in metadata.items()
        if not isinstance(value, dict | list) and not name.startswith("file.")
    )


def echo_lines(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)


class _PassedOn(click.Command):
    """Passes its arguments on to another program, which reads them."""

    def __init__(self, name: str, *, flags: Sequence[str], **options: Any) -> None:
        super().__init__(name, **options)
        self._flags = sorted([*flags, "--help"])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(flag) for flag in self._flags if flag.startswith(incomplete)]


def passed_on(name: str, help: str, run: Callable[[tuple[str, ...]], Any], flags: Sequence[str] = ()) -> click.Command:
    """Return a command whose arguments `run` reads, --help too. What it returns is the exit code.

    `flags` are those that shells complete: to ask `run` for them would take seconds.
    """

    def passed(arguments: tuple[str, ...]) -> None:
        sys.exit(run(arguments))

    every = click.Argument(
        ["arguments"], nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]…", shell_complete=_files
    )
    return _PassedOn(
        name,
        flags=flags,
        callback=passed,
        params=[every],
        help=help,
        short_help=help.partition("\n")[0],
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )


def _files(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return click.Path().shell_complete(context, parameter, incomplete)


def imported(module: str, extra: str) -> Any:
    """Return a module of the distribution `isthmus`. Raises Failure where a package that it needs is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise Failure(
            f"there is no package {package!r} here",
            f"pip install 'isthmus[{extra}]' adds what is missing; isthmus doctor lists it",
        ) from None
