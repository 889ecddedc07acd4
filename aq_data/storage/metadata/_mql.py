"""The only place that writes MQL: what a record looks like in MongoDB, its indexes, filters and pages.

A record is one document of `datafiles` under the DataFile's id:

    revision, deleted, attempt, digest, document    as in `Record`; `document` is JSON bytes
    o                                               its place in order of saving: `created_at`, then the id, as 24 bytes
    s                                               for each path of `SORTED` its sort value and `o`, compared as one
    t                                               its terms: a field for each (path, kind), named by a hash of the two
    by                                              whose write was the last: a caller who got no answer looks here
    barred                                          keys never to be published; it may stand alone before the record
    sweep                                           plan, state and `version` while it has a log; `pending`: work to do

One wildcard index over `t` serves every path, and counts without reading a document (decision 0008). A tombstone has its
terms in `g`, out of its way. Values of one kind are of one BSON type, and lists of them compare as MongoDB's lists do: by
any element, each bound by another one if need be. That is what `models.query.matches` says of terms.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, get_args

import msgspec
from bson import Binary

from aq_data.errors import QueryError
from aq_data.models.query import All, AnyOf, Compare, Exists, Node, Not
from aq_data.models.terms import KIND_ORDER, Kind, SortKey, Term, pack_key, sort_key, unpack_key
from aq_data.models.values import format_instant

__all__ = [
    "BLOCK_INDEXES",
    "INDEXES",
    "SCHEMA_VERSION",
    "TERMS_INDEX",
    "Cursor",
    "alive",
    "compile_filter",
    "distinct_pipeline",
    "is_indexed",
    "order_of",
    "page_pipeline",
    "row_id",
    "row_range",
    "shown",
    "sort_index",
    "sort_values",
    "stored_terms",
    "total_pipeline",
]

SCHEMA_VERSION = 1

SORTED: dict[str, Kind] = {"name": "text", "measured_at": "date", "updated_at": "date", "size": "number"}
"""Paths with an index in sort order, besides `created_at` (`o`) and `id`, and the one kind that their values have."""

TERMS_INDEX = "terms"
INDEXES: list[tuple[str, list[tuple[str, int]], dict[str, Any]]] = [
    (TERMS_INDEX, [("t.$**", 1)], {}),
    ("created_at", [("deleted", 1), ("o", 1)], {}),
    *((path, [("deleted", 1), (f"s.{path}", 1)], {}) for path in SORTED),
    ("pending", [("sweep.pending", 1)], {"partialFilterExpression": {"sweep.pending": True}}),
]
BLOCK_INDEXES: list[tuple[str, list[tuple[str, int]], dict[str, Any]]] = []
"""Blocks are found by `_id`: sweep, attempt and position as one text (`row_range`)."""

KINDS: tuple[Kind, ...] = get_args(Kind)
_OPERATORS = {"eq": "$eq", "gt": "$gt", "gte": "$gte", "lt": "$lt", "lte": "$lte"}
_NOTHING: dict[str, Any] = {"_id": {"$in": []}}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ORDER_BYTES = 24


# --- what is stored ------------------------------------------------------------------------------------------------------


def field_of(path: str, kind: str) -> str:
    """The name under `t` of the values of one kind at one path: 64 bits, so that a thousand million paths may meet once."""
    digest = hashlib.blake2b(f"{kind}:{path}".encode(), digest_size=8).digest()
    return base64.urlsafe_b64encode(digest).decode("ascii").rstrip("=")


def stored_terms(found: Iterable[Term]) -> dict[str, Any]:
    """The field `t` of a record: a value where there is one, a list where there are several."""
    fields: dict[str, list[Any]] = {}
    for term in found:
        fields.setdefault(field_of(term.path, term.kind), []).append(term.value)
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}


def order_of(id: str, created: int) -> Binary:
    """The field `o`: bytes that compare as (`created`, `id`) do; `created` in microseconds since 1970."""
    try:
        position = uuid.UUID(id).bytes
    except ValueError:
        position = hashlib.blake2b(id.encode(), digest_size=16).digest()
    return Binary((created + (1 << 63)).to_bytes(8) + position)


def sort_values(found: frozenset[Term], order: Binary) -> dict[str, Any]:
    """The field `s` of a record."""
    keys = {path: sort_key(found, SortKey(path, False)) for path in SORTED}
    return {path: {"v": value if rank else None, "o": order} for path, (rank, value) in keys.items()}


def row_range(id: str, attempt: str, after: int, through: int | None = None) -> dict[str, Any]:
    """The blocks of a sweep at positions after `after`, up to `through`."""
    return {"_id": {"$gt": row_id(id, attempt, after), "$lte": row_id(id, attempt, through) if through else f"{id}/{attempt}/~"}}


def row_id(id: str, attempt: str, seq: int) -> str:
    return f"{id}/{attempt}/{seq:016}"


# --- filters -------------------------------------------------------------------------------------------------------------


def is_indexed(node: Node) -> bool:
    """Whether what matches has some term, so that the index of terms finds it, and only what is alive."""
    if isinstance(node, All):
        return any(map(is_indexed, node.children))
    if isinstance(node, AnyOf):
        return all(map(is_indexed, node.children))
    return not isinstance(node, Not)


def alive(node: Node, include_deleted: bool) -> dict[str, Any]:
    """The filter for `node` among the records that are alive, or among all."""
    if include_deleted:
        gone = {"$and": [{"deleted": True}, compile_filter(node, "g")]}
        return {"$or": [{"$and": [{"deleted": False}, compile_filter(node)]}, gone]}
    found = compile_filter(node)
    return found if is_indexed(node) else {"$and": [{"deleted": False}, found]}


def compile_filter(node: Node, under: str = "t") -> dict[str, Any]:
    """The filter for a node over the terms under `t`, or under `g`."""
    if isinstance(node, All):
        return {"$and": [compile_filter(child, under) for child in node.children]} if node.children else {}
    if isinstance(node, AnyOf):
        return _compile_any(node, under)
    if isinstance(node, Not):
        return {"$nor": [compile_filter(node.child, under)]}
    if isinstance(node, Exists):
        return {"$or": [{f"{under}.{field_of(node.path, kind)}": {"$exists": True}} for kind in KINDS]}
    return {f"{under}.{field_of(node.path, node.kind)}": {_OPERATORS[node.op]: node.value}}


def _compile_any(node: AnyOf, under: str) -> dict[str, Any]:
    """Alternatives; equalities on one path are one list."""
    equal = [child for child in node.children if isinstance(child, Compare) and child.op == "eq"]
    rest = [child for child in node.children if not (isinstance(child, Compare) and child.op == "eq")]
    parts: list[dict[str, Any]] = []
    for (path, kind), group in groupby(sorted(equal, key=_place), key=_place):
        parts.append({f"{under}.{field_of(path, kind)}": {"$in": [child.value for child in group]}})
    parts += [compile_filter(child, under) for child in rest]
    return {"$or": parts} if parts else _NOTHING


def _place(node: Compare) -> tuple[str, str]:
    return node.path, node.kind


# --- pages ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last row of a page: its sort key and its place in order of saving. The text form is opaque to clients."""

    key: tuple[int, Any]
    order: bytes

    def encode(self, sort: SortKey) -> str:
        """Base64 text that also names the sort it belongs to."""
        parts = [sort.path, sort.descending, pack_key(self.key), self.order.hex()]
        return base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode("ascii").rstrip("=")

    @classmethod
    def decode(cls, text: str, sort: SortKey) -> Cursor:
        """QueryError (`bad_cursor`) unless `text` was made by `encode` for the same sort."""
        try:
            raw = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
            path, descending, key, order = msgspec.json.decode(raw, type=tuple[str, bool, str, str])
            cursor = cls(unpack_key(key), bytes.fromhex(order))
        except (ValueError, IndexError, msgspec.DecodeError) as exc:
            raise QueryError("the cursor is not one that this server gave", code="bad_cursor") from exc
        rank, value = cursor.key
        is_text = rank in (KIND_ORDER["text"], KIND_ORDER["complex"])
        if rank not in KIND_ORDER.values() or is_text != isinstance(value, str) or len(cursor.order) != _ORDER_BYTES:
            raise QueryError("the cursor is not one that this server gave", code="bad_cursor")
        if (path, descending) != (sort.path, sort.descending):
            raise QueryError("the cursor belongs to another sort; repeat the search it came from", code="bad_cursor")
        return cursor

    @classmethod
    def of_row(cls, row: dict[str, Any], sort: SortKey) -> Cursor:
        """The cursor that a row of `page_pipeline` stands for."""
        place = row["place"]
        if sort.path == "created_at":
            return cls((KIND_ORDER["date"], int.from_bytes(place[:8]) - (1 << 63)), place)
        if sort.path == "id":
            return cls((KIND_ORDER["text"], place), row["o"])
        if sort.path not in SORTED:
            return cls((place["r"], place["v"]), place["o"])
        return cls((0, 0) if place["v"] is None else (KIND_ORDER[SORTED[sort.path]], place["v"]), place["o"])

    def place(self, sort: SortKey) -> Any:
        """What the field that a page is sorted by holds in this row."""
        rank, value = self.key
        if sort.path == "created_at":
            return Binary(self.order)
        if sort.path == "id":
            return value
        if sort.path not in SORTED:
            return {"r": rank, "v": value, "o": Binary(self.order)}
        return {"v": value if rank else None, "o": Binary(self.order)}


