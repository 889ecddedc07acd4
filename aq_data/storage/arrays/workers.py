"""Threads for files and codecs: a few for small requests, so that these never queue behind a large one."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["Workers"]

T = TypeVar("T")


class Workers:
    """The threads of one blob store. `width` work on one large request at a time."""

    QUICK = 4
    """Up to this many keys a request counts as small."""

    def __init__(self) -> None:
        self.width = max(2, os.cpu_count() or 1)
        self._quick = ThreadPoolExecutor(2 * self.width, thread_name_prefix="blob-quick")
        self._bulk = ThreadPoolExecutor(self.width, thread_name_prefix="blob-bulk", initializer=_step_back)

    async def run(self, call: Callable[[], T], *, is_bulk: bool = False) -> T:
        """`call()` in a thread; at the end of the interpreter, when no thread takes work any more, in this one.

        `is_bulk` says that it is a piece of a large request.
        """
        try:
            future = (self._bulk if is_bulk else self._quick).submit(call)
        except RuntimeError:
            return call()
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancelled():  # it runs: nothing may be taken from under it
                await _finished([future], threading.Event())
            raise

    async def each(self, count: int, call: Callable[[int], None]) -> None:
        """`call(i)` for each i below `count`, spread over the threads; the first failure stops the rest."""
        if count <= self.QUICK:
            await self.run(lambda: _in_turn(count, call))
            return
        numbers, lock, failed = itertools.count(), threading.Lock(), threading.Event()

        def work() -> None:
            while not failed.is_set():
                with lock:
                    i = next(numbers)
                if i >= count:
                    return
                try:
                    call(i)
                except BaseException:
                    failed.set()
                    raise

        futures = [self._bulk.submit(work) for _ in range(min(self.width, count))]
        await _finished(futures, failed)
        for future in futures:
            future.result()

    def close(self) -> None:
        self._quick.shutdown()
        self._bulk.shutdown()


async def _finished(futures: list[Future[T]], stop: threading.Event) -> None:
    """Return when no thread works any more, also when the caller is cancelled meanwhile: `stop` is set, it is raised then.

    Nobody may write into a buffer or a descriptor that its owner has already let go.
    """
    cancelled: asyncio.CancelledError | None = None
    for waiting in [asyncio.wrap_future(future) for future in futures]:
        while not waiting.done():
            try:
                await asyncio.shield(waiting)
            except asyncio.CancelledError as exc:
                cancelled = exc
                stop.set()
            except BaseException:  # noqa: BLE001  (the caller takes it from the future)
                break
    if cancelled is not None:
        raise cancelled


def _in_turn(count: int, call: Callable[[int], None]) -> None:
    for i in range(count):
        call(i)


def _step_back() -> None:
    """Leave the processor to the event loop and to small requests whenever they want it (Linux: nice is per thread)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
