r"""The filter language: the familiar MongoDB form, parsed once into a small tree that each store compiles.

    {"chip": "C7"}                                   equality; a bare unknown key means metadata.<key>
    {"instruments.vna.settings.power.value": {"$gte": -40, "$lt": -20}}
    {"$or": [{"flag": "red"}, {"tags": {"$in": ["q3", "q4"]}}], "comment": {"$exists": true}}

Operators: `$eq $ne $gt $gte $lt $lte $in $nin $exists $not` on a path, `$and $or $nor $not` on filters. Path segments
are separated by dots; a dot inside a key is written `\.`. Values compare by type: numbers with numbers, text with text;
equality on a list matches the whole list or any element; null matches null and missing.

What a document is found by are its *terms*: (path, kind, value) triples. Both stores index terms, and `matches` evaluates
a tree over them, so that the three agree.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import msgspec

from aq_data.errors import QueryError, ValidationError
from aq_data.models.datafile import DATE_FIELDS, SERVER_FIELDS, TYPED_FIELDS
from aq_data.models.values import check_value, parse_instant, tag_of

__all__ = [
    "All",
    "Any_",
    "Compare",
    "Exists",
    "Node",
    "Not",
    "SortKey",
    "Term",
    "matches",
    "parse_filter",
    "parse_path",
    "parse_sort",
    "sort_key",
    "terms",
]

MAX_DEPTH = 20
MAX_CLAUSES = 500
MAX_PATH = 500
TEXT_PREFIX = 100
"""Characters of a text value that are indexed for order; longer texts are equal by digest."""

Kind = Literal["number", "nan", "text", "bool", "null", "date", "complex", "whole"]
"""`whole` stands for values known only by a digest: containers, long texts, integers beyond 64 bits, bytes."""

KIND_ORDER: dict[str, int] = {"null": 0, "nan": 1, "number": 2, "text": 3, "complex": 4, "bool": 5, "date": 6}
"""How kinds sort among each other, missing first (with null); `whole` has no order and sorts as missing."""

Operator = Literal["eq", "gt", "gte", "lt", "lte"]

_UNSEARCHED = {"attrs", "path", "format"}


class Term(NamedTuple):
    """One indexed fact of a document: somewhere at `path` stands a value of `kind`."""

    path: str
    kind: Kind
    value: int | float | str | bytes


@dataclass(frozen=True, slots=True)
class Compare:
    """Some term at `path` of `kind` stands in relation `op` to `value`. Orders exist for numbers, texts and dates."""

    path: str
    op: Operator
    kind: Kind
    value: int | float | str | bytes


@dataclass(frozen=True, slots=True)
class Exists:
    """Some term of any kind stands at `path`."""

    path: str


@dataclass(frozen=True, slots=True)
class All:
    """Every child; no child is true."""

    children: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Any_:  # noqa: N801  (`Any` is taken by typing)
    """At least one child; no child is false."""

    children: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The child does not hold."""

    child: Node


Node = Compare | Exists | All | Any_ | Not


@dataclass(frozen=True, slots=True)
class SortKey:
    """One path; documents without it come first, or last when `descending`."""

    path: str
    descending: bool


# --- paths ---------------------------------------------------------------------------------------------------------


def _split(text: str) -> list[str]:
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


def _escape(segment: str) -> str:
    if "." not in segment and "\\" not in segment:
        return segment
    return segment.replace("\\", "\\\\").replace(".", "\\.")


def parse_path(text: str) -> str:
    """The canonical path: typed fields and `metadata.…` as they are, any other first key under `metadata`."""
    if not text or len(text) > MAX_PATH:
        raise QueryError(f"a path needs 1 to {MAX_PATH} characters, not {len(text)}")
    segments = _split(text)
    if segments[0] in _UNSEARCHED:
        raise QueryError(f"{segments[0]!r} is not searched")
    if segments[0] != "metadata" and segments[0] not in TYPED_FIELDS | SERVER_FIELDS:
        segments = ["metadata", *segments]
    return ".".join(_escape(segment) for segment in segments)


