"""The copy of a document that lies in its Zarr group, beside the blobs."""

from __future__ import annotations

import msgspec

from aq_data.errors import CorruptionError
from aq_data.models.datafile import DataFile
from aq_data.models.structs import resolve

__all__ = ["Copy", "read_copy"]


class Copy(msgspec.Struct, frozen=True):
    id: str
    revision: int
    digest: str
    document: DataFile


class _Attributes(msgspec.Struct, frozen=True):
    aq_data: Copy


class _Group(msgspec.Struct, frozen=True):
    attributes: _Attributes


def read_copy(content: bytes) -> Copy:
    """The copy in a group's `zarr.json`; CorruptionError when there is none."""
    try:
        return msgspec.json.decode(content, type=_Group).attributes.aq_data
    except msgspec.DecodeError as exc:
        raise CorruptionError(f"zarr.json holds no readable metadata copy: {exc}") from exc


resolve(Copy, _Attributes, _Group)
