"""python -m service COMMAND: each command is a module of service/commands with HELP, configure(parser) and run(…)."""

import argparse
import sys
from typing import Any

from service.api.keys import KeysError
from service.commands import backup, check, keys, load, openapi, reembed, restore, serve, settings
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
    "load": load,
    "keys": keys,
    "openapi": openapi,
    "settings": settings,
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its exit status, 2 where it cannot do what it is asked for."""
    parser = argparse.ArgumentParser(prog="python -m service", description="The Isthmus service.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.configure(commands.add_parser(name, help=command.HELP))
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    try:
        status: int = COMMANDS[options.pop("command")].run(**options)
        return status
    except (SettingsError, BundleError, TowerError, StarterError, StoreError, KeysError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
