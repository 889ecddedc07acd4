"""How often, and how long, something is tried when no answer comes from MongoDB."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from pymongo.errors import ConnectionFailure, ServerSelectionTimeoutError

__all__ = ["again", "pauses"]

T = TypeVar("T")

TRIES = 4
PAUSE = 0.2
"""Seconds before the second try; each further pause is twice as long. An election takes the driver's own waiting besides."""
AGAIN_SECONDS = 5.0


def pauses() -> Iterator[float | None]:
    """Before each further try so many seconds; None is the end. A try that took long is not followed by many."""
    began = time.monotonic()
    for i in range(TRIES - 1):
        if time.monotonic() - began > AGAIN_SECONDS:
            break
        yield PAUSE * 2**i
    yield None


async def again(write: Callable[[], Awaitable[T]]) -> T:
    """The answer of a write that does no harm when it is done twice."""
    for pause in pauses():
        try:
            return await write()
        except ServerSelectionTimeoutError:
            raise
        except ConnectionFailure:
            if pause is None:
                raise
            await asyncio.sleep(pause)
    raise AssertionError("the last pause is None")
