"""`python -m service backup | restore` copy bulk jobs, too, by these functions.

A copy is a folder like the one that is copied: the ledger, and of each unfinished job its input and its plan. The
ledger is copied before the store is: what it says is done is in the store's copy too, and what was done in between is
done once more, to the same effect. (An item that a client deleted in between comes back, as it does after a crash.)
"""

import os
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from service.jobs.ledger import FILE, Ledger
from service.store import StoreError
from service.store.files import hold, sync

_FILES = ("input", "plan.sqlite3")
"""Files of a job's folder."""
_ID = re.compile(r"[0-9a-f]{24}(-[A-Za-z0-9.-]{1,63})?")
_TRIES = 5


@dataclass(frozen=True)
class Copied:
    jobs: int
    unfinished: int

    def __str__(self) -> str:
        return f"{self.jobs} jobs, {self.unfinished} of them unfinished"


def stage(jobs: Path, target: Path) -> Copied | None:
    """Copy the jobs, which may be under way, into a folder that does not exist yet; return None where there are none.

    Raises StoreError.
    """
    if not (jobs / FILE).is_file():
        return None
    try:
        for _ in range(_TRIES):
            target.mkdir(parents=True)
            if (copied := _copy_jobs(jobs, target)) is not None:
                return copied
            # The job ended while its files were copied, so all of its items are in the store.
            shutil.rmtree(target)
    except (OSError, sqlite3.Error) as error:
        shutil.rmtree(target, ignore_errors=True)
        raise StoreError(f"the jobs in {jobs} cannot be copied: {error}") from None
    raise StoreError(f"the jobs in {jobs} end faster than they can be copied: try again")


def restore(source: Path, jobs: Path) -> Copied:
    """Make a folder of jobs from a copy; the next server continues them. Raises StoreError."""
    lock = hold(jobs)
    try:
        refuse_jobs(jobs)
        copied = _copy_jobs(source, jobs)
        if copied is None:
            raise StoreError(f"{source} lacks files of jobs that are unfinished: it is no whole backup")
        return copied
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"{source} cannot be restored into {jobs}: {error}") from None
    finally:
        os.close(lock)


def refuse_jobs(jobs: Path) -> None:
    """Raises StoreError where there are any."""
    if (jobs / FILE).exists():
        raise StoreError(f"{jobs} holds jobs already: restore into another directory, or move them away")


def _copy_jobs(source: Path, target: Path) -> Copied | None:
    """Copy jobs, the ledger last; return None where a file of an unfinished job is missing."""
    staged = target / f"{FILE}.new"
    staged.unlink(missing_ok=True)
    address = f"{(source / FILE).absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True)) as ledger_of_source, closing(sqlite3.connect(staged)) as copy:
        ledger_of_source.backup(copy)
        if (report := copy.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(report)
    with closing(Ledger(staged)) as ledger:
        unfinished, count = ledger.unfinished(), sum(ledger.counts().values())
    with closing(sqlite3.connect(staged)) as copy:
        copy.execute("PRAGMA journal_mode = DELETE")  # it is read where nothing can be written beside it, too
    for job in unfinished:
        if not _ID.fullmatch(job.id):
            raise sqlite3.DatabaseError("a job's id is no name of a folder")
        (target / job.id).mkdir(exist_ok=True)
        for name in _FILES:
            # A plan is complete once the items are counted; before that it is made again.
            is_needed = name == "input" or job.total is not None
            if is_needed and not _copy(source / job.id / name, target / job.id / name):
                return None
    sync(staged)
    os.replace(staged, target / FILE)
    sync(target)
    return Copied(count, len(unfinished))


def _copy(source: Path, target: Path) -> bool:
    try:
        shutil.copyfile(source, target, follow_symlinks=False)
    except FileNotFoundError:
        return False
    sync(target, target.parent)
    return True
