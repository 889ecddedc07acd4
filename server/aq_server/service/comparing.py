"""What differs between DataFiles: their documents alone are read."""

from __future__ import annotations

import asyncio
from typing import Any

from aq_data.errors import QueryError
from aq_data.models.difference import Difference, compared, differences
from aq_data.models.variation import Comparison, Variation
from aq_server.service.datafiles import DataFiles
from aq_server.service.growing import Growing

__all__ = ["MAX_COMPARED", "Comparing"]

MAX_COMPARED = 1000
"""DataFiles compared at once."""


class Comparing:
    """Compares off the event loop: a large snapshot takes a while."""

    def __init__(self, datafiles: DataFiles, growing: Growing) -> None:
        self._datafiles, self._growing = datafiles, growing

    async def _content(self, id: str) -> dict[str, Any]:
        document = await self._growing.present((await self._datafiles.get(id)).document)
        return await asyncio.to_thread(compared, document)

    async def diff(self, id: str, other: str) -> list[Difference]:
        """From the first to the second."""
        before, after = await self._content(id), await self._content(other)
        return await asyncio.to_thread(differences, before, after)

    async def compare(self, ids: list[str]) -> list[Variation]:
        """The paths that vary, with the value in each DataFile in order of `ids`. TooLargeError when that is too much."""
        if len(ids) > MAX_COMPARED:
            raise QueryError(f"up to {MAX_COMPARED} DataFiles are compared at once, not {len(ids)}")
        comparison = Comparison()
        for id in ids:
            await asyncio.to_thread(comparison.add, await self._content(id))
        return await asyncio.to_thread(comparison.variations)