# --- values --------------------------------------------------------------------------------------------------------


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _scalar(value: Any, path: str) -> tuple[Kind, int | float | str | bytes] | None:
    """Kind and comparable value of one scalar in tagged JSON; None for containers."""
    if value is None:
        return "null", 0
    if isinstance(value, bool):
        return "bool", int(value)
    if isinstance(value, int):
        return ("number", value) if -(1 << 63) <= value < 1 << 63 else ("whole", _digest(b"n%d" % value))
    if isinstance(value, float):
        return "number", value
    if isinstance(value, str):
        if path in DATE_FIELDS:
            return "date", _microseconds(value, path)
        return ("text", value) if len(value) < TEXT_PREFIX else ("whole", _digest(b"s" + value.encode()))
    tag = tag_of(value)
    if tag == "$float":
        return ("nan", 0) if value["$float"] == "NaN" else ("number", math.inf * (1 if value["$float"][0] == "I" else -1))
    if tag == "$date":
        return "date", _microseconds(value["$date"], path)
    if tag == "$complex":
        return "complex", ",".join(_part(part) for part in value["$complex"])
    if tag in ("$bytes", "$ndarray"):
        return "whole", _digest(tag.encode() + msgspec.json.encode(value[tag], order="deterministic"))
    return None


def _part(part: Any) -> str:
    return part["$float"] if isinstance(part, dict) else repr(float(part) + 0.0)


def _microseconds(text: str, path: str) -> int:
    try:
        instant = parse_instant(text, path)
    except ValidationError as exc:
        raise QueryError(f"{path}: {exc}") from exc
    delta = instant - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86400 + delta.seconds) * 1_000_000 + delta.microseconds


def _token(scalar: tuple[Kind, int | float | str | bytes]) -> bytes:
    """A scalar as bytes from which digests of containers are made: equal values, equal bytes."""
    kind, value = scalar
    if kind == "number" and isinstance(value, float) and value.is_integer():
        value = int(value)  # 2.0 and 2 are one number
    return value if isinstance(value, bytes) else f"{kind}:{value}".encode()


# --- terms ---------------------------------------------------------------------------------------------------------


def terms(document: Mapping[str, Any]) -> list[Term]:
    """Every term of a document in its JSON form (`msgspec.to_builtins`); duplicates may occur.

    Of arrays and files only the names are indexed. Elements of a list stand at the list's own path.
    """
    found: list[Term] = []
    for field, value in document.items():
        if field in ("arrays", "files"):
            found.extend(Term(f"{field}.name", "text", item["name"][:TEXT_PREFIX]) for item in value)
        elif field not in _UNSEARCHED:
            _collect(field, value, found)
    return found


def _collect(path: str, value: Any, found: list[Term] | None) -> bytes:
    """Append the terms of `value` to `found`; bytes that are equal for equal values.

    A container's digest is made from the bytes of its members, so that a document is walked once.
    """
    scalar = _scalar(value, path)
    if scalar is not None:
        if found is not None:
            found.append(Term(path, *scalar))
            if scalar[0] == "whole":
                found.extend(_approximations(path, value))
        return _token(scalar)
    if isinstance(value, list):
        # Elements stand at the list's own path; those of a list within a list only in its digest.
        parts = [_collect(path, item, found if not isinstance(item, list) else None) for item in value]
        if found is not None:
            found.extend(
                Term(path, "whole", part) for part, item in zip(parts, value, strict=True) if isinstance(item, list)
            )
        digest = _digest(b"[" + b"".join(len(part).to_bytes(4) + part for part in parts))
    else:
        inner = value["$literal"] if tag_of(value) == "$literal" else value
        members = sorted((key.encode(), _collect(f"{path}.{_escape(key)}", item, found)) for key, item in inner.items())
        digest = _digest(b"{" + b"".join(len(m).to_bytes(4) + m for member in members for m in member))
    if found is not None:
        found.append(Term(path, "whole", digest))
    return digest


