r"""The filter language: the familiar MongoDB form, parsed once into a small tree that each store compiles.

    {"chip": "C7"}                                   equality; a bare unknown key means metadata.<key>
    {"instruments.vna.settings.power.value": {"$gte": -40, "$lt": -20}}
    {"$or": [{"flag": "red"}, {"tags": {"$in": ["q3", "q4"]}}], "comment": {"$exists": true}}

Operators: `$eq $ne $gt $gte $lt $lte $in $nin $all $exists $regex $size $elemMatch $not` on a path, `$and $or $nor $not` on
filters, and `$text`. Path segments are separated by dots; a dot in a key is written `\.`, a dollar at its beginning `\$`.
Values compare by type: numbers with numbers, text with text; equality on a list matches the whole list or any element; null
matches null and missing. At a path that ends in `value` a text such as "20 mK" stands for a quantity. docs/filters.md has
the grammar.

A tree speaks of a document's terms (`models.terms`), texts and words: stores compile it over their index of them, and
`models.matching` evaluates it over one document, so that all agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

from aq_data.errors import QueryError, ValidationError
from aq_data.models.datafile import DATE_FIELDS
from aq_data.models.paths import ELEMENT, parse_path, parse_relative_path, path_segments
from aq_data.models.patterns import Pattern, parse_pattern
from aq_data.models.terms import TEXT_PREFIX, Kind, comparable, nearest_float, terms_at
from aq_data.models.units import QUANTITY, Quantity, parse_quantity
from aq_data.models.values import check_value, tag_of
from aq_data.models.words import parse_words

__all__ = [
    "All",
    "AnyOf",
    "Compare",
    "Element",
    "Exists",
    "Match",
    "Node",
    "Not",
    "Words",
    "check_dimension",
    "looked_for",
    "nodes_of",
    "parse_filter",
    "quantities_of",
]

MAX_DEPTH = 12
MAX_CLAUSES = 500
MEMBERS = 4
"""Of an object that is to be equal so many members are compared, too."""
MAX_PLACE = 200
"""Characters of a place inside a query that an error tells."""

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
class Match:
    """The pattern is found in some text at `path`, whole texts of any length."""

    path: str
    pattern: Pattern


@dataclass(frozen=True, slots=True)
class Element:
    """Some element of a list at `path` is matched by the child, whose paths begin with `@`."""

    path: str
    child: Node


@dataclass(frozen=True, slots=True)
class Words:
    """Every one of these folded words is the beginning of a word of the document."""

    words: tuple[str, ...]


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


Node = Compare | Exists | Match | Element | Words | All | AnyOf | Not


def parse_filter(query: Any, text: str | None = None) -> Node:
    """The tree of a filter in JSON form, and of words that are looked for besides.

    QueryError begins with the place in the filter, as in `$or[0].a: $in takes a list, not 5`, and has it in its details as
    `path`; without one it is about the outermost filter, or about `text`.
    """
    parser = _Parser()
    try:
        node = parser.filter(query, 0)
    except QueryError as exc:
        if not parser.steps:
            raise
        place = _place(parser.steps)
        raise QueryError(f"{place}: {exc}", code=exc.code, path=place, **exc.details) from exc
    return node if text is None else All((node, Words(parse_words(text))))


def looked_for(node: Node) -> tuple[str, ...]:
    """The words that are looked for anywhere in a filter, each once."""
    return tuple(dict.fromkeys(word for one in nodes_of(node) if isinstance(one, Words) for word in one.words))


def nodes_of(node: Node) -> Iterator[Node]:
    """The node and everything below it, not entering elements of lists."""
    yield node
    if isinstance(node, (All, AnyOf)):
        for child in node.children:
            yield from nodes_of(child)
    elif isinstance(node, Not):
        yield from nodes_of(node.child)


def quantities_of(node: Node) -> Iterator[Compare]:
    """Every comparison with a quantity, those inside of elements at the path that their values have in a document.

    Left out are elements of a list within a list, whose values have none there.
    """
    for one in nodes_of(node):
        if isinstance(one, Compare) and one.kind.startswith(QUANTITY):
            yield one
        elif isinstance(one, Element) and one.path != ELEMENT:
            for inner in quantities_of(one.child):
                yield replace(inner, path=one.path + inner.path.removeprefix(ELEMENT))


def check_dimension(node: Compare, kinds: Iterable[str]) -> None:
    """QueryError when quantities stand at the path, `kinds` of terms all, and none has the dimension asked for."""
    stored = sorted(kind.removeprefix(QUANTITY) for kind in kinds if kind.startswith(QUANTITY))
    wanted = node.kind.removeprefix(QUANTITY)
    if node.kind.startswith(QUANTITY) and stored and wanted not in stored:
        raise QueryError(f"{node.path} is measured in {' or '.join(stored)}; it cannot be compared with {wanted}")


class _Parser:
    """`in_element`: paths are those of an element of a list. `steps` lead to what is being read, or to the error."""

    def __init__(self) -> None:
        self.clauses = 0
        self.in_element = False
        self.steps: list[str] = []

    @contextmanager
    def at(self, step: str) -> Iterator[None]:
        self.steps.append(step)
        yield
        self.steps.pop()  # not when an error passes: it is told by where the steps have come to

    def filter(self, query: Any, depth: int) -> Node:
        if not isinstance(query, dict):
            raise QueryError(f"a filter is an object, not {_shown(query)}")
        self.count(depth)
        return _all(self.clause(key, value, depth) for key, value in query.items())

    def filter_at(self, step: str, query: Any, depth: int) -> Node:
        with self.at(step):
            return self.filter(query, depth)

    def count(self, depth: int) -> None:
        self.clauses += 1
        if depth > MAX_DEPTH or self.clauses > MAX_CLAUSES:
            raise QueryError(f"the filter is too large: at most {MAX_CLAUSES} clauses, nested {MAX_DEPTH} deep")

    def clause(self, key: str, value: Any, depth: int) -> Node:
        if not key.startswith("$"):
            path = parse_relative_path(key) if self.in_element else parse_path(key)
            with self.at(key):
                return self.conditions(path, value, depth + 1)
        if key == "$not":
            return Not(self.filter_at(key, value, depth + 1))
        if key == "$text" and not self.in_element:
            return self.text(value)
        if key not in ("$and", "$or", "$nor"):
            raise QueryError(
                f"unknown operator {key[:40]!r}; on filters there are $and, $or, $nor, $not and $text", operator=key
            )
        if not isinstance(value, list) or not value:
            raise QueryError(f"{key} takes a list of filters, not {_shown(value)}", operator=key)
        children = tuple(self.filter_at(f"{key}[{i}]", item, depth + 1) for i, item in enumerate(value))
        if key == "$and":
            return _all(children)
        return AnyOf(children) if key == "$or" else Not(AnyOf(children))

    def text(self, value: Any) -> Node:
        if not isinstance(value, str):
            raise QueryError(f"$text takes a text, not {_shown(value)}", operator="$text")
        words = parse_words(value)
        self.clauses += len(words)
        self.count(0)
        return Words(words)

    def conditions(self, path: str, value: Any, depth: int) -> Node:
        self.count(depth)
        is_operators = isinstance(value, dict) and value and tag_of(value) is None and all(k.startswith("$") for k in value)
        if not is_operators:
            if isinstance(value, dict) and tag_of(value) is None and any(k.startswith("$") for k in value):
                raise QueryError("operators and keys stand in one object")
            return self.equal(path, value)
        return _all(self.condition(path, op, operand, depth) for op, operand in value.items())

    def condition(self, path: str, op: str, operand: Any, depth: int) -> Node:
        if op in ("$eq", "$ne"):
            equal = self.equal(path, operand)
            return equal if op == "$eq" else Not(equal)
        if op in _OPERATORS:
            return self.order(path, op, operand)
        if op in ("$in", "$nin", "$all"):
            return self.listed(path, op, operand, depth)
        if op == "$elemMatch":
            return self.element(path, operand, depth)
        if op == "$not":
            if not isinstance(operand, dict):
                raise QueryError(f"$not takes an object of operators, not {_shown(operand)}", operator=op)
            with self.at(op):
                return Not(self.conditions(path, operand, depth + 1))
        return self.question(path, op, operand)

    def question(self, path: str, op: str, operand: Any) -> Node:
        """What is asked of a value other than how it compares."""
        if op == "$exists":
            if not isinstance(operand, bool):
                raise QueryError(f"$exists takes true or false, not {_shown(operand)}", operator=op)
            return Exists(path) if operand else Not(Exists(path))
        if op == "$regex":
            if not isinstance(operand, str):
                raise QueryError(f"$regex takes a pattern as text, not {_shown(operand)}", operator=op)
            if path in DATE_FIELDS:
                raise QueryError('a date has no text for $regex; compare it: {"$gte": "2026-11-01"}', operator=op)
            return Match(path, parse_pattern(operand))
        if op == "$size":
            if not isinstance(operand, int) or isinstance(operand, bool) or not 0 <= operand < 1 << 53:
                raise QueryError(f"$size takes a number of elements, not {_shown(operand)}", operator=op)
            return Compare(path, "eq", "size", operand)
        raise QueryError(f"unknown operator {op[:40]!r}; there are {_KNOWN}", operator=op)

    def listed(self, path: str, op: str, operand: Any, depth: int) -> Node:
        if not isinstance(operand, list):
            raise QueryError(f"{op} takes a list, not {_shown(operand)}", operator=op)
        self.clauses += len(operand) // (1 if op == "$all" else 10)
        self.count(depth)
        equal = []
        with self.at(op):
            for i, item in enumerate(operand):
                self.steps[-1] = f"{op}[{i}]"
                equal.append(self.equal(path, item, is_narrowed=False))
        if op == "$all":
            return _all(tuple(equal)) if equal else AnyOf(())  # as in MongoDB, nothing has all of nothing
        alternatives = dict.fromkeys(node for one in equal for node in (one.children if isinstance(one, AnyOf) else (one,)))
        found = AnyOf(tuple(alternatives))
        return found if op == "$in" else Not(found)

    def element(self, path: str, operand: Any, depth: int) -> Node:
        """Conditions on the elements themselves, or a filter on the objects that they are."""
        if not isinstance(operand, dict) or not operand:
            raise QueryError(f"$elemMatch takes a filter or conditions, not {_shown(operand)}", operator="$elemMatch")
        outside, self.in_element = self.in_element, True
        try:
            on_filters = ("$and", "$or", "$nor")
            with self.at("$elemMatch"):
                if all(key.startswith("$") and key not in on_filters for key in operand):
                    child = self.conditions(ELEMENT, operand, depth + 1)
                else:
                    child = self.filter(operand, depth + 1)
        finally:
            self.in_element = outside
        return Element(path, child)

    def equal(self, path: str, value: Any, *, is_narrowed: bool = True) -> Node:
        kind, comparable = self.compared(path, value)
        if kind == "object" and is_narrowed:
            # Implied, and found by an index where only single values are in order.
            few = terms_at(path, dict(islice(value.items(), MEMBERS)))
            single = [term for term in few if term.kind in ("number", "text", "bool", "date")][:MEMBERS]
            members = tuple(Compare(term.path, "eq", term.kind, term.value) for term in single)
            return _all((*members, Compare(path, "eq", kind, comparable)))
        if kind == "null":
            return AnyOf((Compare(path, "eq", "null", 0), Not(Exists(path))))
        quantity = _quantity(path, value)
        if quantity is not None:  # or just a text that looks like one
            return AnyOf((Compare(path, "eq", kind, comparable), _compare(path, "eq", quantity)))
        return Compare(path, "eq", kind, comparable)

    def order(self, path: str, op: str, operand: Any) -> Node:
        quantity = _quantity(path, operand)
        if quantity is not None:
            return _compare(path, _OPERATORS[op], quantity)
        kind, value = self.compared(path, operand)
        if kind == "nan":
            # NaN is equal to itself and to nothing else, and neither less nor greater than a number.
            return Compare(path, "eq", "nan", 0) if op in ("$gte", "$lte") else AnyOf(())
        if isinstance(operand, (int, float)) and kind == "whole":
            return Compare(path, _OPERATORS[op], "number", nearest_float(operand))
        if kind not in ("number", "text", "date"):
            limit = f" of fewer than {TEXT_PREFIX} characters" if isinstance(operand, str) else ""
            raise QueryError(f"{op} takes a number, a text{limit} or a date, not {_shown(operand)}", operator=op)
        return Compare(path, _OPERATORS[op], kind, value)

    def compared(self, path: str, value: Any) -> tuple[Kind, int | float | str | bytes]:
        """Kind and value to compare with, whose errors begin with the path and the way into the value."""
        try:
            check_value(value, path)
            return comparable(value, path)
        except (QueryError, ValidationError) as exc:
            inside, separator, said = str(exc).removeprefix(path).partition(": ")
            if not separator or not str(exc).startswith(path):
                raise QueryError(str(exc)) from exc
            self.steps[-1] += inside
            raise QueryError(said) from exc


_KNOWN = "$eq $ne $gt $gte $lt $lte $in $nin $all $exists $regex $size $elemMatch $not"
_OPERATORS: dict[str, Operator] = {"$gt": "gt", "$gte": "gte", "$lt": "lt", "$lte": "lte"}


def _quantity(path: str, operand: Any) -> Quantity | None:
    """What "20 mK" stands for where a setting keeps its number; a unit is looked up only there."""
    is_value = path.endswith(".value") and path_segments(path)[-1] == "value"
    return parse_quantity(operand) if is_value and isinstance(operand, str) else None


def _compare(path: str, op: Operator, quantity: Quantity) -> Node:
    return Compare(path, op, f"{QUANTITY}{quantity.dimension}", quantity.value)


def _all(nodes: Iterator[Node] | tuple[Node, ...]) -> Node:
    children = tuple(nodes)
    return children[0] if len(children) == 1 else All(children)


def _place(steps: Iterable[str]) -> str:
    place = ".".join(steps)
    return place if len(place) <= MAX_PLACE else f"{place[: MAX_PLACE // 2]}…{place[1 - MAX_PLACE // 2 :]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