def sort_index(sort: SortKey) -> str | None:
    """The index in the order of `sort`; None when there is none and what matches has to be sorted."""
    if sort.path == "id":
        return "_id_"
    return sort.path if sort.path == "created_at" or sort.path in SORTED else None


def page_pipeline(
    where: dict[str, Any], sort: SortKey, limit: int, cursor: Cursor | None, include_deleted: bool
) -> list[dict[str, Any]]:
    """Rows (document, place, o) of one page in order. Each sort goes by one field, in which `o` breaks the ties."""
    if sort_index(sort) is None:
        field, computed = "place", [{"$project": {"document": 1, "o": 1, "place": _place_expression(sort, include_deleted)}}]
    else:
        field, computed = {"created_at": "o", "id": "_id"}.get(sort.path, f"s.{sort.path}"), []
    after = [{"$match": {field: {"$lt" if sort.descending else "$gt": cursor.place(sort)}}}] if cursor else []
    return [
        {"$match": where},
        *computed,
        *after,
        {"$sort": {field: -1 if sort.descending else 1}},
        {"$limit": limit},
        {"$project": {"_id": 0, "document": 1, "o": 1, "place": f"${field}"}},
    ]


def _place_expression(sort: SortKey, include_deleted: bool) -> dict[str, Any]:
    """Rank and value by which a record is sorted at any path: of several values the least, or the greatest."""
    best = "$max" if sort.descending else "$min"
    branches = []
    for kind, rank in sorted(KIND_ORDER.items(), key=lambda item: item[1], reverse=sort.descending):
        name = field_of(sort.path, kind)
        value: Any = {"$ifNull": [f"$t.{name}", f"$g.{name}"]} if include_deleted else f"$t.{name}"
        key = {"r": {"$literal": rank}, "v": {best: value}, "o": "$o"}
        branches.append({"case": {"$ne": [{"$type": value}, "missing"]}, "then": key})
    return {"$switch": {"branches": branches, "default": {"r": {"$literal": 0}, "v": {"$literal": 0}, "o": "$o"}}}


