"""The only place that writes SQL: the schema, and trees of the filter language compiled over the term index.

`terms(p, v, d)` holds every term of every document, ordered by path and value; `p` is the number of a (path, kind) pair, so
that a comparison never meets a value of another kind. `d` is the document's position in order of saving.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import msgspec

from aq_data.errors import QueryError
from aq_data.models.query import All, AnyOf, Compare, Exists, Node, Not
from aq_data.models.terms import KIND_ORDER, SortKey, pack_key, unpack_key

__all__ = ["PRAGMAS", "SCHEMA", "SCHEMA_VERSION", "Cursor", "Statement", "compile_filter", "page_statement"]

SCHEMA_VERSION = 2
"""Version 2 added the tables of sweeps; nothing of version 1 changed, so opening such a database adds them."""

PRAGMAS = (
    "PRAGMA busy_timeout=10000",
    "PRAGMA journal_mode=WAL",
    # FULL: the commit that publishes is on disk before it is acknowledged; 0.2 ms on the machines measured.
    "PRAGMA synchronous=FULL",
    "PRAGMA cache_size=-32000",
    "PRAGMA mmap_size=268435456",
    "PRAGMA foreign_keys=ON",
)

SCHEMA = (
    # `indexed`: the last position in order of saving whose terms are in the index.
    "CREATE TABLE IF NOT EXISTS progress (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT OR IGNORE INTO progress VALUES ('indexed', 0)",
    """CREATE TABLE IF NOT EXISTS datafiles (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        revision INTEGER NOT NULL,
        deleted INTEGER NOT NULL,
        attempt TEXT NOT NULL,
        digest TEXT NOT NULL,
        document BLOB NOT NULL)""",
    # `multi` is set once some document has several values at the path: sorting then has to choose among them.
    """CREATE TABLE IF NOT EXISTS paths (
        p INTEGER PRIMARY KEY,
        path TEXT NOT NULL,
        kind TEXT NOT NULL,
        multi INTEGER NOT NULL DEFAULT 0,
        UNIQUE (path, kind))""",
    "CREATE TABLE IF NOT EXISTS terms (p INTEGER, v NOT NULL, d INTEGER, PRIMARY KEY (p, v, d)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS barred (id TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (id, key)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS tokens (id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, token BLOB NOT NULL)",
    # `datafile`: the position of the record that was changed to `revision`.
    """CREATE TABLE IF NOT EXISTS changes (
        datafile INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        change BLOB NOT NULL,
        UNIQUE (datafile, revision))""",
    # A sweep's plan never changes, its state with every block. `pending`: the background has something to do.
    """CREATE TABLE IF NOT EXISTS sweeps (
        number INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        plan BLOB NOT NULL,
        state BLOB NOT NULL,
        pending INTEGER NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS pending_sweeps ON sweeps (number) WHERE pending",
    """CREATE TABLE IF NOT EXISTS blocks (
        sweep INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        header BLOB NOT NULL,
        size INTEGER NOT NULL,
        payload BLOB NOT NULL,
        ref TEXT NOT NULL,
        UNIQUE (sweep, seq))""",
    f"PRAGMA user_version={SCHEMA_VERSION}",
)

SWEEP = "SELECT s.number, s.plan, s.state, f.deleted FROM sweeps s JOIN datafiles f ON f.id=s.id WHERE s.id=?"
INSERT_SWEEP = "INSERT INTO sweeps (id, plan, state, pending) VALUES (?, ?, ?, ?)"
UPDATE_SWEEP = "UPDATE sweeps SET state=?, pending=? WHERE number=?"
UNFINISHED = "SELECT s.plan, s.state FROM sweeps s JOIN datafiles f ON f.id=s.id WHERE s.pending AND NOT f.deleted"
INSERT_BLOCK = "INSERT INTO blocks (sweep, seq, header, size, payload, ref) VALUES (?, ?, ?, ?, ?, ?)"
BLOCK_ROWS = "SELECT header, payload, ref FROM blocks WHERE sweep=? AND seq>? ORDER BY seq"
BLOCK_HEADERS = "SELECT seq, header FROM blocks WHERE sweep=? AND seq>? ORDER BY seq LIMIT ?"
UNFOLDED_BYTES = "SELECT coalesce(sum(size), 0) FROM blocks WHERE sweep=? AND seq>?"
DROP_BLOCKS = "DELETE FROM blocks WHERE sweep=? AND seq<=?"
FORGET_BLOCKS = "DELETE FROM blocks WHERE sweep IN (SELECT number FROM sweeps WHERE id=?)"
FORGET_SWEEP = "DELETE FROM sweeps WHERE id=?"


