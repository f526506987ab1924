"""`keys` makes, lists and revokes API keys."""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any, cast, get_args

from service.api.keys import Key, Scope, create_key, read_keys, revoke_key
from service.runtime.quotas import UNITS, Limit
from service.settings import SettingsError, read_settings

HELP = "make, list and revoke API keys"


def configure(parser: argparse.ArgumentParser) -> None:
    file = argparse.ArgumentParser(add_help=False)
    file.add_argument("--json", dest="as_json", action="store_true", help="a JSON object per key, a line each")
    file.add_argument("--file", type=Path, metavar="FILE", help="of the keys; else ISTHMUS_KEYS")
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", parents=[file], help="add a key to the file, and print it: once")
    create.add_argument("--name", required=True, help="whose it is, or what for")
    create.add_argument("--scopes", required=True, type=_scopes, metavar="SCOPES", help="of read,write")
    create.add_argument(
        "--limit",
        dest="limits",
        action="append",
        default=[],
        type=_limit,
        metavar="UNIT=AMOUNT/PERIOD",
        help=f"such as items=1000/minute; repeated. Units: {', '.join(UNITS)}",
    )
    create.add_argument("--days", type=int, metavar="N", help="until it expires; else it does not")
    actions.add_parser("list", parents=[file], help="all of them, the revoked too")
    revoke = actions.add_parser("revoke", parents=[file], help="for ever")
    revoke.add_argument("id", metavar="ID", help="of the key, as `list` shows it")


def run(action: str, file: Path | None, as_json: bool = False, **options: Any) -> int:
    """Raises KeysError, SettingsError."""
    path = file or read_settings().keys
    if path is None:
        raise SettingsError("ISTHMUS_KEYS is not set: it, or --file, names the file of the keys")
    match action:
        case "create":
            key, clear = create_key(path, **options)
            if as_json:
                print(json.dumps(_as_json(key) | {"key": clear}))
                return 0
            print(f"{key.id} is added to {path}. This is the key; it is shown only now:", file=sys.stderr)
            print(clear)
        case "list":
            now = datetime.datetime.now(datetime.UTC)
            for key in read_keys(path):
                if as_json:
                    print(json.dumps(_as_json(key)))
                    continue
                limits = " ".join(map(str, key.limits)) or "no limits"
                until = f", until {key.expires:%Y-%m-%d}" if key.expires else ""
                dates = f"made {key.created:%Y-%m-%d}{until}"
                print(
                    f"{key.id}  {key.state(now):7}  {','.join(sorted(key.scopes)):16}  {key.name}  ({dates}; {limits})"
                )
        case "revoke":
            key = revoke_key(path, options["id"])
            if as_json:
                print(json.dumps(_as_json(key)))
                return 0
            print(f"{key.id} ({key.name}) is revoked; servers that read {path} see it within a second or two")
    return 0


def _as_json(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "state": key.state(datetime.datetime.now(datetime.UTC)),
        "scopes": sorted(key.scopes),
        "limits": [str(limit) for limit in key.limits],
        "created": key.created.isoformat(),
        "expires": key.expires.isoformat() if key.expires else None,
    }


def _scopes(text: str) -> list[Scope]:
    scopes = [scope.strip() for scope in text.split(",")]
    if unknown := [scope for scope in scopes if scope not in get_args(Scope)]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(get_args(Scope))}")
    return cast("list[Scope]", scopes)


def _limit(text: str) -> Limit:
    try:
        return Limit.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
