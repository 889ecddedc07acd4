"""How one question is answered: which index leads, when to sort what was found and when to walk in the order asked for.

A set that an index gives and that is small is sorted. Of a large one the documents are walked in the order asked for, each
tested, until the page is full: cheap where many match, endless where those that match stand at the far end. So the walk has
a budget, and where that is spent the whole set is sorted after all.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import msgspec

from aq_data.models.matching import outside
from aq_data.models.paths import SortKey
from aq_data.models.query import All, AnyOf, Compare, Element, Exists, Match, Node, Not, check_dimension, nodes_of
from aq_data.models.snapshots import joined_json
from aq_data.models.terms import KIND_ORDER
from aq_data.storage.metadata._catalog import Catalog, Path
from aq_data.storage.metadata._sql import Compiler, Range, Statement, bounded
from aq_data.storage.metadata.cursors import Cursor
from aq_data.storage.metadata.store import Page

__all__ = ["EXACT_TOTAL", "Question"]

EXACT_TOTAL = 10_000
"""Totals are counted exactly up to here; `count` is always exact."""
SORTED = 2000
"""Up to this many matches are always sorted; of more it depends on how far a walk would be."""
FAR = 3
"""Sorting one document costs about as much as so many steps of a walk."""
BUDGET = 20_000
"""Documents a walk may test in vain before everything is sorted instead."""
EASY = 5
"""Pages in a set, from which on it is not sorted if its index is in the order asked for."""
DISORDER = 3_600_000_000
"""Microseconds: of documents saved in greater disorder the order of saving is not made use of."""
CAP = 2000
"""Sizes of sets that are not known are counted up to here, or up to the smallest one known."""
ENDLESS = 1 << 60

Plain = Node | Range


class Question:
    """One question in one snapshot. `hand` is that of `_functions.handing`."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        node: Node,
        hand: Callable[[Match | Element], int],
        include_deleted: bool = False,
    ) -> None:
        self._connection = connection
        self._catalog = Catalog(connection)
        self._compiler = Compiler(self._catalog, hand, include_deleted)
        self._include_deleted = include_deleted
        self._check_dimensions(node)
        self._node = self._ordered(node)

    # --- what is asked -------------------------------------------------------------------------------------------------

    def page(self, sort: SortKey, limit: int, start: Cursor | None) -> Page:
        """Up to `limit` documents after `start`, and the total."""
        if start is None:
            total, is_exact, found = self._gather()
        else:
            total, is_exact, found = start.total, start.total_is_exact, self._set()
        rows = self._rows(found, sort, limit + 1, start, total) if limit and total else []
        more = len(rows) > limit
        cursor = None
        if more:
            rank, value, seq = rows[limit - 1]
            cursor = Cursor((rank, value), seq, total, is_exact).encode(sort)
        return Page(self._documents([seq for _, _, seq in rows[:limit]]), total, is_exact, cursor)

    def count(self) -> int:
        """How many match, exactly."""
        return self._count(self._node)

    def distinct(self, path: str, limit: int) -> list[tuple[str, Any, int]]:
        """Kind, value and number of documents of each value at `path`, most frequent first."""
        wanted = [one for one in self._catalog.paths(path) if one.kind in ("number", "text", "bool", "date")]
        if not wanted:
            return []
        kinds = {one.p: one.kind for one in wanted}
        numbers = ",".join(map(str, kinds))
        found = self._set()
        snapshot = self._catalog.snapshot if any(one.shared for one in wanted) else None
        if self._node != All(()) or (snapshot is not None and snapshot.many):
            home = self._compiler.home("c.d", wanted)
            sql = f"SELECT s.p, s.v, count(*) AS n FROM ({found.sql}) c JOIN facts s ON s.d={home} AND s.p IN ({numbers})"
            statement = Statement(f"{sql} GROUP BY s.p, s.v", found.parameters)
        else:
            own = f"SELECT p, v, n FROM facets WHERE p IN ({numbers})"
            if any(one.many for one in wanted):
                own = f"SELECT p, v, count(*) AS n FROM terms WHERE p IN ({numbers}) AND d>0 GROUP BY p, v"
            if snapshot is not None:
                counted = f"SELECT t.p, t.v, f.n {_counted(snapshot)} AND t.p IN ({numbers})"
                own = f"SELECT p, v, sum(n) AS n FROM ({own} UNION ALL {counted}) GROUP BY p, v"
            statement = Statement(own)
        order = " ".join(f"WHEN {one.p} THEN '{one.kind}'" for one in wanted)
        ordered = f"{statement.sql} ORDER BY n DESC, CASE p {order} END, v LIMIT {int(limit)}"
        rows = self._fetch(Statement(ordered, statement.parameters))
        return [(kinds[p], value, n) for p, value, n in rows]

    # --- how much there is ----------------------------------------------------------------------------------------------

    def _fetch(self, statement: Statement) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement.sql, statement.parameters).fetchall()

    def _number(self, statement: Statement, limit: int | None = None) -> int:
        capped = statement.sql if limit is None else f"SELECT 1 FROM ({statement.sql}) LIMIT {limit}"
        return int(self._fetch(Statement(f"SELECT count(*) FROM ({capped})", statement.parameters))[0][0])

    def _alive(self) -> int:
        return int(self._fetch(Statement("SELECT value FROM progress WHERE name='alive'"))[0][0])

    def _gather(self) -> tuple[int, bool, Statement]:
        """The total, whether it is exact, and the set: the positions themselves once they had to be found to be counted."""
        found = self._set()
        total = None if self._include_deleted else self._known_count(self._node)
        if total is None and isinstance(self._node, (Compare, Range)):
            total = self._number(found, EXACT_TOTAL + 1)
        if total is None:
            rows = self._fetch(Statement(f"{found.sql} LIMIT {EXACT_TOTAL + 1}", found.parameters))
            total = len(rows)
            if total <= EXACT_TOTAL:
                positions = ",".join(str(row[0]) for row in rows)
                found = Statement("SELECT value AS d FROM json_each(?)", (f"[{positions}]",))
        return min(total, EXACT_TOTAL), total <= EXACT_TOTAL, found

    def _count(self, node: Plain) -> int:
        if self._include_deleted:
            return self._number(self._set())
        known = self._known_count(node)
        if known is None and isinstance(node, Not):
            known = self._alive() - self._count(self._ordered(node.child))
        return self._number(self._set(node)) if known is None else known

    def _known_count(self, node: Plain) -> int | None:
        """What is counted already."""
        if node == All(()):
            return self._alive()
        if isinstance(node, Compare) and node.op == "eq":
            path = self._catalog.path(node.path, node.kind)
            return 0 if path is None else self._facet(path, node.value)
        if isinstance(node, Not):
            inside = self._known_count(node.child)
            return None if inside is None else self._alive() - inside
        return None

    def _facet(self, path: Path, value: Any) -> int | None:
        if path.many or path.kind not in ("number", "text", "bool", "date"):
            return None
        rows = self._fetch(Statement("SELECT n FROM facets WHERE p=? AND v=?", (path.p, value)))
        own = int(rows[0][0]) if rows else 0
        snapshot = self._catalog.snapshot if path.shared else None
        if snapshot is None:
            return own
        if snapshot.many:
            return None
        shared = Statement(f"SELECT f.n {_counted(snapshot)} AND t.p=? AND t.v=?", (path.p, value))
        return own + sum(int(row[0]) for row in self._fetch(shared))

    def _known_size(self, node: Plain) -> int | None:
        """How many documents the index gives, where that is counted already."""
        if isinstance(node, Exists) and not any(path.shared for path in self._catalog.paths(node.path)):
            return sum(path.n for path in self._catalog.paths(node.path))
        is_equal = isinstance(node, Compare) and node.op == "eq" and not self._include_deleted
        return self._known_count(node) if is_equal else None

    def _size(self, node: Plain, cap: int) -> int:
        """About how many documents the index of this node gives; ENDLESS where they are more than `cap` and not counted."""
        if isinstance(node, All):
            return min((self._size(child, cap) for child in node.children), default=ENDLESS)
        if isinstance(node, AnyOf):
            groups, rest = self._compiler.grouped(node)
            sets = [self._compiler.documents_of_group(group) for group in groups]
            return sum(self._capped(found, cap) for found in sets) + sum(self._size(child, cap) for child in rest)
        if isinstance(node, Element):
            return self._size(outside(node.child, node.path), cap)
        known = self._known_size(node)
        if known is not None:
            return known
        if isinstance(node, Match):
            node = Compare(node.path, "gte", "text", node.pattern.prefix)  # every such text has to be looked at
        found = self._compiler.documents(node)
        return ENDLESS if found is None else self._capped(found, cap)

    def _capped(self, found: Statement, cap: int) -> int:
        size = self._number(found, cap + 1)
        return size if size <= cap else ENDLESS

    # --- which way ------------------------------------------------------------------------------------------------------

    def _check_dimensions(self, node: Node) -> None:
        for one in nodes_of(node):
            if isinstance(one, Compare):
                check_dimension(one, [path.kind for path in self._catalog.paths(one.path)])

    def _ordered(self, node: Node) -> Plain:
        """Conjunctions with their smallest set first, by which they are then found."""
        if not isinstance(node, All) or len(node.children) < 2:
            return node
        flat = [inner for child in node.children for inner in (child.children if isinstance(child, All) else (child,))]
        nodes = self._in_ranges(flat)
        known = [size for size in map(self._known_size, nodes) if size is not None]
        cap = min(max(CAP, min(known, default=CAP)), BUDGET)
        ordered = sorted(nodes, key=lambda one: self._size(one, cap))
        return ordered[0] if len(ordered) == 1 else All(tuple(ordered))  # type: ignore[arg-type]

    def _in_ranges(self, nodes: list[Node]) -> list[Plain]:
        """Comparisons of one path as one range, where one value has to hold them all."""
        bounds: dict[tuple[str, str], list[Compare]] = {}
        rest: list[Plain] = []
        for node in nodes:
            path = self._catalog.path(node.path, node.kind) if isinstance(node, Compare) else None
            if isinstance(node, Compare) and path is not None and not path.multi and node.kind in KIND_ORDER:
                bounds.setdefault((node.path, node.kind), []).append(node)
            else:
                rest.append(node)
        return [*(Range(tuple(found)) if len(found) > 1 else found[0] for found in bounds.values()), *rest]

    def _set(self, node: Plain | None = None) -> Statement:
        """`SELECT d` of everything that matches, without repeats."""
        node = self._node if node is None else node
        found = self._compiler.documents(node)
        if found is None:
            return self._compiler.those(self._compiler.all_documents(), [] if node == All(()) else [node])
        return Statement(f"SELECT DISTINCT d FROM ({found.sql})", found.parameters) if self._repeats(node) else found

    def _repeats(self, node: Plain) -> bool:
        """Whether the index may give a document twice."""
        if isinstance(node, All):
            leading = next((child for child in node.children if self._compiler.documents(child) is not None), None)
            return leading is not None and self._repeats(leading)
        if isinstance(node, AnyOf):
            groups, rest = self._compiler.grouped(node)
            if len(groups) + len(rest) > 1:
                return False  # a union has no repeats
            several = [group for group in groups if len(group.values) > 1]
            return any(map(self._repeats, rest)) or any(g.path.multi or g.path.kind not in KIND_ORDER for g in several)
        if isinstance(node, Compare):
            path = self._catalog.path(node.path, node.kind)
            return path is not None and node.op != "eq" and (path.multi or node.kind not in KIND_ORDER)
        return isinstance(node, (AnyOf, Exists, Match, Element))

    def _rows(
        self, found: Statement, sort: SortKey, limit: int, start: Cursor | None, total: int
    ) -> list[tuple[int, Any, int]]:
        """Rank, value and position of the next documents in order."""
        if not self._include_deleted and total > EASY * limit and sort.path == "created_at":
            saved = self._by_saving(sort, limit, start)
            if saved is not None:
                return saved
        is_shared = any(path.shared for path in self._compiler.sortable(sort.path))
        if not self._include_deleted and total > SORTED and not is_shared:
            steps = limit * self._alive() / total
            if total >= EXACT_TOTAL or steps < FAR * total:
                walked = self._walk(sort, limit, start)
                if walked is not None:
                    return walked
        return self._sort(found, sort, limit, start)

    # --- sorting what was found ------------------------------------------------------------------------------------------

    def _sort(self, found: Statement, sort: SortKey, limit: int, start: Cursor | None) -> list[tuple[int, Any, int]]:
        order = "DESC" if sort.descending else "ASC"
        paths = self._compiler.sortable(sort.path)
        ranks = " ".join(f"WHEN {path.p} THEN {KIND_ORDER[path.kind]}" for path in paths) or "WHEN 0 THEN 0"
        rank = f"CASE s.p {ranks} END"
        numbers = ",".join(str(path.p) for path in paths) or "0"
        of_document = f"FROM facts s WHERE s.d={self._compiler.home('c.d', paths)} AND s.p IN ({numbers})"
        if len(paths) == 1:
            best, rank = f"{of_document} ORDER BY s.v {order} LIMIT 1", str(KIND_ORDER[paths[0].kind])
        else:
            best = f"{of_document} ORDER BY {rank} {order}, s.v {order} LIMIT 1"
        after, parameters = "", found.parameters
        if start is not None:
            after = f"WHERE (coalesce(r, 0), coalesce(v, 0), d) {'<' if sort.descending else '>'} (?, ?, ?)"
            parameters = (*parameters, *start.key, start.tie)
        return self._fetch(
            Statement(
                f"WITH k AS MATERIALIZED (SELECT c.d AS d, (SELECT {rank} {best}) AS r, (SELECT s.v {best}) AS v "
                f"FROM ({found.sql}) c) SELECT coalesce(r, 0) AS r, coalesce(v, 0) AS v, d FROM k {after} "
                f"ORDER BY r {order}, v {order}, d {order} LIMIT {int(limit)}",
                parameters,
            )
        )

    # --- in order of saving -----------------------------------------------------------------------------------------------

    def _by_saving(self, sort: SortKey, limit: int, start: Cursor | None) -> list[tuple[int, Any, int]] | None:
        """The next by `created_at`, found in the order of saving, which is nearly the same; None where that does not help.

        Nothing saved later is older by more than the disorder D: once so many are found, and the last one looked at is D
        beyond the last of them, nothing that follows can come before it.
        """
        created = self._catalog.path("created_at", "date")
        if created is None or created.multi or created.n != self._alive():
            return None
        disorder = int(self._fetch(Statement("SELECT value FROM progress WHERE name='disorder'"))[0][0])
        rank, order, sign = KIND_ORDER["date"], *(("DESC", "<") if sort.descending else ("ASC", ">"))
        bound = Statement("")
        if start is not None:
            low, high = (
                (start.key[1] - disorder, start.key[1]) if sort.descending else (start.key[1], start.key[1] + disorder)
            )
            last = f"SELECT {'max' if sort.descending else 'min'}(d) FROM terms WHERE p={created.p} AND v>=? AND v<=?"
            bound = Statement(f" AND d {sign}= ({last})", (low, high))
        children = self._node.children if isinstance(self._node, All) and self._node.children else (self._node,)
        lead = self._compiler.in_saving_order(children[0], order, bound)
        if lead is None or disorder > DISORDER:
            return None
        found = self._compiler.those(Statement(f"{lead.sql} LIMIT {BUDGET}", lead.parameters), children[1:])
        after = f"WHERE (v, d) {sign} (?, ?)" if start is not None else ""
        dated = f"SELECT c.d AS d, (SELECT v FROM facts WHERE d=c.d AND p={created.p}) AS v FROM ({found.sql}) c"
        parameters = (*found.parameters, *((start.key[1], start.tie) if start is not None else ()))
        wanted = 2 * limit
        while wanted <= BUDGET:
            looked = self._fetch(Statement(f"SELECT v, d FROM ({dated}) {after} LIMIT {wanted}", parameters))
            if len(looked) < wanted:
                return None  # few are left, or the budget is spent: sorting or walking tells which
            best = sorted(looked, reverse=sort.descending)[:limit]
            beyond = best[-1][0] - looked[-1][0] if sort.descending else looked[-1][0] - best[-1][0]
            if beyond >= disorder:
                return [(rank, value, d) for value, d in best]
            wanted *= 4
        return None

    # --- walking in order --------------------------------------------------------------------------------------------------

    def _walk(self, sort: SortKey, limit: int, start: Cursor | None) -> list[tuple[int, Any, int]] | None:
        """The next documents, kind by kind of the sort path, then those without; None where the budget is spent."""
        rows: list[tuple[int, Any, int]] = []
        paths = [path for path in self._compiler.sortable(sort.path) if path.kind != "null"]
        branches: list[Path | None] = [None, *paths]
        for path in reversed(branches) if sort.descending else branches:
            lacking = limit - len(rows)
            found = self._kind(path, sort, lacking, start) if path else self._missing(sort, lacking, start)
            if found is None:
                return None
            rows += found
            if len(rows) >= limit:
                break
        return rows

    def _kind(self, path: Path, sort: SortKey, limit: int, start: Cursor | None) -> list[tuple[int, Any, int]] | None:
        """Those that are sorted by a value of one kind."""
        rank, order, sign = KIND_ORDER[path.kind], *(("DESC", "<") if sort.descending else ("ASC", ">"))
        after = Statement("")
        if start is not None:
            if start.key[0] == rank:
                after = Statement(f" AND (v, d) {sign} (?, ?)", (start.key[1], start.tie))
            elif (start.key[0] < rank) == sort.descending:
                return []
        bounds = self._bounds(path, sort)
        after = Statement(bounds.sql + after.sql, (*bounds.parameters, *after.parameters))
        walked = f"SELECT v, d FROM terms WHERE p={path.p}{after.sql} ORDER BY v {order}, d {order} LIMIT {BUDGET}"
        tests = self._compiler.test(self._node, "c.d")
        first = f" AND {self._is_first(path, sort)}" if path.multi else ""
        rows = self._fetch(
            Statement(
                f"SELECT {rank}, c.v, c.d FROM ({walked}) c WHERE {tests.sql}{first} LIMIT {int(limit)}",
                (*after.parameters, *tests.parameters),
            )
        )
        if len(rows) < limit and self._number(Statement(walked, after.parameters)) == BUDGET:
            return None
        return rows

    def _bounds(self, path: Path, sort: SortKey) -> Statement:
        """What the filter says of the values that are walked: a range sorted by itself begins where it begins."""
        nodes = self._node.children if isinstance(self._node, All) else (self._node,)
        found = [bound for node in nodes for bound in (node.bounds if isinstance(node, Range) else (node,))]
        mine = [one for one in found if isinstance(one, Compare) and (one.path, one.kind) == (sort.path, path.kind)]
        if path.multi or not mine:
            return Statement("")
        within = bounded(tuple(mine), "v")
        return Statement(f" AND {within.sql}", within.parameters)

    def _is_first(self, path: Path, sort: SortKey) -> str:
        """Of a document's several values at the path only the least counts, or the greatest when descending."""
        others = [one for one in self._compiler.sortable(sort.path) if one.p != path.p]
        before = [o.p for o in others if (KIND_ORDER[o.kind] > KIND_ORDER[path.kind]) == sort.descending]
        sign = ">" if sort.descending else "<"
        same = f"NOT EXISTS (SELECT 1 FROM facts WHERE d=c.d AND p={path.p} AND v{sign}c.v)"
        numbers = ",".join(map(str, before))
        return same + (f" AND NOT EXISTS (SELECT 1 FROM facts WHERE d=c.d AND p IN ({numbers}))" if numbers else "")

    def _missing(self, sort: SortKey, limit: int, start: Cursor | None) -> list[tuple[int, Any, int]] | None:
        """Those without a value, or with null: of several values null is the least."""
        paths = self._compiler.sortable(sort.path)
        valued = [path for path in paths if path.kind != "null"]
        if valued and not any(path.multi for path in paths) and sum(path.n for path in valued) == self._alive():
            return []
        has_value = f"EXISTS (SELECT 1 FROM facts WHERE d=c.d AND p IN ({','.join(str(path.p) for path in valued) or '0'}))"
        lacking = [f"NOT {has_value}"]
        null = next((path for path in paths if path.kind == "null"), None)
        if null is not None and null.multi and not sort.descending:
            lacking.append(f"EXISTS (SELECT 1 FROM facts WHERE d=c.d AND p={null.p})")
        order, sign = ("DESC", "<") if sort.descending else ("ASC", ">")
        after = Statement("")
        if start is not None:
            if start.key[0] == 0:
                after = Statement(f" AND seq {sign} ?", (start.tie,))
            elif not sort.descending:
                return []
        everything = self._compiler.all_documents()
        walked = f"{everything.sql}{after.sql} ORDER BY seq {order} LIMIT {BUDGET}"
        tests = self._compiler.test(self._node, "c.d")
        rows = self._fetch(
            Statement(
                f"SELECT 0, 0, c.d FROM ({walked}) c WHERE ({' OR '.join(lacking)}) AND {tests.sql} LIMIT {int(limit)}",
                (*after.parameters, *tests.parameters),
            )
        )
        if len(rows) < limit and self._number(Statement(walked, after.parameters)) == BUDGET:
            return None
        return rows

    def _documents(self, seqs: list[int]) -> list[msgspec.Raw]:
        if not seqs:
            return []
        marks = ",".join(map(str, seqs))
        rows = self._fetch(Statement(f"SELECT seq, document, snapshot FROM datafiles WHERE seq IN ({marks})"))
        snapshots = ",".join({str(snapshot) for _, _, snapshot in rows if snapshot is not None})
        contents = self._fetch(Statement(f"SELECT snapshot, content FROM snapshots WHERE snapshot IN ({snapshots})"))
        content_of = dict(contents)
        documents = {seq: joined_json(document, content_of.get(snapshot)) for seq, document, snapshot in rows}
        return [documents[seq] for seq in seqs]


def _counted(snapshot: Path) -> str:
    """Over `t`, terms of snapshots: how many documents have each, `f.n`; only while those are counted one by one."""
    return f"FROM terms t CROSS JOIN facets f WHERE t.d<0 AND f.p={snapshot.p} AND f.v=-t.d"
