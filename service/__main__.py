"""python -m service COMMAND: each command is a module of service/commands with HELP, configure(parser) and run(…)."""

import argparse
import os
import sys
from typing import Any

from service.api.keys import KeysError
from service.commands import (
    backup,
    check,
    keys,
    load,
    openapi,
    publish,
    reembed,
    restore,
    serve,
    settings,
    tune,
    upgrade,
)
from service.commands.starters import StarterError
from service.contract.bundle import BundleError
from service.engine.towers import TowerError
from service.settings import SettingsError
from service.store.errors import StoreError

COMMANDS = {
    "serve": serve,
    "check": check,
    "backup": backup,
    "restore": restore,
    "reembed": reembed,
    "upgrade": upgrade,
    "load": load,
    "publish": publish,
    "keys": keys,
    "tune": tune,
    "openapi": openapi,
    "settings": settings,
}


def make_parser(called: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands. `called` is the command's name where that is not `python -m service NAME`."""
    parser = argparse.ArgumentParser(prog="python -m service", description="The Isthmus service.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.configure(commands.add_parser(name, prog=called, help=command.HELP, description=command.HELP))
    return parser


def main(arguments: list[str] | None = None, called: str | None = None) -> int:
    """Run one command and return its exit status: 2 where it cannot do what it is asked for."""
    options: dict[str, Any] = vars(make_parser(called).parse_args(arguments))
    try:
        status: int = COMMANDS[options.pop("command")].run(**options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has; what is left is not to fail at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SettingsError, BundleError, TowerError, StarterError, StoreError, KeysError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
