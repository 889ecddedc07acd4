"""Threads for files and codecs: a few for small requests, so that these never queue behind a large one."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

    async def run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._quick, call)

    async def each(self, count: int, call: Callable[[int], None]) -> None:
        """`call(i)` for each i below `count`, spread over the threads; the first failure stops the rest."""
        loop = asyncio.get_running_loop()
        if count <= self.QUICK:
            return await loop.run_in_executor(self._quick, lambda: _in_turn(count, call))
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

        tasks = [loop.run_in_executor(self._bulk, work) for _ in range(min(self.width, count))]
        try:
            await asyncio.gather(*tasks)
        finally:
            # Also when the caller is cancelled: nobody may write into buffers that are already let go.
            failed.set()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        self._quick.shutdown()
        self._bulk.shutdown()


def _in_turn(count: int, call: Callable[[int], None]) -> None:
    for i in range(count):
        call(i)


def _step_back() -> None:
    """Leave the processor to the event loop and to small requests whenever they want it (Linux: nice is per thread)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
