"""`python -m service`, with a hand inside that breaks things when it is told to. For benchmarks.chaos and the tests.

python -m benchmarks.sabotage serve …     with --ISTHMUS_ settings as ever

SIGUSR1 ends every worker thread of the models and the decoders, from inside, as a bug in a library would. SIGUSR2 makes
every call of a tower hang, and a second SIGUSR2 lets them go on. A call counts as hanging after HANG_S, or after the
request deadline where that is longer.
"""

import ctypes
import signal
import sys
import threading
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service import __main__ as service
from service.engine import channel
from service.engine.towers import Arrays, Tower

HANG_S = 1.0
"""Shorter than in service, so that a minute shows what else takes several."""
_WORKERS = ("decode", "-model", "-collate")
_free = threading.Event()
_free.set()
_run = Tower.run


def _waiting(tower: Tower, arrays: Arrays) -> NDArray[np.float32]:
    _free.wait()
    return _run(tower, arrays)


def _kill_workers(*_: Any) -> None:
    for thread in threading.enumerate():
        if thread.name.endswith(_WORKERS) and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def _hang_or_go_on(signal_number: int, frame: FrameType | None) -> None:
    if _free.is_set():
        _free.clear()
    else:
        _free.set()


def main() -> int:
    channel._HANG_S = HANG_S
    Tower.run = _waiting  # type: ignore[assignment, method-assign]
    signal.signal(signal.SIGUSR1, _kill_workers)
    signal.signal(signal.SIGUSR2, _hang_or_go_on)
    return service.main()


if __name__ == "__main__":
    sys.exit(main())