def total_pipeline(where: dict[str, Any], limit: int | None) -> list[dict[str, Any]]:
    """How many match, counted no further than `limit`; from the index alone where it can be."""
    return [{"$match": where}, *([{"$limit": limit}] if limit else []), {"$count": "n"}]


# --- distinct values -----------------------------------------------------------------------------------------------------

_DISTINCT: tuple[Kind, ...] = ("bool", "date", "number", "text")


def distinct_pipeline(path: str, where: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """Rows of `_id` (kind k and value v) and the number n of documents, most frequent first."""
    names = {kind: field_of(path, kind) for kind in _DISTINCT}
    some = {"$or": [{f"t.{name}": {"$exists": True}} for name in names.values()]}
    values = [_listed(kind, f"$t.{name}") for kind, name in names.items()]
    return [
        {"$match": {"$and": [some, where]}},
        {"$project": {"_id": 0, "value": {"$concatArrays": values}}},
        {"$unwind": "$value"},
        {"$group": {"_id": "$value", "n": {"$sum": 1}}},
        {"$sort": {"n": -1, "_id.k": 1, "_id.v": 1}},
        {"$limit": limit},
    ]


def _listed(kind: str, value: str) -> dict[str, Any]:
    """The values of one kind as a list, each with its kind."""
    single = {"$cond": [{"$eq": [{"$type": value}, "missing"]}, [], [value]]}
    listed = {"$cond": [{"$isArray": value}, value, single]}
    return {"$map": {"input": listed, "in": {"k": {"$literal": kind}, "v": "$$this"}}}


def shown(kind: str, value: Any) -> object:
    """A term's value as JSON has it."""
    if kind == "bool":
        return bool(value)
    if kind == "date":
        return {"$date": format_instant(_EPOCH + timedelta(microseconds=value))}
    return value