def _approximations(path: str, value: Any) -> Iterator[Term]:
    """What a value known by its digest is ordered by: the beginning of a text, the nearest float of an integer."""
    if isinstance(value, str):
        yield Term(path, "text", value[:TEXT_PREFIX])
    elif isinstance(value, int):
        yield Term(path, "number", math.copysign(math.inf, value) if abs(value) >= 1 << 1023 else float(value))


# --- parsing -------------------------------------------------------------------------------------------------------


def parse_filter(query: Any) -> Node:
    """The tree of a filter in JSON form; QueryError names the operator or the path that is wrong."""
    return _Parser().filter(query, 0)


class _Parser:
    def __init__(self) -> None:
        self.clauses = 0

    def filter(self, query: Any, depth: int) -> Node:
        if not isinstance(query, dict):
            raise QueryError(f"a filter is an object, not {_shown(query)}")
        self.count(depth)
        return _all(self.clause(key, value, depth) for key, value in query.items())

    def count(self, depth: int) -> None:
        self.clauses += 1
        if depth > MAX_DEPTH or self.clauses > MAX_CLAUSES:
            raise QueryError(f"the filter is too large: at most {MAX_CLAUSES} clauses, nested {MAX_DEPTH} deep")

    def clause(self, key: str, value: Any, depth: int) -> Node:
        if not key.startswith("$"):
            return self.conditions(parse_path(key), key, value, depth + 1)
        if key == "$not":
            return Not(self.filter(value, depth + 1))
        if key not in ("$and", "$or", "$nor"):
            raise QueryError(f"unknown operator {key!r}; on filters there are $and, $or, $nor and $not", operator=key)
        if not isinstance(value, list) or not value:
            raise QueryError(f"{key} takes a list of filters, not {_shown(value)}", operator=key)
        children = tuple(self.filter(item, depth + 1) for item in value)
        if key == "$and":
            return _all(children)
        return Any_(children) if key == "$or" else Not(Any_(children))

    def conditions(self, path: str, name: str, value: Any, depth: int) -> Node:
        self.count(depth)
        is_operators = isinstance(value, dict) and value and tag_of(value) is None and all(k.startswith("$") for k in value)
        if not is_operators:
            if isinstance(value, dict) and tag_of(value) is None and any(k.startswith("$") for k in value):
                raise QueryError(f"{name}: operators and keys stand in one object")
            return self.equal(path, name, value)
        return _all(self.condition(path, name, op, operand, depth) for op, operand in value.items())

    def condition(self, path: str, name: str, op: str, operand: Any, depth: int) -> Node:
        if op == "$eq":
            return self.equal(path, name, operand)
        if op == "$ne":
            return Not(self.equal(path, name, operand))
        if op in ("$gt", "$gte", "$lt", "$lte"):
            return self.order(path, name, op, operand)
        if op in ("$in", "$nin"):
            if not isinstance(operand, list):
                raise QueryError(f"{name}: {op} takes a list, not {_shown(operand)}", operator=op)
            self.clauses += len(operand) // 10
            self.count(depth)
            found = Any_(tuple(self.equal(path, name, item) for item in operand))
            return found if op == "$in" else Not(found)
        if op == "$exists":
            if not isinstance(operand, bool):
                raise QueryError(f"{name}: $exists takes true or false, not {_shown(operand)}", operator=op)
            return Exists(path) if operand else Not(Exists(path))
        if op == "$not":
            if not isinstance(operand, dict):
                raise QueryError(f"{name}: $not takes an object of operators, not {_shown(operand)}", operator=op)
            return Not(self.conditions(path, name, operand, depth + 1))
        known = "$eq $ne $gt $gte $lt $lte $in $nin $exists $not"
        raise QueryError(f"{name}: unknown operator {op!r}; there are {known}", operator=op)

    def equal(self, path: str, name: str, value: Any) -> Node:
        kind, comparable = self.operand(path, name, value)
        if kind == "null":
            return Any_((Compare(path, "eq", "null", 0), Not(Exists(path))))
        return Compare(path, "eq", kind, comparable)

    def order(self, path: str, name: str, op: str, operand: Any) -> Node:
        kind, value = self.operand(path, name, operand)
        if kind == "nan":
            # NaN is equal to itself and to nothing else, and neither less nor greater than a number.
            return Compare(path, "eq", "nan", 0) if op in ("$gte", "$lte") else Any_(())
        if isinstance(operand, int) and kind == "whole":
            return Compare(path, _OPERATORS[op], "number", float(operand) if abs(operand) < 1 << 1023 else math.inf)
        if kind not in ("number", "text", "date"):
            limit = f" of fewer than {TEXT_PREFIX} characters" if isinstance(operand, str) else ""
            raise QueryError(f"{name}: {op} takes a number, a text{limit} or a date, not {_shown(operand)}", operator=op)
        return Compare(path, _OPERATORS[op], kind, value)

    def operand(self, path: str, name: str, value: Any) -> tuple[Kind, int | float | str | bytes]:
        try:
            check_value(value, name)
        except ValidationError as exc:
            raise QueryError(str(exc)) from exc
        return _scalar(value, path) or ("whole", _collect(path, value, None))


