"""Snapshots: the instruments of a measurement, kept apart where they are large, for the next one often has the same.

Equal are those whose JSON is equal byte by byte. A document without its instruments and its snapshot together say what the
whole document says; no path leads into both.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from aq_data.models.datafile import DataFile

__all__ = [
    "REFERENCE",
    "SNAPSHOT_BYTES",
    "Snapshot",
    "joined",
    "joined_json",
    "separated",
    "snapshot_document",
    "snapshot_hash",
]

SNAPSHOT_BYTES = 16 << 10
"""Instruments of at least so many bytes of JSON are kept apart: a few pages of a database. What is smaller costs less than
the look-ups that would save it."""

REFERENCE = "$snapshot"
"""The key beside which, in place of instruments, the hash of a snapshot stands; those of a client are never a text."""

_FIELD = "instruments"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`content` is the JSON of the instruments, `hash` its SHA-256: `sha256sum` on a stored snapshot proves it."""

    hash: str
    content: bytes


def snapshot_hash(content: bytes) -> str:
    """The name of a snapshot."""
    return hashlib.sha256(content).hexdigest()


def separated(document: DataFile) -> tuple[DataFile, Snapshot | None]:
    """The document without its instruments, and these; where they are small the document as it is, and None."""
    content = msgspec.json.encode(document.instruments) if document.instruments else b""
    if not content or len(content) < SNAPSHOT_BYTES:
        return document, None
    return msgspec.structs.replace(document, instruments={}), Snapshot(snapshot_hash(content), content)


def joined(document: DataFile, content: bytes | None) -> DataFile:
    """The whole document again."""
    if content is None:
        return document
    return msgspec.structs.replace(document, instruments=msgspec.json.decode(content, type=dict[str, dict[str, Any]]))


def joined_json(document: bytes, content: bytes | None) -> msgspec.Raw:
    """As `joined`, from and to JSON; neither part is decoded."""
    if content is None:
        return msgspec.Raw(document)
    fields = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
    return msgspec.Raw(msgspec.json.encode({**fields, _FIELD: msgspec.Raw(content)}))


def snapshot_document(content: bytes) -> dict[str, Any]:
    """What a snapshot adds to the documents that have it, in their JSON form: all that is found by is found in here."""
    return {_FIELD: msgspec.json.decode(content)}
