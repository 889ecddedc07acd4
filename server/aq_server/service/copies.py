"""The copy of a document that lies in its Zarr group, beside the blobs; large instruments of it lie elsewhere."""

from __future__ import annotations

import msgspec

from aq_data.errors import CorruptionError
from aq_data.models.datafile import DataFile
from aq_data.models.snapshots import REFERENCE, joined
from aq_data.models.structs import resolve
from aq_data.storage.arrays.store import ArrayStore

__all__ = ["Copy", "read_copy", "whole_document"]

_NONE = msgspec.Raw(b"{}")


class Copy(msgspec.Struct, frozen=True):
    """`document` is without instruments where there is a `snapshot` (a hash)."""

    id: str
    revision: int
    digest: str
    document: DataFile
    snapshot: str = ""


class _Stored(msgspec.Struct, frozen=True):
    id: str
    revision: int
    digest: str
    document: dict[str, msgspec.Raw]


class _Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    hash: str = msgspec.field(name=REFERENCE)


class _Attributes(msgspec.Struct, frozen=True):
    aq_data: _Stored


class _Group(msgspec.Struct, frozen=True):
    attributes: _Attributes


def read_copy(content: bytes) -> Copy:
    """The copy in a group's `zarr.json`; CorruptionError when there is none."""
    try:
        stored = msgspec.json.decode(content, type=_Group).attributes.aq_data
        snapshot = _reference(stored.document.get("instruments", _NONE))
        fields = {**stored.document, "instruments": _NONE} if snapshot else stored.document
        document = msgspec.json.decode(msgspec.json.encode(fields), type=DataFile)
        return Copy(stored.id, stored.revision, stored.digest, document, snapshot)
    except msgspec.DecodeError as exc:
        raise CorruptionError(f"zarr.json holds no readable metadata copy: {exc}") from exc


def _reference(instruments: msgspec.Raw) -> str:
    try:
        return msgspec.json.decode(instruments, type=_Reference).hash
    except msgspec.ValidationError:
        return ""


async def whole_document(copy: Copy, arrays: ArrayStore) -> DataFile:
    """The document of a copy with its instruments; CorruptionError when their snapshot is missing or damaged."""
    return joined(copy.document, (await arrays.snapshot(copy.snapshot)).content if copy.snapshot else None)


resolve(Copy, _Stored, _Reference, _Attributes, _Group)
