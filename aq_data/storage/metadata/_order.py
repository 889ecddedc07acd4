"""In which order documents of a set are found, a page at a time: sorted, in order of saving, or walked as asked for.

A small set is sorted. Of a large one the documents are walked in the order asked for, each tested, until the page is full:
cheap where many match, endless where those that match stand at the far end. So the walk has a budget, and where that is
spent the whole set is sorted after all. By `created_at` the order of saving will do, which every index ends in.
"""

from __future__ import annotations

import sqlite3
from typing import Any

from aq_data.models.paths import SortKey
from aq_data.models.query import All, Compare, Node
from aq_data.models.terms import KIND_ORDER
from aq_data.storage.metadata._catalog import Catalog, Path
from aq_data.storage.metadata._sql import Compiler, Range, Statement, bounded
from aq_data.storage.metadata.cursors import Cursor

__all__ = ["BUDGET", "ENDLESS", "EXACT_TOTAL", "Order", "Plain", "Row", "fetch", "number"]

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
ENDLESS = 1 << 60

Plain = Node | Range

Row = tuple[int, Any, int]
"""Rank of the kind, value, position."""


def fetch(connection: sqlite3.Connection, statement: Statement) -> list[tuple[Any, ...]]:
    """The rows of a statement."""
    return connection.execute(statement.sql, statement.parameters).fetchall()


def number(connection: sqlite3.Connection, statement: Statement, limit: int | None = None) -> int:
    """How many rows a statement has; no further than `limit`."""
    capped = statement.sql if limit is None else f"SELECT 1 FROM ({statement.sql}) LIMIT {limit}"
    return int(fetch(connection, Statement(f"SELECT count(*) FROM ({capped})", statement.parameters))[0][0])


