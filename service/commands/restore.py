"""`restore`: make a store, and its jobs, of a backup."""

import argparse
from pathlib import Path

from service.commands.backup import add_jobs, jobs_of
from service.jobs import upkeep as jobs_upkeep
from service.store import upkeep

HELP = "make a store of a backup"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("store", type=Path, metavar="STORE", help="a directory that holds no store")
    add_jobs(parser)


def run(file: Path, store: Path, jobs: Path | None) -> int:
    """Raises StoreError."""
    folder, target = jobs_of(file), jobs or store / "jobs"
    if folder.is_dir():
        jobs_upkeep.refuse_jobs(target)
    print(f"{store}: {upkeep.restore(file, store)} items")
    if folder.is_dir():
        print(f"{target}: {jobs_upkeep.restore(folder, target)}")
    return 0
