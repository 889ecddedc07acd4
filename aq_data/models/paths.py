r"""Paths into a document: segments separated by dots, a backslash before a character takes it as it is.

    instruments.vna.settings.power.value     metadata.a\.b (the key "a.b")     \$x (the key "$x")

`@` is the root of a path inside an element of a list (`$elemMatch`), which no document's first key can be.
"""

from __future__ import annotations

from dataclasses import dataclass

from aq_data.errors import QueryError
from aq_data.models.datafile import SERVER_FIELDS, TYPED_FIELDS

__all__ = [
    "ELEMENT",
    "MAX_PATH",
    "UNSEARCHED",
    "SortKey",
    "escape_segment",
    "join_path",
    "parse_path",
    "parse_relative_path",
    "parse_sort",
    "path_segments",
]

MAX_PATH = 500
ELEMENT = "@"
UNSEARCHED = frozenset({"attrs", "path", "format"})
"""Fields that are kept and shown, and not searched."""


@dataclass(frozen=True, slots=True)
class SortKey:
    """One path; documents without it come first, or last when `descending`."""

    path: str
    descending: bool


def path_segments(text: str) -> list[str]:
    """The keys of a dotted path, escapes undone. QueryError for a lone backslash at the end."""
    segments, current, escaped = [], "", False
    for ch in text:
        if escaped:
            current, escaped = current + ch, False
        elif ch == "\\":
            escaped = True
        elif ch == ".":
            segments.append(current)
            current = ""
        else:
            current += ch
    if escaped:
        raise QueryError(f"path {text[:80]!r} ends in a backslash; write \\\\ for a backslash in a key")
    return [*segments, current]


def escape_segment(segment: str) -> str:
    """A key as a segment of a canonical path."""
    if "." not in segment and "\\" not in segment:
        return segment
    return segment.replace("\\", "\\\\").replace(".", "\\.")


def join_path(segments: list[str]) -> str:
    """The canonical path of these keys."""
    return ".".join(map(escape_segment, segments))


def parse_path(text: str) -> str:
    """The canonical path: typed fields and `metadata.…` as they are, any other first key under `metadata`."""
    segments = _checked_segments(text)
    if segments[0] in UNSEARCHED:
        raise QueryError(f"{segments[0]!r} is not searched")
    if segments[0] != "metadata" and segments[0] not in TYPED_FIELDS | SERVER_FIELDS:
        segments = ["metadata", *segments]
    return join_path(segments)


def parse_relative_path(text: str) -> str:
    """The canonical path inside an element of a list."""
    return f"{ELEMENT}.{join_path(_checked_segments(text))}"


def _checked_segments(text: str) -> list[str]:
    if not text or len(text) > MAX_PATH:
        raise QueryError(f"path {text[:40]!r} has {len(text)} characters; it needs 1 to {MAX_PATH}")
    return path_segments(text)


def parse_sort(text: str) -> SortKey:
    """`name` ascending, `-name` descending. One path; equal values are ordered by time of saving."""
    descending = text.startswith("-")
    return SortKey(parse_path(text[1:] if descending else text), descending)
