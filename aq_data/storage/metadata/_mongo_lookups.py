"""What snapshots say to the parts of a filter: the hashes of those that match, before records are asked for.

Up to `MANY` hashes become part of the filter. Where more snapshots match, any snapshot may: records that have one are judged
in batches, each by asking the snapshots of that batch alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec

from aq_data.models.matching import Facts
from aq_data.models.query import Node
from aq_data.storage.metadata._mongo_snapshots import Snapshots
from aq_data.storage.metadata._shared import NO_SNAPSHOTS, Shared, has_negated_part, holds, shared_parts

__all__ = ["Lookups", "facts_of"]

T = TypeVar("T")
Row = dict[str, Any]

MANY = 5_000
"""Hashes that stand for one part of a filter: 400 kB of it."""
TOGETHER = 20_000
"""Hashes that stand for all of them: MongoDB takes no command of more than 16 MB."""
TRIES = 3


class Lookups:
    """Asks the snapshots of one store."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    async def settled(self, node: Node, ask: Callable[[Shared], Awaitable[T]], seconds: float) -> T:
        """What `ask` returns for what the snapshots say to a `grouped` filter.

        A record may be found because its snapshot does not match. One that came after the snapshots were asked must not be
        found for that: where none has come when they are asked again, none did.
        """
        parts = list(dict.fromkeys(shared_parts(node)))
        if not parts:
            return await ask(NO_SNAPSHOTS)
        shared = await self._found(parts, seconds)
        for _ in range(TRIES):
            answer = await ask(shared)
            if not has_negated_part(node):
                return answer
            before, shared = shared, await self._found(parts, seconds)
            if shared == before:
                return answer
        return await ask(dict.fromkeys(parts))

    async def _found(self, parts: Sequence[Node], seconds: float) -> Shared:
        found = await asyncio.gather(*(self._snapshots.matching(part, MANY, seconds) for part in parts))
        shared: dict[Node, list[str] | None] = {}
        left = TOGETHER
        for part, hashes in sorted(zip(parts, found, strict=True), key=lambda pair: len(pair[1] or ())):
            left -= len(hashes or ())
            shared[part] = sorted(hashes) if hashes is not None and left >= 0 else None
        return shared

    async def judged(self, node: Node, shared: Shared, rows: Sequence[Row], seconds: float) -> list[Row]:
        """Those of the rows (document, snapshot) that match. TimeoutError when it takes longer."""
        end = time.monotonic() + seconds
        having = {row["snapshot"] for row in rows if "snapshot" in row}
        known: dict[Node, frozenset[str]] = {}
        for part, hashes in shared.items():
            if hashes is None and having:
                known[part] = frozenset(await self._snapshots.matching(part, None, seconds, having) or ())
            else:
                known[part] = frozenset(hashes or ())

        def is_match(row: Row) -> bool:
            hash = row.get("snapshot")
            return holds(node, facts_of(row), {part: hash in hashes for part, hashes in known.items()}, end)

        # Other questions are answered meanwhile: to look for a pattern in a long text may take seconds.
        return await asyncio.to_thread(lambda: [row for row in rows if is_match(row)])


def facts_of(row: Row) -> Facts:
    """The facts of a document outside of its snapshot."""
    plain = msgspec.json.decode(row["document"])
    if "snapshot" in row:
        del plain["instruments"]
    return Facts(plain)
