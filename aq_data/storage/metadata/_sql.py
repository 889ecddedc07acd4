"""The only place that writes SQL of searches: trees of the filter language as sets of documents and as tests of one.

Tables are described in `_schema`. A set is `SELECT d …`, a test an expression over one position; both come as `Statement`s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aq_data.models.matching import outside
from aq_data.models.query import All, AnyOf, Compare, Element, Exists, Match, Node, Not, Words
from aq_data.models.terms import KIND_ORDER, TEXT_PREFIX
from aq_data.storage.metadata._catalog import Catalog, Path, beyond
from aq_data.storage.metadata._schema import TERM_TABLES

__all__ = ["NOTHING", "Compiler", "Range", "Statement", "bounded", "joined"]

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


_ROWID = "+rowid AS d"
"""Of a table of words. Without the sign SQLite may ask FTS5 for `d IN (…) OR d IN (…)` without the word, which it cannot."""


class Compiler:
    """Compiles nodes for one question. `hand` keeps a node for the functions of `_functions` and numbers it.

    At a path that is shared, a document's facts stand under its own position or, when it has a snapshot, under that of the
    snapshot, never under both: a test looks in its `home`, and a set is that of documents and that of what has snapshots.
    """

    def __init__(self, catalog: Catalog, hand: Callable[[Match | Element], int], include_deleted: bool) -> None:
        self._catalog, self._hand, self._include_deleted = catalog, hand, include_deleted
        self._which = catalog.snapshot.p if catalog.snapshot is not None else 0

    def _p(self, p: int) -> str:
        return f"IN ({p}, {-p})" if self._include_deleted else f"={p}"

    def home(self, d: str, paths: Sequence[Path]) -> str:
        """The position under which the facts of the document at `d` stand at these paths."""
        if not any(path.shared for path in paths):
            return d
        return f"coalesce((SELECT -v FROM facts WHERE d={d} AND p={self._which}), {d})"

    def _spread(self, paths: Sequence[Path], within: Statement) -> Statement:
        """`SELECT d` of what has a term `t` at one of the paths that is `within`."""
        numbers = [str(p) for path in paths for p in self._signed(path.p)]
        own = f"SELECT t.d AS d FROM terms t WHERE t.p IN ({','.join(numbers)})"
        shared = [str(path.p) for path in paths if path.shared]
        if not shared:
            return Statement(f"{own} AND {within.sql}", within.parameters)
        of_snapshots = (
            f"SELECT h.d AS d FROM terms t CROSS JOIN terms h WHERE t.p IN ({','.join(shared)}) AND t.d<0 "
            f"AND h.p {self._p(self._which)} AND h.v=-t.d"
        )
        sql = f"{own} AND t.d>0 AND {within.sql} UNION ALL {of_snapshots} AND {within.sql}"
        return Statement(sql, within.parameters * 2)

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
            paths = self._catalog.paths(node.path)
            numbers, home = ",".join(str(path.p) for path in paths), self.home(d, paths)
            return Statement(f"EXISTS (SELECT 1 FROM facts WHERE d={home} AND p IN ({numbers}))") if numbers else NOTHING
        if isinstance(node, Match):
            path = self._catalog.path(node.path, "text")
            if path is None:
                return NOTHING
            found, home = self._found(node, path), self.home(d, [path])
            return Statement(
                f"EXISTS (SELECT 1 FROM facts t WHERE t.d={home} AND t.p={path.p} AND {found.sql})", found.parameters
            )
        if isinstance(node, Words):
            return self._test_words(node, d)
        inner, paths = self.test(outside(node.child, node.path), d), self._catalog.paths(node.path)
        exact = self._judged("aq_element", self._hand(node), self.home(d, paths), paths)
        return joined("AND", [inner, exact], EVERYTHING)

    def _test_compare(self, node: Compare | Range, d: str) -> Statement:
        bounds = node.bounds if isinstance(node, Range) else (node,)
        path = self._catalog.path(bounds[0].path, bounds[0].kind)
        if path is None:
            return NOTHING
        tested = bounded(bounds, "v")
        if all(bound.op == "eq" for bound in bounds):
            return self._test_equal(path, d, tested)
        sql = f"EXISTS (SELECT 1 FROM facts WHERE p={path.p} AND d={self.home(d, [path])} AND {tested.sql})"
        return Statement(sql, tested.parameters)

    def _test_equal(self, path: Path, d: str, tested: Statement) -> Statement:
        """What is equal lies together in `terms`; the facts of so many documents lie on as many pages."""
        numbers, tables = (f"={path.p}", ("facts",)) if path.kind == "object" else (self._p(path.p), TERM_TABLES)
        at = f"p {numbers} AND d={self.home(d, [path])} AND {tested.sql}"
        each = [Statement(f"EXISTS (SELECT 1 FROM {table} WHERE {at})", tested.parameters) for table in tables]
        return joined("OR", each, NOTHING)

    def _test_words(self, node: Words, d: str) -> Statement:
        """One word may stand in a document and the next in its snapshot."""
        together, apart = self._parted(node)
        tests = [self._test_listed(together, d)] if together else []
        tests += [joined("OR", [self._test_snapshot(word, d), self._test_listed((word,), d)], NOTHING) for word in apart]
        return joined("AND", tests, EVERYTHING)

    def _test_listed(self, words: tuple[str, ...], d: str) -> Statement:
        """Not by EXISTS: FTS5 takes longer to look at one document than to list a thousand."""
        listed = self._listed(words)
        return Statement(f"{d} IN ({listed.sql})", listed.parameters)

    def _test_snapshot(self, word: str, d: str) -> Statement:
        found = "SELECT -rowid FROM words WHERE words MATCH ? AND rowid<0"
        snapshot = f"(SELECT v FROM facts WHERE d={d} AND p={self._which})"
        return Statement(f"coalesce({snapshot} IN ({found}), 0)", (self._catalog.matching((word,)),))

    def _parted(self, node: Words) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those that are looked for together, for no snapshot has them, and those each apart."""
        apart = tuple(word for word in node.words if self._catalog.is_in_snapshots(word))
        return tuple(word for word in node.words if word not in apart), apart

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
        return self._test_equal(group.path, d, Statement(f"v IN ({group.marks})", group.values))

    def documents_of_group(self, group: Group) -> Statement:
        """`SELECT d` of what equals one of several values; perhaps with repeats."""
        if group.path.kind == "object":
            tested = self._test_group(group, "c.d")
            every = self._spread([group.path], EVERYTHING)
            return Statement(f"SELECT c.d FROM ({every.sql}) c WHERE {tested.sql}", (*every.parameters, *tested.parameters))
        return self._spread([group.path], Statement(f"t.v IN ({group.marks})", group.values))

    def _found(self, node: Match, path: Path) -> Statement:
        """Over `t`, a row of texts: whether the pattern is found. Long texts are cut in the index and read whole."""
        bounds: list[Statement] = []
        prefix = node.pattern.prefix[:TEXT_PREFIX]
        if prefix:
            bounds.append(Statement("t.v>=? AND t.v<?", (prefix, beyond(prefix))))
        number = self._hand(node)
        whole = self._judged("aq_text", number, "t.d", [path])
        sql = f"CASE aq_regex(?, t.v) WHEN 2 THEN {whole.sql} ELSE aq_regex(?, t.v) END"
        bounds.append(Statement(sql, (number, *whole.parameters, number)))
        return joined("AND", bounds, EVERYTHING)

    def _judged(self, function: str, number: int, d: str, paths: Sequence[Path]) -> Statement:
        """What a function of `_functions` says of a whole document, or snapshot, asked once."""
        document = f"(SELECT document FROM datafiles WHERE seq={d})"
        if any(path.shared for path in paths):
            document = f"CASE WHEN {d}>0 THEN {document} ELSE (SELECT content FROM snapshots WHERE snapshot=-{d}) END"
        return Statement(f"coalesce(aq_known(?, {d}), {function}(?, {d}, {document}))", (number, number))

    # --- sets of documents -----------------------------------------------------------------------------------------------

    def documents(self, node: Node | Range) -> Statement | None:
        """`SELECT d` of everything that matches, by index, perhaps with repeats; None where no index leads there."""
        if isinstance(node, (Compare, Range)):
            return self._documents_of_values(node)
        if isinstance(node, Exists):
            paths = self._catalog.paths(node.path)
            return self._spread(paths, EVERYTHING) if paths else _EMPTY
        if isinstance(node, Match):
            path = self._catalog.path(node.path, "text")
            if path is None:
                return _EMPTY
            return self._spread([path], self._found(node, path))
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

    def _documents_of_values(self, node: Compare | Range) -> Statement:
        bounds = node.bounds if isinstance(node, Range) else (node,)
        path = self._catalog.path(bounds[0].path, bounds[0].kind)
        if path is None:
            return _EMPTY
        if path.kind == "object":
            return self.documents_of_group(Group(path, (bounds[0].value,)))
        return self._spread([path], bounded(bounds, "t.v"))

    def _documents_of_words(self, node: Words) -> Statement:
        together, apart = self._parted(node)
        if together:
            documents = self._listed(together)
        else:
            documents, apart = self._documents_of_word(apart[0]), apart[1:]
        return self.those(documents, [Words(apart)]) if apart else documents

    def _documents_of_word(self, word: str) -> Statement:
        """Those whose snapshot has the word, and those that have it themselves and not in their snapshot."""
        sql = (
            "SELECT h.d AS d FROM words CROSS JOIN terms h WHERE words MATCH ? AND words.rowid<0 "
            f"AND h.p {self._p(self._which)} AND h.v=-words.rowid"
        )
        for table in self._tables_of_words:
            has_not = f"NOT {self._test_snapshot(word, f'{table}.rowid').sql}"
            sql += f" UNION ALL SELECT {_ROWID} FROM {table} WHERE {table} MATCH ? AND rowid>0 AND {has_not}"
        return Statement(sql, (self._catalog.matching((word,)),) * (1 + 2 * len(self._tables_of_words)))

    def _listed(self, words: tuple[str, ...]) -> Statement:
        """Documents that have all words themselves."""
        tables = self._tables_of_words
        each = " UNION ALL ".join(f"SELECT {_ROWID} FROM {table} WHERE {table} MATCH ? AND rowid>0" for table in tables)
        return Statement(each, (self._catalog.matching(words),) * len(tables))

    @property
    def _tables_of_words(self) -> tuple[str, ...]:
        return ("words", "buried_words") if self._include_deleted else ("words",)

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
            if path.shared or path.kind == "object":
                return None
            sql = f"SELECT d FROM terms WHERE p={path.p} AND v=?{bound.sql} ORDER BY d {order}"
            return Statement(sql, (node.value, *bound.parameters))
        if isinstance(node, Words) and not self._parted(node)[1]:
            within = bound.sql.replace(" d ", " rowid ")
            sql = f"SELECT rowid AS d FROM words WHERE words MATCH ?{within} ORDER BY rowid {order}"
            return Statement(sql, (self._catalog.matching(node.words), *bound.parameters))
        return None

    # --- counting: each table alone, in the order of its key --------------------------------------------------------------

    def size(self, node: Compare | Range, limit: int | None) -> Statement | None:
        """How many terms there are, or somewhat more than `limit`; None where that is not how many documents match."""
        bounds = node.bounds if isinstance(node, Range) else (node,)
        path = self._catalog.path(bounds[0].path, bounds[0].kind)
        if path is None or path.shared or path.kind == "object":
            return None
        within, end = bounded(bounds, "v"), "" if limit is None else f" LIMIT {limit}"
        each = [f"SELECT 1 FROM {table} WHERE p {self._p(path.p)} AND {within.sql}{end}" for table in TERM_TABLES]
        counts = " + ".join(f"(SELECT count(*) FROM ({sql}))" for sql in each)
        return Statement(f"SELECT {counts}", within.parameters * len(each))

    def values_at(self, numbers: str) -> str:
        """`SELECT p, v, n`: how many documents have each value at these paths, those of snapshots left out."""
        each = [
            f"SELECT p, v, count(*) AS n FROM {table} WHERE p IN ({numbers}) AND d>0 GROUP BY p, v" for table in TERM_TABLES
        ]
        return f"SELECT p, v, sum(n) AS n FROM ({' UNION ALL '.join(each)}) GROUP BY p, v"

    # --- sorting ---------------------------------------------------------------------------------------------------------

    def sortable(self, path: str) -> list[Path]:
        """The kinds at a path that have an order, in that order."""
        kinds = [one for one in self._catalog.paths(path) if one.kind in KIND_ORDER]
        return sorted(kinds, key=lambda one: KIND_ORDER[one.kind])


_EMPTY = Statement("SELECT 0 AS d WHERE 0")


def bounded(bounds: tuple[Compare, ...], v: str) -> Statement:
    """That the value `v` (an SQL expression) keeps all bounds."""
    sql = " AND ".join(f"{v}{_OPERATORS[bound.op]}?" for bound in bounds)
    return Statement(sql, tuple(bound.value for bound in bounds))


def _union(parts: list[Statement]) -> Statement:
    if len(parts) == 1:
        return parts[0]
    sql = " UNION ".join(f"SELECT d FROM ({part.sql})" for part in parts) if parts else _EMPTY.sql
    return Statement(sql, tuple(value for part in parts for value in part.parameters))
