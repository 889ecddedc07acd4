"""The end of what runs in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

__all__ = ["stop"]

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
