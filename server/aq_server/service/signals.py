"""Waking those who wait for a DataFile to change, within this process; changes elsewhere are found by looking again."""

from __future__ import annotations

import asyncio

__all__ = ["Signals"]


class Signals:
    """One moment of attention per id; used in one event loop."""

    def __init__(self) -> None:
        self._waiting: dict[str, asyncio.Event] = {}
        self.stopping = asyncio.Event()
        """Set when the server is about to stop: whoever waits for changes ends."""

    def tell(self, id: str) -> None:
        """Something about `id` changed."""
        event = self._waiting.pop(id, None)
        if event is not None:
            event.set()

    def listen(self, id: str) -> asyncio.Event:
        """An event set by the next `tell`: take it before looking, wait after, and nothing falls in between."""
        return self._waiting.setdefault(id, asyncio.Event())

    def stop(self) -> None:
        """Wake everybody for the last time."""
        self.stopping.set()
        for id in list(self._waiting):
            self.tell(id)
