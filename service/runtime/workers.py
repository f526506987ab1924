"""Threads run calls for an event loop. A dead thread is replaced at once, and the call that it had is answered.

Callers have the threads in turn (fair.py); where there are spare ones, another caller's call need not wait for the end
of what a flood's calls have begun. A call whose caller went away is not begun; one that has been begun can ask
whether it is `abandoned`, and stop.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from service.errors import NotReady
from service.runtime.fair import FairSemaphore

log = logging.getLogger(__name__)

Result = TypeVar("Result")


_ENDED = "the thread that ran this call ended"
_CLOSED = "the server is shutting down"
_CALLS_AHEAD = 2
"""Calls that are queued ahead for the threads, so that they need not wait for the event loop between two calls."""
_own = threading.local()


class WorkerDied(RuntimeError):
    """Raised where the thread that had this call ended before the call did."""


class Abandoned(Exception):
    """Raised in a call that nobody waits for any more."""


def abandoned() -> bool:
    """Return whether nobody waits any more for the call that this thread runs; False in a thread of no Workers."""
    call: _Call | None = getattr(_own, "call", None)
    return call is not None and call.result.done()


def stop_if_abandoned() -> None:
    """Stop a long call if nobody waits for it; such a call asks now and then. Raises Abandoned."""
    if abandoned():
        raise Abandoned


@dataclass(eq=False)
class _Call:
    function: Callable[[], Any]
    result: "asyncio.Future[Any]"
    free: Callable[[], None] | None = None
    """Gives the call's place back once it has ended."""


class Workers:
    """Runs calls in threads, each caller's in order: `count` for one caller, and `spare` ones that only others have.
    Unlike those of a ThreadPoolExecutor, dead ones are replaced.

    What ends a thread is whatever is no Exception: SystemExit, or the panic of a library that is written in Rust.
    The event loop shares no lock with a thread at work, which might die with it in hand; nor do they hand the
    interpreter's lock back and forth over one, which is most of what a ThreadPoolExecutor costs (docs/LOG.md).
    """

    def __init__(self, name: str, count: int = 1, *, spare: int = 0, died: Callable[[], None] = lambda: None) -> None:
        self._name, self._count, self._died = name, count + spare, died
        self._per_caller = count if spare else None
        self._calls: deque[_Call] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        """One entry per call: a thread without a call waits for an entry."""
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._places = self._new_places()
        self._threads: list[threading.Thread] = []
        self._filling = threading.Lock()
        self._fill()

    @property
    def alive(self) -> bool:
        """Return whether all of its threads are alive, and start those that are missing."""
        self._fill()
        return not self._closed and sum(thread.is_alive() for thread in self._threads) == self._count

    async def run(self, function: Callable[[], Result]) -> Result:
        """Run a function in a thread, and return its result or raise its error. A cancelled call is not begun.

        Raises WorkerDied, Overloaded where too many of its caller's wait, and NotReady after close.
        """
        self._refuse_if_closed()
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            # The pool uses one loop at a time: calls that an earlier loop left behind wake nobody.
            self._loop, self._places = loop, self._new_places()
        places = self._places
        name = await places.acquire()
        try:
            self._refuse_if_closed()  # it may have been meanwhile
        except NotReady:
            places.release(name)
            raise
        call = _Call(function, loop.create_future(), partial(places.release, name))
        self._calls.append(call)
        self._wake.put(None)
        if sum(thread.is_alive() for thread in self._threads) < self._count:
            self._fill()
        result: Result = await call.result
        return result

    def close(self, *, wait: bool = True) -> None:
        """Run the calls that the threads have, and stop. Blocks until then where `wait` is set."""
        self._closed = True
        for _ in range(self._count):
            self._wake.put(None)
        if not wait:
            return
        for thread in list(self._threads):
            thread.join()
        self._give_up()

    def _new_places(self) -> FairSemaphore:
        return FairSemaphore(self._count + _CALLS_AHEAD, per_caller=self._per_caller)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise NotReady(_CLOSED)

    def _fill(self) -> None:
        """Start the missing threads, as far as the system allows."""
        with self._filling:
            for thread in [thread for thread in self._threads if not thread.is_alive()]:  # it could not say so
                self._threads.remove(thread)
            while len(self._threads) < self._count and not self._closed:
                # A daemon, so that a process that fails on its way can end.
                thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._threads.append(thread)
                try:
                    thread.start()
                except RuntimeError:
                    log.critical("a thread of %s cannot be started", self._name)
                    self._threads.remove(thread)
                    break
        if not self._threads:
            self._give_up()

    def _work(self) -> None:
        hand: list[_Call] = []  # what this thread has to answer for
        try:
            while True:
                try:
                    # One step of the interpreter: a thread that is killed has the call, or it is still in the queue.
                    hand.extend(map(deque.popleft, (self._calls,)))
                except IndexError:
                    if self._closed:
                        return
                    self._wake.get()
                    continue
                _perform(hand[0])
                hand.clear()
        except BaseException as death:  # whatever it is, the thread is at its end
            while not self._replaced(hand, death):
                pass

    def _replaced(self, hand: Sequence[_Call], death: BaseException) -> bool:
        """Start another thread in the place of this one, which died, and answer what it had in hand. False where that
        was broken off, because what ends a thread came again."""
        try:
            log.critical("a thread of %s died", self._name, exc_info=death)
            if threading.current_thread() in self._threads:
                self._threads.remove(threading.current_thread())
            self._fill()
            self._died()
            for call in hand:
                _fail(call, WorkerDied(_ENDED))
        except Exception:
            raise
        except BaseException:
            return False
        return True

    def _give_up(self) -> None:
        """Answer the calls that no thread will run."""
        while self._calls:
            _fail(self._calls.popleft(), WorkerDied(_ENDED))


