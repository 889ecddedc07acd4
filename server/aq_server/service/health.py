"""Whether what a server stands on answers: asked of all parts at once, with a time limit, and not for every probe anew."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from aq_data.errors import AqDataError
from aq_data.models.structs import resolve
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.tasks import stop

__all__ = ["OK", "Health", "Readiness"]

log = logging.getLogger("aq_data")

OK = "ok"
KEPT_SECONDS = 1.0
"""An answer counts for so long, whoever asks."""
LIMIT_SECONDS = 1.5
"""What has not answered by then does not answer; the probe goes on, and no second one is begun beside it.

Whoever asks while it goes on is told so at once: in an outage too readiness is known within this time.
"""


class Readiness(msgspec.Struct, frozen=True, omit_defaults=True):
    """`ready` takes requests; `degraded` does, but for what lies in a store that is down; `unavailable` does not.

    `metadata` and each of `stores` are "ok", or what is wrong. `waiting` tells of each store with a fallback how many
    DataFiles lie elsewhere until they are brought there.
    """

    status: Literal["ready", "degraded", "unavailable"]
    metadata: str
    stores: dict[str, str]
    waiting: dict[str, int] = {}


@dataclass(slots=True)
class _Probe:
    state: str = OK
    at: float = float("-inf")
    began: float = 0.0
    running: asyncio.Task[None] | None = None


class Health:
    """One instance per process."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores) -> None:
        self._metadata, self._stores = metadata, stores
        self._probes: dict[str, _Probe] = {}
        self.waiting: dict[str, int] = dict.fromkeys(stores.fallbacks, 0)
        """As `Readiness` tells it; kept up to date by `Draining`."""

    async def readiness(self) -> Readiness:
        """Not ready only without the metadata, or the default store and its fallback: a store that is down takes none of the
        others along.
        """
        metadata, stores = await asyncio.gather(self._state("", self._check_metadata), self.stores(self._names()))
        stores |= await self.stores([name for name in self._names() if name not in stores])  # heard of just now
        waiting = dict(self.waiting)
        default = self._stores.default
        if metadata != OK or OK not in (stores[default], stores.get(self._stores.fallbacks.get(default, ""))):
            return Readiness("unavailable", metadata, stores, waiting)
        return Readiness("ready" if set(stores.values()) == {OK} else "degraded", metadata, stores, waiting)

    async def _check_metadata(self) -> None:
        await self._metadata.check()
        await self._stores.infos()

    def _names(self) -> list[str]:
        return list(dict.fromkeys((*self._stores.known(), self._stores.default)))

    async def stores(self, names: list[str]) -> dict[str, str]:
        """The state of each of these stores."""
        return dict(zip(names, await asyncio.gather(*map(self._store, names)), strict=True))

    def _store(self, name: str) -> Awaitable[str]:
        async def check() -> None:
            await (await self._stores.at(name)).blobs.check()

        return self._state(name, check)

    async def _state(self, part: str, check: Callable[[], Awaitable[None]]) -> str:
        probe = self._probes.setdefault(part, _Probe())
        if probe.running is None and time.monotonic() - probe.at >= KEPT_SECONDS:
            probe.began = time.monotonic()
            probe.running = asyncio.create_task(_run(probe, check))
        if probe.running is not None:
            left = max(0.0, probe.began + LIMIT_SECONDS - time.monotonic())
            _, unfinished = await asyncio.wait({probe.running}, timeout=left)
            if unfinished:
                return f"does not answer within {LIMIT_SECONDS:g} s"
        return probe.state

    async def close(self) -> None:
        """Let go of probes that still run."""
        await stop(probe.running for probe in self._probes.values() if probe.running is not None)


async def _run(probe: _Probe, check: Callable[[], Awaitable[None]]) -> None:
    try:
        await check()
        probe.state = OK
    except AqDataError as exc:
        probe.state = exc.message
    except Exception as exc:  # whatever it is, it does not answer
        log.exception("a probe failed")
        probe.state = type(exc).__name__
    finally:
        probe.at, probe.running = time.monotonic(), None


resolve(Readiness)
