"""The only place that writes MQL of searches: filters, pages, totals, distinct values. `_mongo_records` has the fields.

Nearly every node compiles exactly. Elements of lists are not in the index as such, and of very many conditions only the
first are asked: there a filter is an upper bound, all that may match, and what it finds is judged by `models.matching`
(`is_exact`).

What may be found in a snapshot (`_shared`) was looked up there first; the records that have it are found by its hash.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any

from bson import Binary

from aq_data.errors import QueryError
from aq_data.models.matching import outside
from aq_data.models.paths import SortKey
from aq_data.models.query import All, AnyOf, Compare, Element, Exists, Match, Node, Not, Words, nodes_of
from aq_data.models.terms import KIND_ORDER, TEXT_PREFIX, Kind
from aq_data.models.values import format_instant
from aq_data.storage.metadata._mongo_records import (
    LONG,
    ORDER_BYTES,
    SNAPSHOT,
    SORTED,
    TIME_INDEX,
    WORDS,
    created_of,
    field_of,
    is_ranged,
)
from aq_data.storage.metadata._shared import NO_SNAPSHOTS, Shared
from aq_data.storage.metadata.cursors import Cursor

__all__ = [
    "DISTINCT_KINDS",
    "Pipeline",
    "behind",
    "by_day",
    "compile_filter",
    "cursor_of",
    "distinct_pipeline",
    "distinct_snapshots_pipeline",
    "fields_in",
    "is_covered",
    "is_exact",
    "is_indexed",
    "is_point",
    "is_range",
    "page_pipeline",
    "place_of",
    "places_pipeline",
    "selection",
    "shown",
    "sort_index",
    "start_pipeline",
    "total_pipeline",
    "walked",
]

BASE_KINDS: tuple[Kind, ...] = ("number", "text", "null", "bool", "date", "nan", "complex", "whole")
"""Every value has a term of one of these."""
DISTINCT_KINDS: tuple[Kind, ...] = ("bool", "date", "number", "text")

_OPERATORS = {"eq": "$eq", "gt": "$gt", "gte": "$gte", "lt": "$lt", "lte": "$lte"}
WIDE = 60
"""Conditions of one conjunction that MongoDB is asked: its planner takes time with their square (half a second of it for
500, 17 for 3000) and heeds no limit of time."""
FEW = 50
"""Values of one field whose records MongoDB merges in order of time."""
_NOTHING: dict[str, Any] = {"_id": {"$in": []}}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Pipeline = list[dict[str, Any]]

_ROW: dict[str, Any] = {"document": 1, "snapshot": 1, "apart": 1, "o": 1}

# --- filters -------------------------------------------------------------------------------------------------------------


def is_exact(node: Node, shared: Shared = NO_SNAPSHOTS) -> bool:
    """Whether the compiled filter finds what matches and nothing else."""
    return None not in shared.values() and not any(
        isinstance(one, Element) or (isinstance(one, All) and len(_asked(one)) < len(one.children)) for one in nodes_of(node)
    )


def _asked(node: All) -> list[Node]:
    """The first of its conditions, as many as MongoDB is asked."""
    asked: list[Node] = []
    count = 0
    for child in node.children:
        count += sum(1 for _ in nodes_of(child))
        if asked and count > WIDE:
            break
        asked.append(child)
    return asked


def is_indexed(node: Node) -> bool:
    """Whether whatever matches has some term, so that the index leads to it, and to no tombstone."""
    if isinstance(node, All):
        return any(map(is_indexed, _asked(node)))
    if isinstance(node, AnyOf):
        return all(map(is_indexed, node.children))
    if isinstance(node, Element):
        return is_indexed(outside(node.child, node.path))
    return not isinstance(node, Not)


def is_covered(where: dict[str, Any]) -> bool:
    """Whether the index of terms can tell how many match without a look at a document: one field decides."""
    return len(fields_in(where)) == 1


def is_point(where: dict[str, Any]) -> bool:
    """Whether it asks for one value, or for a few, of one field: the index of terms has what is found in order of time."""
    ((field, asked),) = where.items() if len(where) == 1 else (("", {}),)
    return not field.startswith("$") and ("$eq" in asked or 0 < len(asked.get("$in", ())) <= FEW)


def is_range(node: Node) -> bool:
    """Whether it sets bounds, and nothing else, to numbers of one field: the index of days has what is found."""
    asked = [one for one in nodes_of(node) if not isinstance(one, All)]
    bounds = [one for one in asked if isinstance(one, Compare) and one.op != "eq" and is_ranged(one.kind)]
    return 0 < len(bounds) == len(asked) and len({(one.path, one.kind) for one in bounds}) == 1


def by_day(where: Any) -> Any:
    """The filter of a range over `n` instead of `t`."""
    if isinstance(where, list):
        return [by_day(one) for one in where]
    return {
        f"n{key[1:]}" if key.startswith("t.") else key: by_day(value) if key == "$and" else value
        for key, value in where.items()
    }


def fields_in(where: Any) -> frozenset[str]:
    """The fields that decide."""
    if isinstance(where, list):
        return frozenset().union(*map(fields_in, where))
    nested = [fields_in(value) for key, value in where.items() if key.startswith("$")]
    return frozenset(key for key in where if not key.startswith("$")).union(*nested)


def selection(node: Node, include_deleted: bool, shared: Shared = NO_SNAPSHOTS) -> dict[str, Any]:
    """The filter among the records that are alive, or among all."""
    found = compile_filter(node, shared=shared)
    if include_deleted:
        gone = {"$and": [{"deleted": True}, compile_filter(node, "g", shared=shared)]}
        return {"$or": [{"$and": [{"deleted": False}, found]}, gone]}
    return found if is_indexed(node) else walked(found)


def walked(where: dict[str, Any]) -> dict[str, Any]:
    """The same filter for an index in sort order, where tombstones stand apart."""
    return {"$and": [{"deleted": False}, where]} if where else {"deleted": False}


def compile_filter(node: Node, under: str = "t", *, shared: Shared = NO_SNAPSHOTS, is_upper: bool = True) -> dict[str, Any]:
    """The filter for a node over the terms under `t`, or `g`; an upper bound of what matches, or a lower one."""
    if node in shared:
        own, hashes, name = compile_filter(node, under, is_upper=is_upper), shared[node], f"{under}.{SNAPSHOT}"
        if not own:
            return own
        if hashes is None:
            return {"$or": [own, {name: {"$exists": True}}]} if is_upper else own
        return {"$or": [own, {name: {"$in": hashes}}]} if hashes else own
    if isinstance(node, All):
        asked = _asked(node)
        if not is_upper and len(asked) < len(node.children):
            return _NOTHING
        return _all_of([compile_filter(child, under, shared=shared, is_upper=is_upper) for child in asked])
    if isinstance(node, AnyOf):
        return _compile_any(node, under, shared, is_upper)
    if isinstance(node, Not):
        inner = compile_filter(node.child, under, shared=shared, is_upper=not is_upper)
        return _NOTHING if not inner else {} if inner == _NOTHING else {"$nor": [inner]}
    if isinstance(node, Element):
        return compile_filter(outside(node.child, node.path), under) if is_upper else _NOTHING
    if isinstance(node, Exists):
        return {"$or": [{f"{under}.{field_of(node.path, kind)}": {"$exists": True}} for kind in BASE_KINDS]}
    if isinstance(node, Match):
        return _compile_match(node, under)
    if isinstance(node, Words):
        return _all_of([{f"{under}.{WORDS}": {"$regex": f"^{word}"}} for word in node.words])
    return {f"{under}.{field_of(node.path, node.kind)}": {_OPERATORS[node.op]: node.value}}


def _compile_any(node: AnyOf, under: str, shared: Shared, is_upper: bool) -> dict[str, Any]:
    """Alternatives; equalities on one path are one list."""
    equal = [child for child in node.children if isinstance(child, Compare) and child.op == "eq" and child not in shared]
    rest = [child for child in node.children if not (isinstance(child, Compare) and child.op == "eq") or child in shared]
    parts: list[dict[str, Any]] = []
    for (path, kind), group in groupby(sorted(equal, key=_field), key=_field):
        parts.append({f"{under}.{field_of(path, kind)}": {"$in": [child.value for child in group]}})
    parts += [compile_filter(child, under, shared=shared, is_upper=is_upper) for child in rest]
    if {} in parts:
        return {}
    possible = [part for part in parts if part != _NOTHING]
    if len(possible) < 2:
        return possible[0] if possible else _NOTHING
    return {"$or": possible}


def _all_of(parts: list[dict[str, Any]]) -> dict[str, Any]:
    if _NOTHING in parts:
        return _NOTHING
    needed = [part for part in parts if part]
    return {"$and": needed} if needed else {}


def _field(node: Compare) -> tuple[str, Kind]:
    return node.path, node.kind


def _compile_match(node: Match, under: str) -> dict[str, Any]:
    """Short texts are judged in the index; of a long one that holds the beginning, so it is judged whole."""
    name = field_of(node.path, "text")
    pattern = node.pattern
    is_short = rf"\A(?!(?s:.{{{TEXT_PREFIX}}}))"
    short: dict[str, Any] = {f"{under}.{name}": {"$regex": f"{is_short}(?s:.*?)(?:{pattern.pcre})"}}
    prefix = pattern.prefix[: TEXT_PREFIX - 1]
    if prefix:
        short = {"$and": [{f"{under}.{name}": {"$gte": prefix, "$lt": _beyond(prefix)}}, short]}
    whole = {"$and": [{f"{under}.{field_of(node.path, LONG)}": True}, {f"x.{name}": {"$regex": pattern.pcre}}]}
    return {"$or": [short, whole]}


def _beyond(prefix: str) -> str:
    """A text greater than all that begin with `prefix`, and not much greater."""
    return prefix + "\U0010ffff" * 2


# --- pages ---------------------------------------------------------------------------------------------------------------


def sort_index(sort: SortKey) -> str | None:
    """The index in the order of `sort`; None when there is none and what matches has to be sorted."""
    if sort.path in SORTED:
        return sort.path
    return {"created_at": TIME_INDEX, "id": "_id_"}.get(sort.path)


def cursor_of(row: dict[str, Any], sort: SortKey, total: int, is_exact: bool) -> Cursor:
    """The cursor that a row of `page_pipeline` stands for."""
    place, order = row["place"], row["o"].hex()
    if sort.path == "created_at":
        return Cursor((KIND_ORDER["date"], created_of(place)), order, total, is_exact)
    if sort.path == "id":
        return Cursor((KIND_ORDER["text"], place), order, total, is_exact)
    if sort.path in SORTED:
        key = (0, 0) if place["v"] is None else (KIND_ORDER[SORTED[sort.path]], place["v"])
        return Cursor(key, order, total, is_exact)
    return Cursor((place["r"], place["v"]), order, total, is_exact)


def place_of(cursor: Cursor, sort: SortKey) -> Any:
    """What the field that pages are sorted by holds at the cursor. QueryError (`bad_cursor`) for an order nobody gave."""
    rank, value = cursor.key
    try:
        order = Binary(bytes.fromhex(str(cursor.tie)))
    except ValueError:
        order = Binary(b"")
    if len(order) != ORDER_BYTES:
        raise QueryError("the cursor is not one that this server gave", code="bad_cursor")
    if sort.path == "created_at":
        return order
    if sort.path == "id":
        return value
    if sort.path in SORTED:
        return {"v": value if rank else None, "o": order}
    return {"r": rank, "v": value, "o": order}


def page_pipeline(where: dict[str, Any], sort: SortKey, after: Any, limit: int | None, include_deleted: bool) -> Pipeline:
    """Rows (document, snapshot, place, o) in order, behind the place `after`.

    One field is sorted by, in which `o` breaks the ties; with `c` before it where that is `o` itself.
    """
    field, direction = _sort_field(sort), -1 if sort.descending else 1
    computed: Pipeline = []
    if sort_index(sort) is None:
        computed = [{"$project": {**_ROW, "place": _place(sort, include_deleted)}}]
    return [
        {"$match": where},
        *computed,
        *([{"$match": behind(sort, after)}] if after is not None else []),
        {"$sort": {"c": direction, field: direction} if field == "o" else {field: direction}},
        *([{"$limit": limit}] if limit else []),
        {"$project": {**_ROW, "place": f"${field}"}},
    ]


def behind(sort: SortKey, after: Any) -> dict[str, Any]:
    """The filter for what comes behind a place."""
    field, than = _sort_field(sort), "$lt" if sort.descending else "$gt"
    found = {field: {than: after}}
    return {"c": {f"{than}e": created_of(after)}, **found} if field == "o" else found


def start_pipeline(where: dict[str, Any], sort: SortKey, limit: int, counted: int) -> Pipeline:
    """One row: how many match, counted no further than `counted`, and `top`, (place, o) of the first `limit` of these.

    The documents that match are read once. There is no row where nothing matches.
    """
    field = _sort_field(sort)
    computed = {field: 1} if sort_index(sort) else {"place": _place(sort, False)}
    order = {field: -1 if sort.descending else 1}
    top = {"n": limit, "sortBy": order, "output": {"place": f"${field}", "o": "$o"}}
    return [
        {"$match": where},
        {"$limit": counted},
        {"$project": {"o": 1, **computed}},
        {"$group": {"_id": None, "n": {"$sum": 1}, "top": {"$topN": top}}},
    ]


def _sort_field(sort: SortKey) -> str:
    if sort_index(sort) is None:
        return "place"
    return {"created_at": "o", "id": "_id"}.get(sort.path, f"s.{sort.path}")


def places_pipeline(where: dict[str, Any], sort: SortKey, include_deleted: bool, whole: bool) -> Pipeline:
    """Rows (snapshot, place, o, the document if `whole`) in no order; the place is that outside of the snapshot."""
    fields = {
        "snapshot": 1,
        "o": 1,
        "place": _place(sort, include_deleted),
        **({"document": 1, "apart": 1} if whole else {}),
    }
    return [{"$match": where}, {"$project": fields}]


def _place(sort: SortKey, include_deleted: bool) -> dict[str, Any]:
    """Rank and value by which a record is sorted at any path: of several values the least, or the greatest."""
    best = "$max" if sort.descending else "$min"
    branches = []
    for kind, rank in sorted(KIND_ORDER.items(), key=lambda item: item[1], reverse=sort.descending):
        name = field_of(sort.path, kind)
        value: Any = {"$ifNull": [f"$t.{name}", f"$g.{name}"]} if include_deleted else f"$t.{name}"
        place = {"r": {"$literal": rank}, "v": {best: value}, "o": "$o"}
        branches.append({"case": {"$ne": [{"$type": value}, "missing"]}, "then": place})
    return {"$switch": {"branches": branches, "default": {"r": {"$literal": 0}, "v": {"$literal": 0}, "o": "$o"}}}


def total_pipeline(where: dict[str, Any], limit: int | None) -> Pipeline:
    """How many match, counted no further than `limit`; from the index alone where one condition decides."""
    return [{"$match": where}, *([{"$limit": limit}] if limit else []), {"$count": "n"}]


# --- distinct values -----------------------------------------------------------------------------------------------------


def distinct_pipeline(path: str, where: dict[str, Any], limit: int | None) -> Pipeline:
    """Rows of `_id` (kind k and value v) and the number n of documents, most frequent first."""
    names = {kind: field_of(path, kind) for kind in DISTINCT_KINDS}
    some = {"$or": [{f"t.{name}": {"$exists": True}} for name in names.values()]}
    return [
        {"$match": {"$and": [some, where]}},
        {"$project": {"_id": 0, "value": {"$concatArrays": [_listed(kind, f"$t.{name}") for kind, name in names.items()]}}},
        {"$unwind": "$value"},
        {"$group": {"_id": "$value", "n": {"$sum": 1}}},
        {"$sort": {"n": -1, "_id.k": 1, "_id.v": 1}},
        *([{"$limit": limit}] if limit else []),
    ]


def distinct_snapshots_pipeline(where: dict[str, Any]) -> Pipeline:
    """Rows of `_id` (the hash of a snapshot) and the number n of documents that have it."""
    some = {f"t.{SNAPSHOT}": {"$exists": True}}
    return [{"$match": {"$and": [some, where]}}, {"$group": {"_id": f"$t.{SNAPSHOT}", "n": {"$sum": 1}}}]


def _listed(kind: Kind, value: str) -> dict[str, Any]:
    """The values of one kind as a list, each with its kind."""
    single = {"$cond": [{"$eq": [{"$type": value}, "missing"]}, [], [value]]}
    listed = {"$cond": [{"$isArray": value}, value, single]}
    return {"$map": {"input": listed, "in": {"k": {"$literal": kind}, "v": "$$this"}}}


def shown(kind: Kind, value: Any) -> object:
    """A term's value as JSON has it."""
    if kind == "bool":
        return bool(value)
    if kind == "date":
        return {"$date": format_instant(_EPOCH + timedelta(microseconds=value))}
    if value in (math.inf, -math.inf):
        return {"$float": "Infinity" if value > 0 else "-Infinity"}
    return value
