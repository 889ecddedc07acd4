"""Where a page ended: what a cursor says, the same for every store."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from aq_data.errors import QueryError
from aq_data.models.paths import SortKey
from aq_data.models.query import Node
from aq_data.models.terms import KIND_ORDER, pack_key, unpack_key

__all__ = ["Cursor", "mark_of"]


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last row of a page: its sort key and its place among equals, and the total as of the first page.

    The text form is opaque to clients.
    """

    key: tuple[int, Any]
    tie: int | str
    total: int
    total_is_exact: bool

    def encode(self, sort: SortKey, filter: str) -> str:
        """Base64 text that also names the sort and the filter (as of `mark_of`) it belongs to."""
        parts = [sort.path, sort.descending, pack_key(self.key), self.tie, self.total, self.total_is_exact, filter]
        return base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode("ascii").rstrip("=")

    @classmethod
    def decode(cls, text: str, sort: SortKey, filter: str, tie: type[int] | type[str]) -> Cursor:
        """QueryError (`bad_cursor`) unless `text` was made by `encode` for the same search, with a `tie` of that type."""
        try:
            raw = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
            path, descending, key, place, total, is_exact, asked = msgspec.json.decode(
                raw, type=tuple[str, bool, str, int | str, int, bool, str]
            )
            cursor = cls(unpack_key(key), place, total, is_exact)
        except (ValueError, IndexError, msgspec.DecodeError) as exc:
            raise QueryError("the cursor is not one that this server gave", code="bad_cursor") from exc
        rank, value = cursor.key
        is_text = rank in (KIND_ORDER["text"], KIND_ORDER["complex"])
        is_number = isinstance(place, int) and -(1 << 63) <= place < 1 << 63
        if rank not in KIND_ORDER.values() or isinstance(value, str) != is_text or not isinstance(place, tie):
            raise QueryError("the cursor is not one that this server gave", code="bad_cursor")
        if (path, descending) != (sort.path, sort.descending) or not (is_number or isinstance(place, str)) or total < 0:
            raise QueryError("the cursor belongs to another sort; repeat the search it came from", code="bad_cursor")
        if asked != filter:
            raise QueryError("the cursor belongs to another filter; repeat the search it came from", code="bad_cursor")
        return cursor


def mark_of(node: Node, include_deleted: bool) -> str:
    """What tells a filter from every other."""
    return hashlib.blake2b(repr((node, include_deleted)).encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