class OwnThread:
    """Runs one call at a time in a thread of its own: a call that never ends, such as reading a file on a mount that
    is gone, blocks only this thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = asyncio.Lock()
        self._last: asyncio.Future[Any] | None = None
        self._given_up_at = 0.0

    async def run(self, function: Callable[[], Result], patience_s: float) -> Result:
        """Run a function; return its result or raise its error. Raises TimeoutError where it, or the one before, is
        late."""
        async with self._turn:
            if self._last is not None and not self._last.done():
                await self._wait(self._last)
            call = _Call(function, asyncio.get_running_loop().create_future())
            self._last, self._given_up_at = call.result, time.monotonic() + patience_s
            threading.Thread(target=_perform, args=(call,), name=self._name, daemon=True).start()
            await self._wait(call.result)
            result: Result = call.result.result()
            return result

    async def _wait(self, call: "asyncio.Future[Any]") -> None:
        done, _ = await asyncio.wait({call}, timeout=max(0.0, self._given_up_at - time.monotonic()))
        if not done:
            await asyncio.sleep(0)  # where the event loop is late, and not the thread, the outcome is waiting for it
            if not call.done():
                raise TimeoutError


def _perform(call: _Call) -> None:
    if call.result.done():  # cancelled
        _tell(call)
        return
    _own.call = call
    try:
        result = call.function()
    except Exception as error:
        _fail(call, error)
    else:
        _tell(call, call.result.set_result, result)
    finally:
        _own.call = None


def _fail(call: _Call, error: Exception) -> None:
    if isinstance(error, StopIteration):  # a future takes any other
        error = RuntimeError("the call raised StopIteration")
    _tell(call, call.result.set_exception, error)


def _tell(call: _Call, set: Callable[[Any], None] | None = None, outcome: object = None) -> None:
    """Give the outcome to whoever still waits for it in the call's event loop, where its place is free from now on."""

    def done() -> None:
        if call.free is not None:  # a thread that dies on its way out of a call tells twice
            call.free()
            call.free = None
        if set is not None and not call.result.done():
            set(outcome)

    with suppress(RuntimeError):  # the loop is closed
        call.result.get_loop().call_soon_threadsafe(done)
