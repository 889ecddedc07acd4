"""The tables of the SQLite store, and the statements on sweeps.

`terms(p, v, d)` holds every term of every document, ordered by path and value; `p` is the number of a (path, kind) pair, so
that a comparison never meets a value of another kind; `d` is the document's position in order of saving. It is a view of
two tables (`_generations`). Of a deleted
document the terms stand under -p: counting and walking a positive p meets only documents that are alive. `facts(d, p, v)` is
the same the other way round: what a given document has. The digests of objects, which nobody asks an order of and which are
another one in each document, stand there only, with 0 in place of them among the terms; all other digests the other way.

Large instruments are a row of `snapshots` to which any number of documents refer (models.snapshots). Terms, facts and words
of a snapshot stand there once, under d = -snapshot. A document that has one has none of these itself, but a term of the path
`SNAPSHOT` with the snapshot's number.
"""

from __future__ import annotations

from aq_data.models.datafile import FORMAT

__all__ = [
    "BLOCK_HEADERS",
    "BLOCK_ROWS",
    "DROP_BLOCKS",
    "FORGET_BLOCKS",
    "FORGET_SWEEP",
    "INSERT_BLOCK",
    "INSERT_SWEEP",
    "LATER",
    "PRAGMAS",
    "SCHEMA",
    "SCHEMA_VERSION",
    "SNAPSHOT",
    "SWEEP",
    "TERM_TABLES",
    "UNFINISHED",
    "UNFOLDED_BYTES",
    "UPDATE_SWEEP",
]

SCHEMA_VERSION = 5
"""1: records and terms. 2: sweeps. 3: facts, words and facets beside the terms, pids, changes, snapshots. 4: terms in two
generations. 5: no digests of objects among them."""

TERM_TABLES = ("settled_terms", "recent_terms")
"""What the view `terms` is made of."""

SNAPSHOT = ("", "snapshot")
"""Path and kind of the term that says which snapshot a document has; no filter leads there."""

PRAGMAS = (
    "PRAGMA busy_timeout=10000",
    "PRAGMA journal_mode=WAL",
    # FULL: the commit that publishes is on disk before it is acknowledged; 0.2 ms on the machines measured.
    "PRAGMA synchronous=FULL",
    "PRAGMA cache_size=-64000",
    # A checkpoint writes each changed page once, however often it changed: 32 MB hold several batches of the index.
    "PRAGMA wal_autocheckpoint=8000",
    "PRAGMA mmap_size=8589934592",
    "PRAGMA foreign_keys=ON",
)

RECORDS = (
    # `indexed`: the last position in order of saving that is in the index; `alive`: how many of those are not deleted;
    # `format`: the newest form of documents; `newest`: the last `created_at`; `disorder`: by how much at most, in
    # microseconds, a document's `created_at` is before that of one saved earlier.
    "CREATE TABLE IF NOT EXISTS progress (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "INSERT OR IGNORE INTO progress VALUES ('indexed', 0), ('alive', 0), ('newest', 0), ('disorder', 0), ('recent', 0)",
    f"INSERT OR IGNORE INTO progress VALUES ('format', {FORMAT})",
    "CREATE TABLE IF NOT EXISTS snapshots (snapshot INTEGER PRIMARY KEY, hash TEXT NOT NULL UNIQUE, content BLOB NOT NULL)",
    """CREATE TABLE IF NOT EXISTS datafiles (
        seq INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        revision INTEGER NOT NULL,
        deleted INTEGER NOT NULL,
        attempt TEXT NOT NULL,
        digest TEXT NOT NULL,
        pid TEXT,
        snapshot INTEGER REFERENCES snapshots,
        document BLOB NOT NULL)""",
    "CREATE INDEX IF NOT EXISTS alive ON datafiles (deleted)",
    "CREATE UNIQUE INDEX IF NOT EXISTS pids ON datafiles (pid) WHERE pid IS NOT NULL AND deleted=0",
    "CREATE INDEX IF NOT EXISTS having_snapshots ON datafiles (snapshot) WHERE snapshot IS NOT NULL",
    # `datafile`: the position of the record that was changed to `revision`.
    """CREATE TABLE IF NOT EXISTS changes (
        datafile INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        change BLOB NOT NULL,
        UNIQUE (datafile, revision))""",
    "CREATE TABLE IF NOT EXISTS barred (id TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (id, key)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS tokens (id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, token BLOB NOT NULL)",
)

_TERMS = "(p INTEGER, v NOT NULL, d INTEGER, PRIMARY KEY (p, v, d)) WITHOUT ROWID"
_WORDS = "(text, content='', detail=none, columnsize=0, tokenize='ascii')"
INDEX = (
    # `multi`: some document has several values at the path, so that sorting has to choose among them.
    # `many`: it has too many distinct values for `facets` to count each. `n`: terms there of documents that are alive, which
    # is how many documents unless `multi`. `shared`: some snapshot has a term there, which neither `n` nor `facets` count.
    """CREATE TABLE IF NOT EXISTS paths (
        p INTEGER PRIMARY KEY,
        path TEXT NOT NULL,
        kind TEXT NOT NULL,
        multi INTEGER NOT NULL DEFAULT 0,
        many INTEGER NOT NULL DEFAULT 0,
        shared INTEGER NOT NULL DEFAULT 0,
        n INTEGER NOT NULL DEFAULT 0,
        UNIQUE (path, kind))""",
    *(f"CREATE TABLE IF NOT EXISTS {table} {_TERMS}" for table in TERM_TABLES),
    # SQLite asks both tables through their keys, and walks both at once in their order.
    "CREATE VIEW IF NOT EXISTS terms AS " + " UNION ALL ".join(f"SELECT p, v, d FROM {table}" for table in TERM_TABLES),
    "CREATE TABLE IF NOT EXISTS facts (d INTEGER, p INTEGER, v NOT NULL, PRIMARY KEY (d, p, v)) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS facets (p INTEGER, v NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (p, v)) WITHOUT ROWID",
    # Words come folded and separated by blanks (models.words); beyond ASCII everything is a letter to this tokenizer.
    # Those of deleted documents have a table of their own: a common word is then found without a look at its documents.
    "CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5 " + _WORDS,
    "CREATE VIRTUAL TABLE IF NOT EXISTS buried_words USING fts5 " + _WORDS,
    # Every word there ever was: what a beginning stands for is asked of it, as FTS5 is slow to merge what begins alike.
    "CREATE TABLE IF NOT EXISTS vocabulary (word TEXT PRIMARY KEY) WITHOUT ROWID",
)

SWEEPS = (
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
)

LATER = (
    "CREATE TABLE IF NOT EXISTS stores (name TEXT PRIMARY KEY, store BLOB NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS leases (name TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID",
)
"""Came after version 3 and stand alone, so that they are made wherever they are absent."""

SCHEMA = (*RECORDS, *INDEX, *SWEEPS, f"PRAGMA user_version={SCHEMA_VERSION}")

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
