r"""The filter language: the familiar MongoDB form, parsed once into a small tree that each store compiles.

    {"chip": "C7"}                                   equality; a bare unknown key means metadata.<key>
    {"instruments.vna.settings.power.value": {"$gte": -40, "$lt": -20}}
    {"$or": [{"flag": "red"}, {"tags": {"$in": ["q3", "q4"]}}], "comment": {"$exists": true}}

Operators: `$eq $ne $gt $gte $lt $lte $in $nin $exists $not` on a path, `$and $or $nor $not` on filters. Path segments
are separated by dots; a dot inside a key is written `\.`. Values compare by type: numbers with numbers, text with text;
equality on a list matches the whole list or any element; null matches null and missing.

A tree speaks of a document's terms (`models.terms`): stores compile it over their index of terms, and `matches` evaluates it
over a set of them, so that all agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from aq_data.errors import QueryError, ValidationError
from aq_data.models.terms import TEXT_PREFIX, Kind, Term, comparable, nearest_float, parse_path
from aq_data.models.values import check_value, tag_of

__all__ = ["All", "AnyOf", "Compare", "Exists", "Node", "Not", "matches", "parse_filter"]

MAX_DEPTH = 12
MAX_CLAUSES = 500

Operator = Literal["eq", "gt", "gte", "lt", "lte"]


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
class AnyOf:
    """At least one child; no child is false."""

    children: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Not:
    """The child does not hold."""

    child: Node


Node = Compare | Exists | All | AnyOf | Not


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
            raise QueryError(f"unknown operator {key[:40]!r}; on filters there are $and, $or, $nor and $not", operator=key)
        if not isinstance(value, list) or not value:
            raise QueryError(f"{key} takes a list of filters, not {_shown(value)}", operator=key)
        children = tuple(self.filter(item, depth + 1) for item in value)
        if key == "$and":
            return _all(children)
        return AnyOf(children) if key == "$or" else Not(AnyOf(children))

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
            alternatives = dict.fromkeys(
                node
                for item in operand
                for equal in [self.equal(path, name, item)]
                for node in (equal.children if isinstance(equal, AnyOf) else (equal,))
            )
            found = AnyOf(tuple(alternatives))
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
        raise QueryError(f"{name[:80]}: unknown operator {op[:40]!r}; there are {known}", operator=op)

    def equal(self, path: str, name: str, value: Any) -> Node:
        kind, comparable = self.operand(path, name, value)
        if kind == "null":
            return AnyOf((Compare(path, "eq", "null", 0), Not(Exists(path))))
        return Compare(path, "eq", kind, comparable)

    def order(self, path: str, name: str, op: str, operand: Any) -> Node:
        kind, value = self.operand(path, name, operand)
        if kind == "nan":
            # NaN is equal to itself and to nothing else, and neither less nor greater than a number.
            return Compare(path, "eq", "nan", 0) if op in ("$gte", "$lte") else AnyOf(())
        if isinstance(operand, (int, float)) and kind == "whole":
            return Compare(path, _OPERATORS[op], "number", nearest_float(operand))
        if kind not in ("number", "text", "date"):
            limit = f" of fewer than {TEXT_PREFIX} characters" if isinstance(operand, str) else ""
            raise QueryError(f"{name}: {op} takes a number, a text{limit} or a date, not {_shown(operand)}", operator=op)
        return Compare(path, _OPERATORS[op], kind, value)

    def operand(self, path: str, name: str, value: Any) -> tuple[Kind, int | float | str | bytes]:
        try:
            check_value(value, name)
        except ValidationError as exc:
            raise QueryError(str(exc)) from exc
        return comparable(value, path)


_OPERATORS: dict[str, Operator] = {"$gt": "gt", "$gte": "gte", "$lt": "lt", "$lte": "lte"}


def _all(nodes: Iterator[Node] | tuple[Node, ...]) -> Node:
    children = tuple(nodes)
    return children[0] if len(children) == 1 else All(children)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def matches(node: Node, found: frozenset[Term]) -> bool:
    """Whether a document with these terms is matched: what every store's compiled form must agree with."""
    if isinstance(node, All):
        return all(matches(child, found) for child in node.children)
    if isinstance(node, AnyOf):
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
