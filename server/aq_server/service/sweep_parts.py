"""What opening, appending to and ending a sweep share."""

from __future__ import annotations

from dataclasses import dataclass

from aq_data.errors import ValidationError
from aq_data.models.arrays import is_text, parse_dtype
from aq_data.models.sweep import (
    Block,
    Plan,
    piece_bytes,
)
from aq_data.storage.arrays.manifest import block_key, make_ref
from aq_data.storage.arrays.pages import PageWriter
from aq_data.storage.arrays.payload import decode_text
from aq_data.storage.arrays.stores import ArrayStores
from aq_data.storage.metadata.store import MetadataStore
from aq_server.service.folding import Folding
from aq_server.service.growing import Growing
from aq_server.service.signals import Signals

__all__ = ["LARGE_BYTES", "SweepParts", "check_text"]

LARGE_BYTES = 4 << 20
"""A block over this lies in a blob of its own; the log row points at it."""


@dataclass(frozen=True, slots=True)
class SweepParts:
    """The stores and the background of one process. `webhooks` are the addresses that a sweep may name."""

    metadata: MetadataStore
    stores: ArrayStores
    growing: Growing
    folding: Folding
    signals: Signals
    webhooks: frozenset[str]
    max_block_bytes: int

    async def store_large(self, plan: Plan, payload: bytes) -> str:
        """Put the values of a block into a blob of its own; its `ref`."""
        ref, pages = make_ref(), PageWriter()
        blobs = (await self.stores.at(plan.store)).blobs
        await blobs.put_many([(block_key(plan.id, plan.attempt, ref), lambda: pages.write(payload) + pages.finish())])
        await blobs.settle(f"{plan.id}/{plan.attempt}/blocks")
        return ref


def check_text(plan: Plan, block: Block, payload: bytes) -> None:
    """Text that cannot be decoded is refused at the door: later nobody could tell its writer."""
    at = 0
    for piece in block.variables:
        info, size = plan.array(piece.name), piece_bytes(piece)
        if is_text(parse_dtype(info.dtype, info.name)):
            try:
                decode_text(payload[at : at + size], info, piece.shape)
            except (ValueError, RuntimeError) as exc:
                raise ValidationError(f"variable {info.name!r}: {exc}") from exc
        at += size
