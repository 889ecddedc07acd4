"""Tasks beside the one that waits for them: several at a time, and their end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, TypeVar

__all__ = ["ahead", "stop"]

T = TypeVar("T")
R = TypeVar("R")

AGAIN_SECONDS = 5.0
"""Time for a task to clear up before it is cancelled once more."""


async def stop(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and return when all have ended, whatever they raise.

    Once may not be enough: `wait_for` of Python 3.11, which pymongo uses, loses a cancellation that comes with the result.
    """
    every = list(tasks)
    pending = set(every)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN_SECONDS)
    await asyncio.gather(*every, return_exceptions=True)  # or what they raised would be reported as never looked at


async def ahead(source: AsyncIterator[T], work: Callable[[T], Coroutine[Any, Any, R]], at_once: int) -> AsyncIterator[R]:
    """What `work` makes of every item, in their order, `at_once` at a time. The first failure stops the rest."""
    running: deque[asyncio.Task[R]] = deque()
    try:
        async for item in source:
            running.append(asyncio.create_task(work(item)))
            if len(running) == at_once:
                yield await running.popleft()
        while running:
            yield await running.popleft()
    finally:
        await stop(running)
