"""The only place that writes SQL of searches: trees of the filter language as sets of documents and as tests of one.

Tables are described in `_schema`. A set is `SELECT d …`, a test an expression over one position; both come as `Statement`s.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aq_data.models.matching import outside
from aq_data.models.query import All, AnyOf, Compare, Element, Exists, Match, Node, Not, Words
from aq_data.models.terms import KIND_ORDER, TEXT_PREFIX

__all__ = ["NOTHING", "Catalog", "Compiler", "Path", "Range", "Statement", "joined"]

MANY_WORDS = 50
"""Words that begin alike are asked for one by one up to here."""

_OPERATORS = {"eq": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL text and its parameters in order."""

    sql: str
    parameters: tuple[Any, ...] = ()


NOTHING = Statement("0")
EVERYTHING = Statement("1")


def joined(word: str, parts: list[Statement], empty: Statement) -> Statement:
    """Tests joined by AND or OR."""
    if not parts:
        return empty
    sql = "(" + f" {word} ".join(part.sql for part in parts) + ")"
    return Statement(sql, tuple(value for part in parts for value in part.parameters))


@dataclass(frozen=True, slots=True)
class Path:
    """A row of `paths`."""

    p: int
    kind: str
    multi: bool
    many: bool
    n: int


class Catalog:
    """The numbers of paths, as of the snapshot a connection reads."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._known: dict[str, list[Path]] = {}

    def paths(self, path: str) -> list[Path]:
        """Every kind of value that stands at a path."""
        if path not in self._known:
            rows = self._connection.execute("SELECT p, kind, multi, many, n FROM paths WHERE path=?", (path,)).fetchall()
            self._known[path] = [Path(p, kind, bool(multi), bool(many), n) for p, kind, multi, many, n in rows]
        return self._known[path]

    def words(self, beginning: str, limit: int) -> list[str]:
        """Words that were ever in some document and begin so."""
        question = "SELECT word FROM vocabulary WHERE word>=? AND word<? LIMIT ?"
        return [row[0] for row in self._connection.execute(question, (beginning, _beyond(beginning), limit))]

    def path(self, path: str, kind: str) -> Path | None:
        """That of one kind; None when no document has any."""
        return next((one for one in self.paths(path) if one.kind == kind), None)


@dataclass(frozen=True, slots=True)
class Range:
    """Comparisons of one path and kind that all hold of one value; only where no document has several there."""

    bounds: tuple[Compare, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Values of one path and kind, one of which is to be equal."""

    path: Path
    values: tuple[Any, ...]

    @property
    def marks(self) -> str:
        return ",".join("?" * len(self.values))


