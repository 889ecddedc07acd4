"""What became of a document: its changes, each with who made it and when, and the way back through them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from aq_data.errors import CorruptionError
from aq_data.models.datafile import TYPED_FIELDS, DataFile, apply_patch
from aq_data.models.difference import Difference, exact_differences, json_of, undo
from aq_data.models.structs import resolve

__all__ = ["Change", "change_between", "rebuilt", "reverted", "shown"]

_TOLD = frozenset({"revision", "updated_at"})


class Change(msgspec.Struct, frozen=True):
    """How a revision came from the one before it.

    `actor` is the user of the token, empty on an open server. `differences` are exact: undone, they give what was before.
    """

    revision: int
    at: str
    actor: str
    differences: tuple[Difference, ...]


def change_between(before: DataFile, after: DataFile, actor: str) -> Change:
    """The change from one revision of a document to the next."""
    old: dict[str, Any] = {}
    new: dict[str, Any] = {}
    for field in DataFile.__struct_fields__:
        one, other = msgspec.json.encode(getattr(before, field)), msgspec.json.encode(getattr(after, field))
        if one != other:  # most are the same, among them a large snapshot
            old[field], new[field] = msgspec.json.decode(one), msgspec.json.decode(other)
    return Change(after.revision, after.updated_at, actor, tuple(exact_differences(old, new)))


def shown(change: Change) -> Change:
    """The change as it is listed: its own revision and time stand once."""
    kept = tuple(difference for difference in change.differences if difference.path not in _TOLD)
    return msgspec.structs.replace(change, differences=kept)


def rebuilt(newest: DataFile, changes: Iterable[Change]) -> DataFile:
    """The document before `changes`, which are the last ones made to it, newest first; exact but for the order of keys."""
    document = json_of(newest)
    try:
        for change in changes:
            document = undo(document, change.differences)
        return msgspec.convert(document, DataFile)
    except (LookupError, TypeError, msgspec.ValidationError) as exc:
        raise CorruptionError(f"the history of DataFile {newest.id} does not fit its document: {exc!r}") from exc


def reverted(current: DataFile, old: DataFile, updated_at: str, keeps: frozenset[str] = frozenset()) -> DataFile:
    """The document with the typed fields and the metadata of an old revision, but for those in `keeps`; a new revision.

    `current` itself when they are the same already. Arrays, files and state are never touched.
    """
    restored = msgspec.structs.replace(current, **{field: getattr(old, field) for field in TYPED_FIELDS - keeps})
    if not change_between(current, restored, "").differences:
        return current
    return apply_patch(restored, {}, updated_at)


resolve(Change)
