"""How one question is answered: which index leads, what is counted already, which order the answer is found in (`_order`).

Of a conjunction the smallest set leads, and the rest is tested on each of its documents.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import msgspec

from aq_data.models.matching import outside
from aq_data.models.paths import SortKey
from aq_data.models.query import All, AnyOf, Compare, Element, Exists, Match, Node, Not, check_dimension, quantities_of
from aq_data.models.snapshots import joined_json
from aq_data.models.terms import KIND_ORDER
from aq_data.models.units import QUANTITY
from aq_data.storage.metadata._catalog import Catalog, Path
from aq_data.storage.metadata._order import BUDGET, ENDLESS, EXACT_TOTAL, Order, Plain, fetch, number
from aq_data.storage.metadata._sql import Compiler, Range, Statement
from aq_data.storage.metadata.cursors import Cursor, mark_of
from aq_data.storage.metadata.store import Page

__all__ = ["Question"]

CAP = 2000
"""Sizes of sets that are not known are counted up to here, or up to the smallest one known."""


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
        self._include_deleted, self._mark = include_deleted, mark_of(node, include_deleted)
        self._check_dimensions(node)
        self._node = self._ordered(node)

    # --- what is asked -------------------------------------------------------------------------------------------------

    def page(self, sort: SortKey, limit: int, start: Cursor | None) -> Page:
        """Up to `limit` documents after `start`, and the total."""
        if start is None:
            size, found = self._gather()
        else:
            size, found = start.total if start.total_is_exact else ENDLESS, self._set()
        total, is_exact = min(size, EXACT_TOTAL), size <= EXACT_TOTAL
        alive = None if self._include_deleted else self._alive()
        order = Order(self._connection, self._compiler, self._catalog, self._node, alive)
        rows = order.rows(found, sort, limit + 1, start, size) if limit and size else []
        more = len(rows) > limit
        cursor = None
        if more:
            rank, value, seq = rows[limit - 1]
            cursor = Cursor((rank, value), seq, total, is_exact).encode(sort, self._mark)
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
                own = self._compiler.values_at(numbers)
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
        return fetch(self._connection, statement)

    def _number(self, statement: Statement, limit: int | None = None) -> int:
        return number(self._connection, statement, limit)

    def _alive(self) -> int:
        return int(self._fetch(Statement("SELECT value FROM progress WHERE name='alive'"))[0][0])

    def _gather(self) -> tuple[int, Statement]:
        """The size, ENDLESS where it was not counted, and the set: the positions themselves if they were found to count."""
        found = self._set()
        known = None if self._include_deleted else self._known_count(self._node)
        if known is not None:
            return known, found
        if isinstance(self._node, (Compare, Range)):
            size = self._number_at(self._node, BUDGET + 1)
            return (size if size <= BUDGET else ENDLESS), found
        rows = self._fetch(Statement(f"{found.sql} LIMIT {EXACT_TOTAL + 1}", found.parameters))
        if len(rows) > EXACT_TOTAL:
            return ENDLESS, found
        positions = ",".join(str(row[0]) for row in rows)
        return len(rows), Statement("SELECT value AS d FROM json_each(?)", (f"[{positions}]",))

    def _number_at(self, node: Compare | Range, limit: int | None = None) -> int:
        """How many documents match, or somewhat more than `limit`."""
        size = None if self._repeats(node) else self._compiler.size(node, limit)
        return self._number(self._set(node), limit) if size is None else int(self._fetch(size)[0][0])

    def _count(self, node: Plain) -> int:
        if self._include_deleted:
            return self._number(self._set())
        known = self._known_count(node)
        if known is None and isinstance(node, Not):
            known = self._alive() - self._count(self._ordered(node.child))
        if known is None:
            known = self._number_at(node) if isinstance(node, (Compare, Range)) else self._number(self._set(node))
        return known

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
        if isinstance(node, Compare) and node.kind == "object":
            return ENDLESS  # all that have an object there are looked at
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
        for one in quantities_of(node):
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
            if isinstance(node, Compare) and path is not None and not path.multi and _is_ordered(node):
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
            return path is not None and node.op != "eq" and path.multi
        return isinstance(node, (AnyOf, Exists, Match, Element))

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


def _is_ordered(node: Compare) -> bool:
    """Whether a document without several values at the path has one of this kind at most."""
    return node.kind in KIND_ORDER or node.kind.startswith(QUANTITY)
