"""Threads that run calls for an event loop. One that dies is replaced at once, and the call that it had is answered."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from service.errors import NotReady

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class WorkerDied(RuntimeError):
    """The thread that had this call ended before the call did."""


@dataclass(eq=False)
class _Call:
    function: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


class Workers:
    """`count` threads that take calls in order. Unlike a ThreadPoolExecutor's, they do not stay dead.

    What ends a thread is whatever is no Exception: SystemExit, or the panic of a library that is written in Rust.
    The event loop shares no lock with a thread at work, which might die with it in hand.
    """

    def __init__(self, name: str, count: int = 1, *, died: Callable[[], None] = lambda: None) -> None:
        self._name, self._count, self._died = name, count, died
        self._calls: deque[_Call] = deque()
        self._wake: SimpleQueue[None] = SimpleQueue()
        """Something for each call: a thread that finds no call waits for it."""
        self._closed = False
        self._threads: list[threading.Thread] = []
        self._filling = threading.Lock()
        self._fill()

    @property
    def alive(self) -> bool:
        return not self._closed and sum(thread.is_alive() for thread in self._threads) == self._count

    async def run(self, function: Callable[[], Result]) -> Result:
        """Its result, or what it raised. Raises WorkerDied, and NotReady after close. A cancelled call is not begun."""
        if self._closed:
            raise NotReady("the server is shutting down")
        call = _Call(function)
        self._calls.append(call)
        self._wake.put(None)
        if len(self._threads) < self._count:
            self._fill()
        result: Result = await asyncio.wrap_future(call.future)
        return result

    def close(self) -> None:
        """Run what was given, and stop. Blocks."""
        self._closed = True
        for _ in range(self._count):
            self._wake.put(None)
        for thread in list(self._threads):
            thread.join()
        self._give_up()

    def _fill(self) -> None:
        """Start the threads that are missing, as far as the system lets us."""
        with self._filling:
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
        except BaseException:  # whatever it is, the thread is at its end
            log.critical("a thread of %s died", self._name, exc_info=True)
            self._threads.remove(threading.current_thread())
            self._fill()
            self._died()
            for call in hand:
                _fail(call)

    def _give_up(self) -> None:
        """Answer what no thread will run."""
        while self._calls:
            _fail(self._calls.popleft())


def _perform(call: _Call) -> None:
    if call.future.done() or not call.future.set_running_or_notify_cancel():
        return
    try:
        result = call.function()
    except Exception as error:
        with suppress(InvalidStateError):
            call.future.set_exception(error)
    else:
        with suppress(InvalidStateError):
            call.future.set_result(result)


def _fail(call: _Call) -> None:
    with suppress(InvalidStateError):  # it may have been answered just before the end
        call.future.set_exception(WorkerDied("the thread that ran this call ended"))
