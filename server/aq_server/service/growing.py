"""Sweeps as readers see them while they grow."""

from __future__ import annotations

from collections import OrderedDict
from datetime import UTC, datetime

import msgspec

from aq_data.errors import CorruptionError, NotFoundError, UnavailableError
from aq_data.models.datafile import DataFile, DataFileId, SweepInfo
from aq_data.models.sweep import Plan, State, grown_arrays
from aq_data.models.values import parse_instant
from aq_data.storage.arrays.growing import View
from aq_data.storage.arrays.manifest import Manifest
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.store import MetadataStore
from aq_data.storage.metadata.sweeplog import Tail

__all__ = ["Growing"]

KEPT_BYTES = 64 << 20
"""Unfolded blocks that stay in memory between two reads of a sweep: each read then fetches only what is new."""
TRIES = 10


class Growing:
    """Views of open sweeps, and documents as they are answered: with the true extents, and where they lie now."""

    def __init__(self, metadata: MetadataStore, stores: ArrayStores, stale_after: float) -> None:
        """`stale_after`: seconds of silence after which an open sweep is called stale."""
        self._metadata, self._stores, self._stale_after = metadata, stores, stale_after
        self._tails: OrderedDict[DataFileId, Tail] = OrderedDict()

    async def view(self, id: DataFileId) -> View:
        """The sweep as of now: every acknowledged block, whole."""
        missing = ""
        for _ in range(TRIES):
            tail = await self._tail(id)
            folder = await self._stores.folder(tail.plan.store)
            try:
                return View(tail.plan, tail.state, await folder.manifest(tail.plan, tail.state), tail.rows)
            except NotFoundError as exc:
                if tail.state.ended_revision:
                    return View(tail.plan, tail.state, Manifest(), ())
                if missing == tail.state.manifest:
                    raise CorruptionError(f"sweep {id} has lost the map of its chunks: {exc}") from exc
                missing = tail.state.manifest  # folded again since the state was read?
        raise UnavailableError(f"sweep {id} changes faster than it can be read; try again")

    async def _tail(self, id: DataFileId) -> Tail:
        known = self._tails.get(id)
        newer = await self._metadata.sweeps.tail(id, known.state.head if known is not None else 0)
        kept = known.rows if known is not None else ()
        rows = (*(row for row in kept if row.placed.seq > newer.state.folded), *newer.rows)
        tail = Tail(newer.plan, newer.state, rows)
        # Another task may have come back from the store with more meanwhile.
        other = self._tails.get(id)
        if other is None or other.state.head <= tail.state.head:
            self._tails[id] = tail
            self._tails.move_to_end(id)
        if newer.state.ended_revision:
            self._tails.pop(id, None)
        while self._tails and sum(map(_weight, self._tails.values())) > KEPT_BYTES:
            self._tails.popitem(last=False)
        return tail

    async def present(self, document: DataFile) -> DataFile:
        """The document as it is answered: with its present path, of an open sweep with extents, head and silence of now."""
        if document.state != "open" or document.sweep is None:
            return await self._stores.placed(document)
        plan, state = await self._metadata.sweeps.get(document.id)
        if state.ended_revision:
            record = await self._metadata.get(document.id)
            return await self._stores.placed(record.document if record is not None else document)
        return self.shown(document, plan, state)

    async def present_json(self, documents: list[bytes]) -> list[bytes]:
        """`present`, from and to JSON; only those that may be of open sweeps are decoded."""
        found = await self._stores.placed_json(documents)
        for i, document in enumerate(documents):
            if b'"state":"open"' in document:
                found[i] = msgspec.json.encode(await self.present(msgspec.json.decode(document, type=DataFile)))
        return found

    def shown(self, document: DataFile, plan: Plan, state: State) -> DataFile:
        """`present` with the state at hand."""
        arrays = grown_arrays(plan, state)
        info = msgspec.structs.replace(
            document.sweep or SweepInfo(),
            head=state.head,
            last_block_at=state.last_block_at,
            stale=self.is_stale(document, state),
        )
        size = sum(array.nbytes for array in arrays) + sum(file.size for file in document.files)
        # No path: its folder is no Zarr group of these arrays before the end.
        return msgspec.structs.replace(document, arrays=arrays, size=size, sweep=info, path="")

    def is_stale(self, document: DataFile, state: State) -> bool:
        """Whether an open sweep was silent for too long. Its writer may go on all the same."""
        last = parse_instant(state.last_block_at or document.created_at, "last_block_at")
        return state.seal is None and (datetime.now(UTC) - last).total_seconds() > self._stale_after


def _weight(tail: Tail) -> int:
    return tail.state.unfolded_bytes + 1000 * len(tail.rows)