class Order:
    """The order of one question's answer. `alive`: documents that are not deleted."""

    def __init__(
        self, connection: sqlite3.Connection, compiler: Compiler, catalog: Catalog, node: Plain, alive: int | None
    ) -> None:
        """`alive` is None where deleted documents are asked for, too: then everything is sorted."""
        self._connection, self._compiler, self._catalog = connection, compiler, catalog
        self._node, self._alive = node, alive

    def rows(self, found: Statement, sort: SortKey, limit: int, start: Cursor | None, total: int) -> list[Row]:
        """The next `limit` documents of the set `found` after `start`; `total` of them there are, or ENDLESS."""
        if self._alive is None:
            return self._sort(found, sort, limit, start)
        if total > EASY * limit and sort.path == "created_at":
            saved = self._by_saving(found if total <= BUDGET else None, sort, limit, start)
            if saved is not None:
                return saved
        is_shared = any(path.shared for path in self._compiler.sortable(sort.path))
        if total > SORTED and not is_shared:
            steps = limit * self._alive / total
            if total >= EXACT_TOTAL or steps < FAR * total:
                walked = self._walk(sort, limit, start)
                if walked is not None:
                    return walked
        return self._sort(found, sort, limit, start)

    # --- sorting what was found ------------------------------------------------------------------------------------------

    def _sort(self, found: Statement, sort: SortKey, limit: int, start: Cursor | None) -> list[Row]:
        order = "DESC" if sort.descending else "ASC"
        paths = self._compiler.sortable(sort.path)
        ranks = " ".join(f"WHEN {path.p} THEN {KIND_ORDER[path.kind]}" for path in paths) or "WHEN 0 THEN 0"
        rank = f"CASE s.p {ranks} END"
        numbers = ",".join(str(path.p) for path in paths) or "0"
        of_document = f"FROM facts s WHERE s.d={self._compiler.home('c.d', paths)} AND s.p IN ({numbers})"
        if len(paths) == 1:
            best = f"{of_document} ORDER BY s.v {order} LIMIT 1"
            rank_of, ranked = "", f"CASE WHEN v IS NULL THEN 0 ELSE {KIND_ORDER[paths[0].kind]} END"
        else:
            best = f"{of_document} ORDER BY {rank} {order}, s.v {order} LIMIT 1"
            rank_of, ranked = f"(SELECT {rank} {best}) AS rank, ", "coalesce(rank, 0)"
        after, parameters = "", found.parameters
        if start is not None:
            after = f"WHERE ({ranked}, coalesce(v, 0), d) {'<' if sort.descending else '>'} (?, ?, ?)"
            parameters = (*parameters, *start.key, start.tie)
        return fetch(
            self._connection,
            Statement(
                f"WITH k AS MATERIALIZED (SELECT c.d AS d, {rank_of}(SELECT s.v {best}) AS v FROM ({found.sql}) c) "
                f"SELECT {ranked} AS r, coalesce(v, 0) AS first, d FROM k {after} "
                f"ORDER BY r {order}, first {order}, d {order} LIMIT {int(limit)}",
                parameters,
            ),
        )

    # --- in order of saving -----------------------------------------------------------------------------------------------

    def _by_saving(self, few: Statement | None, sort: SortKey, limit: int, start: Cursor | None) -> list[Row] | None:
        """The next by `created_at`, found in the order of saving, which is nearly the same; None where that does not help.

        Nothing saved later is older by more than the disorder D: once so many are found, and the last one looked at is D
        beyond the last of them, nothing that follows can come before it. `few`: the set, where it is quickly put in order.
        """
        created = self._catalog.path("created_at", "date")
        if created is None or created.multi or created.n != self._alive:
            return None
        disorder = int(fetch(self._connection, Statement("SELECT value FROM progress WHERE name='disorder'"))[0][0])
        rank, order, sign = KIND_ORDER["date"], *(("DESC", "<") if sort.descending else ("ASC", ">"))
        bound = Statement("")
        if start is not None:
            low, high = (
                (start.key[1] - disorder, start.key[1]) if sort.descending else (start.key[1], start.key[1] + disorder)
            )
            last = f"SELECT {'max' if sort.descending else 'min'}(d) FROM terms WHERE p={created.p} AND v>=? AND v<=?"
            bound = Statement(f" AND d {sign}= ({last})", (low, high))
        children = self._node.children if isinstance(self._node, All) and self._node.children else (self._node,)
        lead, rest = self._compiler.in_saving_order(children[0], order, bound), children[1:]
        if lead is None and few is not None:
            sql = f"SELECT d FROM ({few.sql}) WHERE 1{bound.sql} ORDER BY d {order}"
            lead, rest = Statement(sql, (*few.parameters, *bound.parameters)), ()
        if lead is None or disorder > DISORDER:
            return None
        after = f"WHERE (v, d) {sign} (?, ?)" if start is not None else ""
        more = (start.key[1], start.tie) if start is not None else ()
        wanted = 2 * limit
        while wanted <= BUDGET:
            most = BUDGET if rest or after else wanted  # the first few of many are found without putting all in order
            found = self._compiler.those(Statement(f"{lead.sql} LIMIT {most}", lead.parameters), rest)
            dated = f"SELECT c.d AS d, (SELECT v FROM facts WHERE d=c.d AND p={created.p}) AS v FROM ({found.sql}) c"
            sql = f"SELECT v, d FROM ({dated}) {after} LIMIT {wanted}"
            looked = fetch(self._connection, Statement(sql, (*found.parameters, *more)))
            if len(looked) < wanted:
                return None  # few are left, or the budget is spent: sorting or walking tells which
            best = sorted(looked, reverse=sort.descending)[:limit]
            beyond = best[-1][0] - looked[-1][0] if sort.descending else looked[-1][0] - best[-1][0]
            if beyond >= disorder:
                return [(rank, value, d) for value, d in best]
            wanted *= 4
        return None

    # --- walking in order --------------------------------------------------------------------------------------------------

    def _walk(self, sort: SortKey, limit: int, start: Cursor | None) -> list[Row] | None:
        """The next documents, kind by kind of the sort path, then those without; None where the budget is spent."""
        rows: list[Row] = []
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

    def _kind(self, path: Path, sort: SortKey, limit: int, start: Cursor | None) -> list[Row] | None:
        """Those that are sorted by a value of one kind."""
        rank, order, sign = KIND_ORDER[path.kind], *(("DESC", "<") if sort.descending else ("ASC", ">"))
        after = Statement("")
        if start is not None:
            if start.key[0] == rank:
                after = Statement(f" AND (v, d) {sign} (?, ?)", (start.key[1], start.tie))
            elif (start.key[0] < rank) == sort.descending:
                return []
        bounds, rest = self._parted(path, sort)
        within = bounded(bounds, "v")
        after = Statement(f"{' AND ' * bool(bounds)}{within.sql}{after.sql}", (*within.parameters, *after.parameters))
        walked = f"SELECT v, d FROM terms WHERE p={path.p}{after.sql} ORDER BY v {order}, d {order} LIMIT {BUDGET}"
        tests = self._compiler.test(All(rest), "c.d")  # type: ignore[arg-type]
        first = f" AND {self._is_first(path, sort)}" if path.multi else ""
        rows = fetch(
            self._connection,
            Statement(
                f"SELECT {rank}, c.v, c.d FROM ({walked}) c WHERE {tests.sql}{first} LIMIT {int(limit)}",
                (*after.parameters, *tests.parameters),
            ),
        )
        if len(rows) < limit and number(self._connection, Statement(walked, after.parameters)) == BUDGET:
            return None
        return rows

    def _parted(self, path: Path, sort: SortKey) -> tuple[tuple[Compare, ...], tuple[Plain, ...]]:
        """What the filter says of values that are walked, and the rest: a range sorted by itself begins where it does."""
        nodes: tuple[Plain, ...] = self._node.children if isinstance(self._node, All) else (self._node,)
        bounds: list[Compare] = []
        rest: list[Plain] = []
        for node in nodes:
            mine = node.bounds if isinstance(node, Range) else (node,) if isinstance(node, Compare) else ()
            if mine and (mine[0].path, mine[0].kind) == (sort.path, path.kind) and not path.multi:
                bounds += mine
            else:
                rest.append(node)
        return tuple(bounds), tuple(rest)

    def _is_first(self, path: Path, sort: SortKey) -> str:
        """Of a document's several values at the path only the least counts, or the greatest when descending."""
        others = [one for one in self._compiler.sortable(sort.path) if one.p != path.p]
        before = [o.p for o in others if (KIND_ORDER[o.kind] > KIND_ORDER[path.kind]) == sort.descending]
        sign = ">" if sort.descending else "<"
        same = f"NOT EXISTS (SELECT 1 FROM facts WHERE d=c.d AND p={path.p} AND v{sign}c.v)"
        numbers = ",".join(map(str, before))
        return same + (f" AND NOT EXISTS (SELECT 1 FROM facts WHERE d=c.d AND p IN ({numbers}))" if numbers else "")

    def _missing(self, sort: SortKey, limit: int, start: Cursor | None) -> list[Row] | None:
        """Those without a value, or with null: of several values null is the least."""
        paths = self._compiler.sortable(sort.path)
        valued = [path for path in paths if path.kind != "null"]
        if valued and not any(path.multi for path in paths) and sum(path.n for path in valued) == self._alive:
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
        rows = fetch(
            self._connection,
            Statement(
                f"SELECT 0, 0, c.d FROM ({walked}) c WHERE ({' OR '.join(lacking)}) AND {tests.sql} LIMIT {int(limit)}",
                (*after.parameters, *tests.parameters),
            ),
        )
        if len(rows) < limit and number(self._connection, Statement(walked, after.parameters)) == BUDGET:
            return None
        return rows