class Compiler:
    """Compiles nodes for one question. `hand` keeps a Python object for the functions of `_functions` and numbers it."""

    def __init__(self, catalog: Catalog, hand: Callable[[object], int], include_deleted: bool) -> None:
        self._catalog, self._hand, self._include_deleted = catalog, hand, include_deleted

    def _p(self, p: int) -> str:
        return f"IN ({p}, {-p})" if self._include_deleted else f"={p}"

    # --- tests of one document -----------------------------------------------------------------------------------------

    def test(self, node: Node | Range, d: str) -> Statement:
        """Whether the document at position `d` (an SQL expression) is matched; a few look-ups at most."""
        if isinstance(node, All):
            return joined("AND", [self.test(child, d) for child in node.children], EVERYTHING)
        if isinstance(node, AnyOf):
            groups, rest = self.grouped(node)
            tests = [self._test_group(group, d) for group in groups]
            return joined("OR", tests + [self.test(child, d) for child in rest], NOTHING)
        if isinstance(node, Not):
            inner = self.test(node.child, d)
            return Statement(f"NOT {inner.sql}", inner.parameters)
        if isinstance(node, (Compare, Range)):
            return self._test_compare(node, d)
        if isinstance(node, Exists):
            numbers = ",".join(str(path.p) for path in self._catalog.paths(node.path))
            return Statement(f"EXISTS (SELECT 1 FROM facts WHERE d={d} AND p IN ({numbers}))") if numbers else NOTHING
        if isinstance(node, Match):
            path = self._catalog.path(node.path, "text")
            if path is None:
                return NOTHING
            found = self._found(node)
            return Statement(
                f"EXISTS (SELECT 1 FROM facts t WHERE t.d={d} AND t.p={path.p} AND {found.sql})", found.parameters
            )
        if isinstance(node, Words):
            # Not by EXISTS: FTS5 takes longer to look at one document than to list a thousand.
            listed = self._documents_of_words(node)
            return Statement(f"{d} IN ({listed.sql})", listed.parameters)
        inner = self.test(outside(node.child, node.path), d)
        exact = self._judged("aq_element", self._hand(node), d)
        return joined("AND", [inner, exact], EVERYTHING)

    def _test_compare(self, node: Compare | Range, d: str) -> Statement:
        bounds = node.bounds if isinstance(node, Range) else (node,)
        path = self._catalog.path(bounds[0].path, bounds[0].kind)
        if path is None:
            return NOTHING
        table = f"terms WHERE p {self._p(path.p)}" if path.kind == "whole" else f"facts WHERE p={path.p}"
        within = _within(bounds)
        return Statement(f"EXISTS (SELECT 1 FROM {table} AND d={d} AND {within.sql})", within.parameters)

    def grouped(self, node: AnyOf) -> tuple[list[Group], list[Node]]:
        """Equalities of one path and kind together, which keeps long `$in` lists within SQLite's depth; and the rest."""
        values: dict[tuple[str, str], list[Any]] = {}
        rest: list[Node] = []
        for child in node.children:
            if isinstance(child, Compare) and child.op == "eq":
                values.setdefault((child.path, child.kind), []).append(child.value)
            else:
                rest.append(child)
        found = [(self._catalog.path(*key), tuple(listed)) for key, listed in values.items()]
        return [Group(path, listed) for path, listed in found if path is not None], rest

    def _test_group(self, group: Group, d: str) -> Statement:
        table = f"terms WHERE p {self._p(group.path.p)}" if group.path.kind == "whole" else f"facts WHERE p={group.path.p}"
        return Statement(f"EXISTS (SELECT 1 FROM {table} AND d={d} AND v IN ({group.marks}))", group.values)

    def documents_of_group(self, group: Group) -> Statement:
        """`SELECT d` of what equals one of several values; perhaps with repeats."""
        return Statement(f"SELECT d FROM terms WHERE p {self._p(group.path.p)} AND v IN ({group.marks})", group.values)

    def _found(self, node: Match) -> Statement:
        """Over `t`, a row of texts: whether the pattern is found. Long texts are cut in the index and read whole."""
        bounds: list[Statement] = []
        prefix = node.pattern.prefix[:TEXT_PREFIX]
        if prefix:
            bounds.append(Statement("t.v>=? AND t.v<?", (prefix, _beyond(prefix))))
        number = self._hand(node)
        whole = self._judged("aq_text", number, "t.d")
        sql = f"CASE aq_regex(?, t.v) WHEN 2 THEN {whole.sql} ELSE aq_regex(?, t.v) END"
        bounds.append(Statement(sql, (number, *whole.parameters, number)))
        return joined("AND", bounds, EVERYTHING)

    def _judged(self, function: str, number: int, d: str) -> Statement:
        """What a function of `_functions` says of a whole document, asked once."""
        document = f"(SELECT document FROM datafiles WHERE seq={d})"
        return Statement(f"coalesce(aq_known(?, {d}), {function}(?, {d}, {document}))", (number, number))

    # --- sets of documents -----------------------------------------------------------------------------------------------

    def documents(self, node: Node | Range) -> Statement | None:
        """`SELECT d` of everything that matches, by index, perhaps with repeats; None where no index leads there."""
        if isinstance(node, (Compare, Range)):
            bounds = node.bounds if isinstance(node, Range) else (node,)
            path = self._catalog.path(bounds[0].path, bounds[0].kind)
            if path is None:
                return _EMPTY
            within = _within(bounds)
            return Statement(f"SELECT d FROM terms WHERE p {self._p(path.p)} AND {within.sql}", within.parameters)
        if isinstance(node, Exists):
            numbers = [str(p) for path in self._catalog.paths(node.path) for p in self._signed(path.p)]
            return Statement(f"SELECT d FROM terms WHERE p IN ({','.join(numbers)})") if numbers else _EMPTY
        if isinstance(node, Match):
            path = self._catalog.path(node.path, "text")
            if path is None:
                return _EMPTY
            found = self._found(node)
            return Statement(f"SELECT t.d FROM terms t WHERE t.p {self._p(path.p)} AND {found.sql}", found.parameters)
        if isinstance(node, Words):
            return self._documents_of_words(node)
        if isinstance(node, Element):
            found_in = self.documents(outside(node.child, node.path))
            return None if found_in is None else self.those(found_in, [node])
        if isinstance(node, AnyOf):
            groups, rest = self.grouped(node)
            parts = [self.documents(child) for child in rest]
            sets = [self.documents_of_group(group) for group in groups] + [part for part in parts if part is not None]
            return None if None in parts else _union(sets)
        if isinstance(node, All) and node.children:
            for i, child in enumerate(node.children):
                part = self.documents(child)
                if part is not None:
                    return self.those(part, [*node.children[:i], *node.children[i + 1 :]])
        return None

    def _documents_of_words(self, node: Words) -> Statement:
        tables = ("words", "buried_words") if self._include_deleted else ("words",)
        each = " UNION ALL ".join(f"SELECT rowid AS d FROM {table} WHERE {table} MATCH ?" for table in tables)
        return Statement(each, (self._words(node),) * len(tables))

    def _words(self, node: Words) -> str:
        """The question to FTS5: for each beginning the words that begin so, if they are few."""
        parts = []
        for word in node.words:
            known = self._catalog.words(word, MANY_WORDS + 1)
            few = known or [word]
            parts.append(f'"{word}"*' if len(known) > MANY_WORDS else "(" + " OR ".join(f'"{one}"' for one in few) + ")")
        return " AND ".join(parts)

    def _signed(self, p: int) -> tuple[int, ...]:
        return (p, -p) if self._include_deleted else (p,)

    def all_documents(self) -> Statement:
        """`SELECT d` of everything that is in the index."""
        alive = "" if self._include_deleted else " AND deleted=0"
        return Statement(
            f"SELECT seq AS d FROM datafiles WHERE seq<=(SELECT value FROM progress WHERE name='indexed'){alive}"
        )

    def those(self, documents: Statement, nodes: Sequence[Node | Range]) -> Statement:
        """Of a set, those that match all nodes."""
        if not nodes:
            return documents
        tests = joined("AND", [self.test(node, "c.d") for node in nodes], EVERYTHING)
        return Statement(
            f"SELECT c.d FROM ({documents.sql}) c WHERE {tests.sql}", (*documents.parameters, *tests.parameters)
        )

    def in_saving_order(self, node: Node | Range, order: str, bound: Statement) -> Statement | None:
        """As `documents`, of those alive, by position, beyond a bound on `d`; None where no index is in that order."""
        if isinstance(node, Compare) and node.op == "eq":
            path = self._catalog.path(node.path, node.kind)
            if path is None:
                return _EMPTY
            sql = f"SELECT d FROM terms WHERE p={path.p} AND v=?{bound.sql} ORDER BY d {order}"
            return Statement(sql, (node.value, *bound.parameters))
        if isinstance(node, Words):
            within = bound.sql.replace(" d ", " rowid ")
            sql = f"SELECT rowid AS d FROM words WHERE words MATCH ?{within} ORDER BY rowid {order}"
            return Statement(sql, (self._words(node), *bound.parameters))
        return None

    # --- sorting ---------------------------------------------------------------------------------------------------------

    def sortable(self, path: str) -> list[Path]:
        """The kinds at a path that have an order, in that order."""
        kinds = [one for one in self._catalog.paths(path) if one.kind in KIND_ORDER]
        return sorted(kinds, key=lambda one: KIND_ORDER[one.kind])


_EMPTY = Statement("SELECT 0 AS d WHERE 0")


def _within(bounds: tuple[Compare, ...]) -> Statement:
    """Over `v`: that it keeps all bounds."""
    sql = " AND ".join(f"v{_OPERATORS[bound.op]}?" for bound in bounds)
    return Statement(sql, tuple(bound.value for bound in bounds))


def _union(parts: list[Statement]) -> Statement:
    if len(parts) == 1:
        return parts[0]
    sql = " UNION ".join(f"SELECT d FROM ({part.sql})" for part in parts) if parts else _EMPTY.sql
    return Statement(sql, tuple(value for part in parts for value in part.parameters))


def _beyond(prefix: str) -> str:
    """The least text greater than everything that begins with `prefix`."""
    while prefix and prefix[-1] == "\U0010ffff":
        prefix = prefix[:-1]
    following = ord(prefix[-1]) + 1 if prefix else 0x10FFFF
    return prefix[:-1] + chr(0xE000 if following == 0xD800 else following)  # surrogates are no characters
