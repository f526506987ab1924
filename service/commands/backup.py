"""`backup` copies a store, and its jobs, into a file and a folder beside it."""

import argparse
import json
import shutil
from pathlib import Path

from service.jobs import upkeep as jobs_upkeep
from service.store import upkeep
from service.store.errors import StoreError

HELP = "copy a store, which may be served meanwhile, into one file"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", type=Path, metavar="STORE", help="the folder of the store")
    parser.add_argument("file", type=Path, metavar="FILE", help="its jobs go into the folder FILE.jobs")
    add_jobs(parser)
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON object, in place of text")


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=Path, metavar="FOLDER", help="where its jobs are (ISTHMUS_JOBS), if not in it")


def run(store: Path, file: Path, jobs: Path | None, as_json: bool = False) -> int:
    """Raises StoreError."""
    folder = jobs_of(file)
    if folder.exists():
        raise StoreError(f"{folder} is there already: it is not overwritten")
    staged = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        # Copy the jobs first: items that they record as done must be in the copy of the store.
        copied = jobs_upkeep.stage(jobs or store / "jobs", staged)
        items = upkeep.backup(store, file)
        if copied is not None:
            staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if as_json:
        print(json.dumps({"file": str(file), "items": items, "jobs": None if copied is None else str(folder)}))
        return 0
    print(f"{file}: {items} items")
    if copied is not None:
        print(f"{folder}: {copied}")
    return 0


def jobs_of(file: Path) -> Path:
    """Return the folder with the jobs of a backup."""
    return file.with_name(f"{file.name}.jobs")
