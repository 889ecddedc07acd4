"""What a metadata store keeps of one DataFile."""

from __future__ import annotations

import msgspec

from aq_data.models.datafile import DataFile
from aq_data.models.history import Change
from aq_data.models.structs import resolve

__all__ = ["Record"]


class Record(msgspec.Struct, frozen=True):
    """A document with what only the server needs: the blob prefix of its attempt and the digest of the save request.

    `change` is how it came from the revision before: given to what replaces a record, never set on one that is read.
    """

    document: DataFile
    attempt: str
    digest: str
    change: Change | None = None


resolve(Record)
