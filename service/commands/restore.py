"""`restore` makes a store, and its jobs, of a backup."""

import argparse
import json
from pathlib import Path

from service.commands.backup import add_jobs, jobs_of
from service.jobs import upkeep as jobs_upkeep
from service.store import upkeep

HELP = "make a store of a backup"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="the file that `backup` wrote")
    parser.add_argument("store", type=Path, metavar="STORE", help="a directory that holds no store")
    add_jobs(parser)
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object, in place of text")


def run(file: Path, store: Path, jobs: Path | None, as_json: bool = False) -> int:
    """Raises StoreError."""
    folder, target = jobs_of(file), jobs or store / "jobs"
    if folder.is_dir():
        jobs_upkeep.refuse_jobs(target)
    items = upkeep.restore(file, store)
    restored = jobs_upkeep.restore(folder, target) if folder.is_dir() else None
    if as_json:
        print(json.dumps({"store": str(store), "items": items, "jobs": None if restored is None else str(target)}))
        return 0
    print(f"{store}: {items} items")
    if restored is not None:
        print(f"{target}: {restored}")
    return 0
