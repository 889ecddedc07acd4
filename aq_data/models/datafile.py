"""The DataFile document: typed fields everyone needs, free metadata, and what the server adds.

Times are RFC 3339 text in UTC with microseconds, so that they sort as text; free metadata is tagged JSON (`values`).
"""

from __future__ import annotations

import re
import uuid
from typing import Any, Literal

import msgspec

from aq_data.errors import ConflictError, ValidationError
from aq_data.models.arrays import ArrayInfo, NewArray, check_arrays
from aq_data.models.stores import DEFAULT_STORE
from aq_data.models.structs import resolve
from aq_data.models.values import check_value, format_instant, parse_instant, tag_of

__all__ = [
    "FORMAT",
    "SERVER_FIELDS",
    "TRANSITIONS",
    "TYPED_FIELDS",
    "DataFile",
    "DataFileId",
    "FileInfo",
    "Kind",
    "NewDataFile",
    "SweepInfo",
    "apply_patch",
    "check_document",
    "check_file_name",
    "check_id",
    "check_new",
    "make_id",
    "next_state",
]

DataFileId = str
"""A UUIDv7 in its canonical lower-case text form."""

State = Literal["open", "complete", "abandoned", "archived", "deleted"]
Kind = Literal["measurement", "mask", "em_simulation", "generic"]
Flag = Literal["none", "orange", "red", "purple", "blue", "yellow", "green", "gray"]

FORMAT = 1
"""Version of the form of documents that this program writes, and the newest it reads."""

TRANSITIONS: dict[str, dict[str, State]] = {
    "open": {"finish": "complete", "abandon": "abandoned", "delete": "deleted"},
    "complete": {"archive": "archived", "delete": "deleted"},
    "abandoned": {"delete": "deleted"},
    "archived": {"activate": "complete", "delete": "deleted"},
    "deleted": {},
}
"""State, step, next state. A step that is not here raises and changes nothing."""


def next_state(state: str, step: str) -> State:
    """The state after `step`; ConflictError (`illegal_state`) when the table has none."""
    try:
        return TRANSITIONS[state][step]
    except KeyError:
        raise ConflictError(f"a DataFile that is {state} cannot {step}", code="illegal_state", state=state) from None


class FileInfo(msgspec.Struct, frozen=True):
    """An attached file. `name` is the client's and never a path; `key` is the server's; `sha256` is of the content."""

    name: str
    size: int
    content_type: str
    sha256: str
    key: str


class SweepInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the document of a sweep says beyond that of a saved DataFile.

    `planned`: expected lengths of dims that grow. `reason`: why it was abandoned. While the sweep is open every answer
    carries `head` (blocks so far), `last_block_at` and `stale` (silent for longer than the server's limit).
    """

    planned: dict[str, int] = {}
    notify: tuple[str, ...] = ()
    reason: str = ""
    head: int = 0
    last_block_at: str | None = None
    stale: bool = False


class Typed(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The typed fields a client sets, with the defaults an absent field has."""

    kind: Kind = "measurement"
    name: str = ""
    description: str = ""
    user: str = ""
    project: str = ""
    station: str = ""
    device: dict[str, Any] = {}
    instruments: dict[str, dict[str, Any]] = {}
    tags: list[str] = []
    flag: Flag = "none"
    starred: bool = False
    comment: str = ""
    measured_at: str | None = None
    cooldown: str | None = None
    derived_from: list[str] = []
    identifiers: dict[str, str] = {}
    pid: str | None = None
    attrs: dict[str, Any] = {}
    """The dataset's own attributes: not searched, kept exactly."""
    metadata: dict[str, Any] = {}
    """Free JSON, as searchable as the typed fields."""


class NewDataFile(Typed, kw_only=True, forbid_unknown_fields=True):
    """What a client sends to save; `id` makes a retry harmless and is made by the server when absent.

    `store` names where the blobs are to lie. It is no content: a retry may name another and changes nothing.
    """

    id: str | None = None
    store: str | msgspec.UnsetType = msgspec.UNSET
    arrays: tuple[NewArray, ...] = ()


class DataFile(Typed, kw_only=True, forbid_unknown_fields=True):
    """The whole document. `revision` counts changes from 1; `size` is the bytes of all arrays and files."""

    id: DataFileId
    state: State
    revision: int
    created_at: str
    updated_at: str
    finished_at: str | None = None
    size: int = 0
    arrays: tuple[ArrayInfo, ...] = ()
    files: tuple[FileInfo, ...] = ()
    sweep: SweepInfo | None = None
    """Present when it was measured as a sweep."""
    intended_store: str | None = None
    """The store that is to have the blobs, while they wait elsewhere because it did not answer when they came."""
    path: str = ""
    """Where `arrays.zarr` lies: kept is its key in the store, answered the folder path or bucket address that any Zarr
    reader takes (models.placing)."""
    store: str = DEFAULT_STORE
    """Name of the store that has the blobs."""
    format: int = FORMAT
    """Version of this document's form."""


TYPED_FIELDS: frozenset[str] = frozenset(f.name for f in msgspec.structs.fields(Typed))
SERVER_FIELDS: frozenset[str] = frozenset(f.name for f in msgspec.structs.fields(DataFile)) - TYPED_FIELDS
DATE_FIELDS: frozenset[str] = frozenset({"measured_at", "cooldown", "created_at", "updated_at", "finished_at"})

_UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def make_id(unix_ms: int, entropy: bytes) -> DataFileId:
    """A UUIDv7 (RFC 9562 section 5.7) from a time in milliseconds and 10 random bytes: ids sort by time of making."""
    random = int.from_bytes(entropy[:10], "big")
    value = (unix_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | (random >> 68 & 0xFFF) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    return str(uuid.UUID(int=value))


def check_id(text: str) -> DataFileId:
    """The canonical form of a client's id; ValidationError unless it is a UUIDv7."""
    canonical = text.lower()
    if not _UUID7.fullmatch(canonical):
        raise ValidationError(f"id {text[:60]!r} is not a UUIDv7", code="invalid")
    return canonical


def is_id(text: str) -> bool:
    """Whether `text` is an id in canonical form."""
    return _UUID7.fullmatch(text) is not None


def check_document(document: DataFile) -> DataFile:
    """A document that came from elsewhere than this program, checked and normalised as a new one is."""
    for field in ("created_at", "updated_at", "finished_at"):
        text = getattr(document, field)
        if text is not None:
            parse_instant(text, field)
    return msgspec.structs.replace(document, **_checked_fields(document))


def check_new(new: NewDataFile) -> NewDataFile:
    """The document normalised (dates in UTC, id canonical), or ValidationError naming the field; stores nothing."""
    check_arrays(new.arrays)
    changes: dict[str, Any] = {} if new.id is None else {"id": check_id(new.id)}
    return msgspec.structs.replace(new, **_checked_fields(new), **changes)


def _checked_fields(typed: Typed) -> dict[str, Any]:
    if "aq_data" in typed.attrs:
        raise ValidationError("the attribute 'aq_data' is reserved; rename it")
    for field in ("metadata", "device", "instruments", "identifiers", "attrs"):
        value = getattr(typed, field)
        if tag_of(value) not in (None, "$literal"):
            raise ValidationError(f"{field} takes an object, not a tagged value")
        check_value(value, field)
    changes: dict[str, Any] = {}
    for field in ("measured_at", "cooldown"):
        text = getattr(typed, field)
        if text is not None:
            changes[field] = format_instant(parse_instant(text, field))
    changes["tags"] = list(dict.fromkeys(typed.tags))
    try:
        changes["derived_from"] = [check_id(other) for other in typed.derived_from]
    except ValidationError as exc:
        raise ValidationError(f"derived_from takes ids of DataFiles: {exc}") from exc
    return changes


def check_file_name(name: str) -> None:
    """Refuse the name of an attached file that could not be one segment of an address."""
    if name in ("", ".", "..") or len(name.encode("utf-8", "replace")) > 255 or any(c in "/\\" or ord(c) < 32 for c in name):
        raise ValidationError(
            f"file name {name[:80]!r} cannot be used: 1 to 255 bytes without slashes and control characters", code="bad_name"
        )


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: objects merge key by key, null deletes, everything else replaces. A tagged value is one value.

    A user's own dict that looks like one, or comes to, is an object, and marked so.
    """
    changes = _as_object(patch)
    if changes is None:
        return patch
    merged = dict(_as_object(target) or {})
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return {"$literal": merged} if tag_of(merged) else merged


def _as_object(value: Any) -> dict[str, Any] | None:
    tag = tag_of(value)
    inner = value["$literal"] if tag == "$literal" else value
    return inner if isinstance(inner, dict) and tag in (None, "$literal") else None


def apply_patch(current: DataFile, patch: dict[str, Any], updated_at: str) -> DataFile:
    """The document after a merge patch: revision one higher. Null on a typed field restores its default.

    Raises ValidationError for fields that do not exist or that only the server sets, ConflictError (`finished`) for
    `arrays`, whose values never change once stored.
    """
    for key in patch:
        if key == "arrays":
            raise ConflictError(
                "finished arrays never change; save a new DataFile with derived_from naming this one", code="finished"
            )
        if key in SERVER_FIELDS:
            raise ValidationError(f"{key!r} is set by the server; it cannot be patched")
        if key not in TYPED_FIELDS:
            raise ValidationError(f"there is no field {key!r}; free settings go under 'metadata'")
    before = msgspec.to_builtins(current)
    merged = merge_patch(before, patch)
    try:
        after = msgspec.convert(merged, DataFile, strict=True)
    except msgspec.ValidationError as exc:
        raise ValidationError(f"the patch does not fit the document: {exc}") from exc
    checked = _checked_fields(after)
    return msgspec.structs.replace(after, **checked, revision=current.revision + 1, updated_at=updated_at)


resolve(FileInfo, SweepInfo, Typed, NewDataFile, DataFile)