@dataclass(frozen=True, slots=True)
class Statement:
    """SQL text and its parameters in order."""

    sql: str
    parameters: tuple[Any, ...] = ()


_TERM_PATH = "(SELECT p FROM paths WHERE path=? AND kind=?)"
_OPERATORS = {"eq": "=", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


def compile_filter(node: Node, *, probe: bool = False) -> Statement:
    """A boolean expression over the alias `f` of `datafiles`.

    By default each comparison becomes the set of its documents, which SQLite intersects: right when few match. With
    `probe` an equality is looked up for each candidate instead: right when the candidates are walked in sort order.
    """
    if isinstance(node, All):
        return _join(" AND ", node.children, "1", probe)
    if isinstance(node, AnyOf):
        return _compile_any(node, probe)
    if isinstance(node, Not):
        inner = compile_filter(node.child, probe=probe)
        return Statement(f"NOT ({inner.sql})", inner.parameters)
    if isinstance(node, Exists):
        return Statement("f.seq IN (SELECT d FROM terms WHERE p IN (SELECT p FROM paths WHERE path=?))", (node.path,))
    return _compile_compare(node, probe)


def _compile_compare(node: Compare, probe: bool) -> Statement:
    parameters = (node.path, node.kind, node.value)
    if probe and node.op == "eq":
        return Statement(f"EXISTS (SELECT 1 FROM terms WHERE p={_TERM_PATH} AND v=? AND d=f.seq)", parameters)
    return Statement(f"f.seq IN (SELECT d FROM terms WHERE p={_TERM_PATH} AND v{_OPERATORS[node.op]}?)", parameters)


def _compile_any(node: AnyOf, probe: bool) -> Statement:
    """Alternatives; equalities on one path are one IN list, which keeps long `$in` lists within SQLite's depth."""
    equal = [c for c in node.children if isinstance(c, Compare) and c.op == "eq"]
    rest = tuple(c for c in node.children if not (isinstance(c, Compare) and c.op == "eq"))
    parts: list[Statement] = []
    for (path, kind), group in groupby(sorted(equal, key=lambda c: (c.path, c.kind)), key=lambda c: (c.path, c.kind)):
        values = tuple(c.value for c in group)
        marks = ",".join("?" * len(values))
        parts.append(
            Statement(f"f.seq IN (SELECT d FROM terms WHERE p={_TERM_PATH} AND v IN ({marks}))", (path, kind, *values))
        )
    if rest or not parts:
        parts.append(_join(" OR ", rest, "0", probe))
    sql = " OR ".join(part.sql for part in parts)
    return Statement(f"({sql})", tuple(value for part in parts for value in part.parameters))


def _join(word: str, children: tuple[Node, ...], empty: str, probe: bool) -> Statement:
    parts = [compile_filter(child, probe=probe) for child in children]
    sql = "(" + word.join(part.sql for part in parts) + ")" if parts else empty
    return Statement(sql, tuple(value for part in parts for value in part.parameters))


@dataclass(frozen=True, slots=True)
class Cursor:
    """The last row of a page: its sort key and position. The text form is opaque to clients."""

    key: tuple[int, Any]
    seq: int

    def encode(self, sort: SortKey) -> str:
        """Base64 text that also names the sort it belongs to."""
        parts = [sort.path, sort.descending, pack_key(self.key), self.seq]
        return base64.urlsafe_b64encode(msgspec.json.encode(parts)).decode("ascii").rstrip("=")

    @classmethod
    def decode(cls, text: str, sort: SortKey) -> Cursor:
        """QueryError (`bad_cursor`) unless `text` was made by `encode` for the same sort."""
        try:
            raw = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
            path, descending, key, seq = msgspec.json.decode(raw, type=tuple[str, bool, str, int])
            cursor = cls(unpack_key(key), seq)
        except (ValueError, IndexError, msgspec.DecodeError) as exc:
            raise QueryError("the cursor is not one that this server gave", code="bad_cursor") from exc
        is_text = isinstance(cursor.key[1], str)
        if cursor.key[0] not in KIND_ORDER.values() or is_text != (
            cursor.key[0] in (KIND_ORDER["text"], KIND_ORDER["complex"])
        ):
            raise QueryError("the cursor is not one that this server gave", code="bad_cursor")
        if (path, descending) != (sort.path, sort.descending) or not -(1 << 63) <= seq < 1 << 63:
            raise QueryError("the cursor belongs to another sort; repeat the search it came from", code="bad_cursor")
        return cursor

    def is_after(self, key: tuple[int, Any], seq: int, sort: SortKey) -> bool:
        """Whether a row with `key` at `seq` comes behind this cursor."""
        mine, other = (self.key, self.seq), (key, seq)
        return other < mine if sort.descending else other > mine


def page_statement(
    where: Statement, sort: SortKey, paths: list[tuple[int, str, int]], limit: int, cursor: Cursor | None
) -> Statement:
    """Rows (rank, v, seq, document) of one page in order, walking the term index of the sort path.

    `paths` are the (p, kind, multi) rows of that path. One branch per kind present and one for documents without a value,
    each limited, merged by SQLite.
    """
    sortable = [(p, kind) for p, kind, _ in paths if kind in KIND_ORDER]
    multi = any(flag for _, _, flag in paths)
    branches: list[Statement] = []
    if multi:
        branches.append(_several(sortable, sort, limit, where, cursor))
    else:
        for p, kind in sortable:
            if kind != "null":
                branches.append(_walk(p, KIND_ORDER[kind], sort, limit, where, cursor))
    absent = [p for p, kind in sortable if multi or kind != "null"]
    branches.append(_without(absent, sort, limit, where, cursor))
    order = "DESC" if sort.descending else "ASC"
    union = " UNION ALL ".join(f"SELECT * FROM ({branch.sql})" for branch in branches)
    return Statement(
        f"SELECT r, v, seq, document FROM ({union}) ORDER BY r {order}, v {order}, seq {order} LIMIT {int(limit)}",
        tuple(value for branch in branches for value in branch.parameters),
    )


def _after(rank: str, value: str, seq: str, sort: SortKey, cursor: Cursor | None) -> Statement:
    if cursor is None:
        return Statement("1")
    sign = "<" if sort.descending else ">"
    return Statement(f"({rank}, {value}, {seq}) {sign} (?, ?, ?)", (cursor.key[0], cursor.key[1], cursor.seq))


def _walk(p: int, rank: int, sort: SortKey, limit: int, where: Statement, cursor: Cursor | None) -> Statement:
    order = "DESC" if sort.descending else "ASC"
    after = Statement("1")
    if cursor is not None:
        behind = cursor.key[0] < rank if not sort.descending else cursor.key[0] > rank
        if cursor.key[0] == rank:
            sign = "<" if sort.descending else ">"
            after = Statement(f"(t.v, t.d) {sign} (?, ?)", (cursor.key[1], cursor.seq))
        elif not behind:
            after = Statement("0")
    return Statement(
        f"SELECT {rank} AS r, t.v AS v, f.seq AS seq, f.document AS document FROM terms t CROSS JOIN datafiles f "
        f"ON f.seq=t.d WHERE t.p={int(p)} AND {after.sql} AND {where.sql} "
        f"ORDER BY t.v {order}, t.d {order} LIMIT {int(limit)}",
        (*after.parameters, *where.parameters),
    )


def _several(
    sortable: list[tuple[int, str]], sort: SortKey, limit: int, where: Statement, cursor: Cursor | None
) -> Statement:
    """For paths where a document may have several values: the least, or the greatest when descending."""
    order = "DESC" if sort.descending else "ASC"
    ranks = " ".join(f"WHEN {int(p)} THEN {KIND_ORDER[kind]}" for p, kind in sortable) or "WHEN 0 THEN 0"
    marks = ",".join(str(int(p)) for p, _ in sortable) or "0"
    after = _after("b.r", "b.v", "b.d", sort, cursor)
    best = (
        f"SELECT r, v, d, ROW_NUMBER() OVER (PARTITION BY d ORDER BY r {order}, v {order}) AS n FROM "
        f"(SELECT CASE p {ranks} END AS r, v, d FROM terms WHERE p IN ({marks}))"
    )
    return Statement(
        f"SELECT b.r AS r, b.v AS v, f.seq AS seq, f.document AS document FROM ({best}) b JOIN datafiles f ON f.seq=b.d "
        f"WHERE b.n=1 AND {after.sql} AND {where.sql} ORDER BY b.r {order}, b.v {order}, b.d {order} LIMIT {int(limit)}",
        (*after.parameters, *where.parameters),
    )


def _without(present: list[int], sort: SortKey, limit: int, where: Statement, cursor: Cursor | None) -> Statement:
    order = "DESC" if sort.descending else "ASC"
    after = _after("0", "0", "f.seq", sort, cursor)
    marks = ",".join(str(int(p)) for p in present)
    lacking = f"f.seq NOT IN (SELECT d FROM terms WHERE p IN ({marks}))" if present else "1"
    return Statement(
        f"SELECT 0 AS r, 0 AS v, f.seq AS seq, f.document AS document FROM datafiles f "
        f"WHERE {lacking} AND {after.sql} AND {where.sql} ORDER BY f.seq {order} LIMIT {int(limit)}",
        (*after.parameters, *where.parameters),
    )