_OPERATORS: dict[str, Operator] = {"$gt": "gt", "$gte": "gte", "$lt": "lt", "$lte": "lte"}


def _all(nodes: Iterator[Node] | tuple[Node, ...]) -> Node:
    children = tuple(nodes)
    return children[0] if len(children) == 1 else All(children)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def parse_sort(text: str) -> SortKey:
    """`name` ascending, `-name` descending. One path; equal values are ordered by time of saving."""
    descending = text.startswith("-")
    return SortKey(parse_path(text[1:] if descending else text), descending)


# --- evaluation ----------------------------------------------------------------------------------------------------


def matches(node: Node, found: frozenset[Term]) -> bool:
    """Whether a document with these terms is matched: what every store's compiled form must agree with."""
    if isinstance(node, All):
        return all(matches(child, found) for child in node.children)
    if isinstance(node, Any_):
        return any(matches(child, found) for child in node.children)
    if isinstance(node, Not):
        return not matches(node.child, found)
    if isinstance(node, Exists):
        return any(term.path == node.path for term in found)
    return any(t.path == node.path and t.kind == node.kind and _holds(t.value, node.op, node.value) for t in found)


def _holds(left: Any, op: Operator, right: Any) -> bool:
    if op == "eq":
        return bool(left == right)
    if op in ("gt", "gte"):
        return bool(left > right or (op == "gte" and left == right))
    return bool(left < right or (op == "lte" and left == right))


def sort_key(found: frozenset[Term], key: SortKey) -> tuple[int, Any]:
    """(rank of the kind, value) to order by: of several values the least, or the greatest when descending."""
    keys = [
        (KIND_ORDER[term.kind], term.value if term.kind not in ("null", "nan") else 0)
        for term in found
        if term.path == key.path and term.kind in KIND_ORDER
    ]
    if not keys:
        return (0, 0)
    return max(keys) if key.descending else min(keys)


def pack_key(key: tuple[int, Any]) -> str:
    """A sort key as text for a cursor; `unpack_key` reads it back exactly."""
    rank, value = key
    if isinstance(value, float):
        return f"{rank}f{struct.pack('>d', value).hex()}"
    return f"{rank}i{value}" if isinstance(value, int) else f"{rank}s{value}"


def unpack_key(text: str) -> tuple[int, Any]:
    """The key that `pack_key` was given; ValueError for anything else."""
    rank, form, rest = int(text[0]), text[1:2], text[2:]
    if form == "f":
        return rank, struct.unpack(">d", bytes.fromhex(rest))[0]
    if form == "i":
        return rank, int(rest)
    if form == "s":
        return rank, rest
    raise ValueError(text)
