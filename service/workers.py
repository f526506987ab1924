"""Threads that run calls for an event loop. One that dies is replaced at once, and the call that it had is answered."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
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
    """

    def __init__(self, name: str, count: int = 1, *, died: Callable[[], None] = lambda: None) -> None:
        self._name, self._died = name, died
        self._calls: deque[_Call] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads: list[threading.Thread] = []
        for _ in range(count):
            self._start()

    @property
    def alive(self) -> bool:
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    async def run(self, function: Callable[[], Result]) -> Result:
        """Its result, or what it raised. Raises WorkerDied, and NotReady after close. A cancelled call is not begun."""
        call = _Call(function)
        with self._changed:
            if self._closed:
                raise NotReady("the server is shutting down")
            self._calls.append(call)
            self._changed.notify()
        result: Result = await asyncio.wrap_future(call.future)
        return result

    def close(self) -> None:
        """Run what was given, and stop. Blocks."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in list(self._threads):
            thread.join()
        for call in self._calls:  # only where a thread died meanwhile
            _fail(call)

    def _start(self) -> None:
        # A daemon, so that a process that fails on its way can end.
        thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        hand: list[_Call] = []  # what this thread has to answer for
        try:
            while self._take(hand):
                _perform(hand[0])
                hand.clear()
        except BaseException:  # whatever it is, the thread is at its end
            log.critical("a thread of %s died", self._name, exc_info=True)
            self._replace(hand)

    def _take(self, hand: list[_Call]) -> bool:
        """Move the next call into the hand; False once there is none and there will be none."""
        with self._changed:
            while not self._calls:
                if self._closed:
                    return False
                self._changed.wait()
            # In this order a thread that is killed in between has it twice, and not never.
            hand.append(self._calls[0])
            self._calls.popleft()
            return True

    def _replace(self, hand: list[_Call]) -> None:
        for call in hand:
            _fail(call)
        with self._changed:
            self._threads.remove(threading.current_thread())
            if not self._closed:
                self._start()
        self._died()


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
