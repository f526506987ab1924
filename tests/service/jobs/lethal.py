"""`python -m service`, but a text with the word "barks" kills the process that embeds it, as a crash in C would, and a
chunk or an item is tried twice."""

import os
import signal
import sys
from typing import Any

from service import __main__
from service.engine import towers
from service.jobs import run as jobs_run
from tests import tiny_bundle

_run = towers.Tower.run


def run(self: towers.Tower, arrays: Any) -> Any:
    if (arrays.get("input_ids", 0) == tiny_bundle.WORDS.index("barks")).any():  # type: ignore[union-attr]
        os.kill(os.getpid(), signal.SIGKILL)
    return _run(self, arrays)


towers.Tower.run = run  # type: ignore[method-assign]
jobs_run.ATTEMPTS = 2

if __name__ == "__main__":
    sys.exit(__main__.main())
