"""Databases of older versions: refused by name, brought up with a backup, left alone when something stands in the way."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import msgspec
import pytest
from aq_server.__main__ import main
from metadata_suite import EVERYTHING, ids_of, record

from aq_data.errors import ConfigError, ConflictError
from aq_data.models.paths import parse_sort
from aq_data.models.query import parse_filter
from aq_data.storage.metadata import migration
from aq_data.storage.metadata._schema import SCHEMA_VERSION
from aq_data.storage.metadata.migration import migrate
from aq_data.storage.metadata.sqlite import SqliteStore

VERSION_1 = """
CREATE TABLE progress (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO progress VALUES ('indexed', 0);
CREATE TABLE datafiles (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, revision INTEGER NOT NULL, deleted INTEGER NOT NULL,
    attempt TEXT NOT NULL, digest TEXT NOT NULL, document BLOB NOT NULL);
CREATE TABLE paths (p INTEGER PRIMARY KEY, path TEXT NOT NULL, kind TEXT NOT NULL, multi INTEGER NOT NULL DEFAULT 0,
    UNIQUE (path, kind));
CREATE TABLE terms (p INTEGER, v NOT NULL, d INTEGER, PRIMARY KEY (p, v, d)) WITHOUT ROWID;
CREATE TABLE barred (id TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (id, key)) WITHOUT ROWID;
CREATE TABLE tokens (id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, token BLOB NOT NULL);
"""
VERSION_2 = """
CREATE TABLE sweeps (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, plan BLOB NOT NULL, state BLOB NOT NULL,
    pending INTEGER NOT NULL);
CREATE INDEX pending_sweeps ON sweeps (number) WHERE pending;
CREATE TABLE blocks (sweep INTEGER NOT NULL, seq INTEGER NOT NULL, header BLOB NOT NULL, size INTEGER NOT NULL,
    payload BLOB NOT NULL, ref TEXT NOT NULL, UNIQUE (sweep, seq));
"""

VERSION_3 = """
CREATE TABLE old_terms (p INTEGER, v NOT NULL, d INTEGER, PRIMARY KEY (p, v, d)) WITHOUT ROWID;
INSERT INTO old_terms SELECT p, v, d FROM terms;
DROP VIEW terms;
DROP TABLE settled_terms;
DROP TABLE recent_terms;
ALTER TABLE old_terms RENAME TO terms;
DELETE FROM progress WHERE name='recent';
PRAGMA user_version=3;
"""
VERSION_4 = "PRAGMA user_version=4;"
"""Make such a database of one of this version."""


def make_database(path, version, records):
    """A database as a server of that version left it."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.executescript(VERSION_1 + VERSION_2 * (version == 2) + f"PRAGMA user_version={version};")
    for one in records:
        document = one.document
        row = (document.id, document.revision, document.state == "deleted", one.attempt, one.digest)
        connection.execute(
            "INSERT INTO datafiles (id, revision, deleted, attempt, digest, document) VALUES (?, ?, ?, ?, ?, ?)",
            (*row, msgspec.json.encode(document)),
        )
    connection.commit()
    connection.close()


def some_records():
    return [record(name=f"T1 of q{i}", pid=f"pid-{i}" if i % 2 else None, metadata={"n": i}) for i in range(700)]


@pytest.fixture(params=[1, 2])
def old(request, tmp_path):
    """The path of an old database, its version and its records."""
    path = tmp_path / "metadata.sqlite"
    records = [*some_records(), record(state="deleted", name="gone")]
    make_database(path, request.param, records)
    return path, request.param, records


def test_an_old_database_is_refused_with_the_way_out(old):
    """Nothing is opened half understood."""
    with pytest.raises(ConfigError, match="aq-data migrate"):
        SqliteStore(old[0])


def test_a_migrated_database_has_every_record_and_finds_it(old):
    """The same records, indexed anew; tombstones stay tombstones."""
    path, version, records = old
    heard = []
    done = migrate(path, dry_run=False, told=lambda done, of: heard.append((done, of)))
    assert (done.version, done.target, done.records) == (version, SCHEMA_VERSION, len(records))
    assert heard[-1] == (len(records), len(records))

    async def look():
        store = SqliteStore(path)
        try:
            assert [one async for one in store.scan()] == records
            assert await store.count(EVERYTHING) == 700
            page = await store.search(parse_filter({"$text": "q13", "n": {"$gte": 131}}), parse_sort("-n"), 3, None)
            assert ids_of(page) == [one.document.id for one in records[139:136:-1]]
            taken = record(pid="pid-7")
            with pytest.raises(ConflictError, match="pid-7"):
                await store.insert(taken)
        finally:
            await store.close()

    asyncio.run(look())
    assert migrate(path, dry_run=False).steps == ()


@pytest.mark.parametrize(("version", "script"), [(3, VERSION_3), (4, VERSION_4)])
def test_a_database_of_version_3_or_4_is_indexed_anew_and_goes_on(tmp_path, version, script):
    """Its records stay, and what is saved later is found beside them."""
    path = tmp_path / "metadata.sqlite"
    records = some_records()

    async def fill(store, records):
        try:
            for one in records:
                await store.insert(one)
            return await store.count(EVERYTHING)
        finally:
            await store.close()

    asyncio.run(fill(SqliteStore(path), records[:600]))
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()
    assert migrate(path, dry_run=True).steps == ("index every document anew",)
    done = migrate(path, dry_run=False)
    assert (done.version, done.target, done.records) == (version, SCHEMA_VERSION, 600)
    assert asyncio.run(fill(SqliteStore(path), records[600:])) == 700

    async def look():
        store = SqliteStore(path)
        try:
            assert [one async for one in store.scan()] == records
            page = await store.search(parse_filter({"n": {"$gte": 595, "$lt": 605}}), parse_sort("-n"), 10, None)
            assert ids_of(page) == [one.document.id for one in reversed(records[595:605])]
        finally:
            await store.close()

    asyncio.run(look())


def test_large_instruments_that_are_the_same_are_stored_once(tmp_path):
    """Records of old versions share them after the migration, and are as they were."""
    path = tmp_path / "metadata.sqlite"
    settings = {f"s{i}": {"value": i / 7, "unit": "mV"} for i in range(1000)}
    records = [record(name=f"n{i}", instruments={"vna": {"number": i % 2, "settings": settings}}) for i in range(6)]
    records += [record(name="small", instruments={"vna": {"number": 1}})]
    make_database(path, 2, records)
    migrate(path, dry_run=False)

    async def look():
        store = SqliteStore(path)
        try:
            assert [one async for one in store.scan()] == records
            assert await store.count(parse_filter({"instruments.vna.number": 1})) == 4
            assert len(await store.snapshots("default")) == 2
        finally:
            await store.close()

    asyncio.run(look())
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT sum(length(document)) FROM datafiles").fetchone()[0] < 10_000
    connection.close()


def test_the_backup_is_the_way_back(old):
    """Moved back in place it is the old database, whole."""
    path, version, records = old
    backup = migrate(path, dry_run=False).backup
    Path(backup).replace(path)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone()[0] == version
    assert connection.execute("SELECT count(*) FROM datafiles").fetchone()[0] == len(records)
    assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    connection.close()


def test_a_dry_run_says_what_it_would_do_and_changes_nothing(old, capsys):
    """Also by the command line."""
    path, version, _ = old
    before = path.read_bytes()
    assert main(["migrate", "--data", str(path.parent), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"version {version} -> {SCHEMA_VERSION}" in said
    assert "would index every document anew" in said
    assert path.read_bytes() == before
    assert main(["migrate", "--data", str(path.parent)]) == 0
    assert "way back" in capsys.readouterr().out
    assert main(["migrate", "--data", str(path.parent)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_program_reads_where_the_backup_lies(old, capsys):
    """From the JSON form, which has what the words have."""
    path, version, records = old
    assert main(["migrate", "--data", str(path.parent), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["version"], said["target"], said["records"]) == (version, SCHEMA_VERSION, len(records))
    assert Path(said["backup"]).is_file()


def test_a_crash_on_the_way_leaves_the_old_database(old, monkeypatch):
    """The change is one transaction."""
    path, version, records = old

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        migrate(path, dry_run=False, told=stop)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone()[0] == version
    connection.close()
    assert migrate(path, dry_run=False).records == len(records)


def test_a_database_in_use_is_left_alone(old):
    """A server of the old version still has it open."""
    path, version, _ = old
    connection = sqlite3.connect(path)
    connection.execute("SELECT count(*) FROM datafiles").fetchone()
    with pytest.raises(ConfigError, match="stop the server"):
        migrate(path, dry_run=False)
    assert connection.execute("PRAGMA user_version").fetchone()[0] == version
    connection.close()


def test_a_pid_of_two_data_files_is_named_and_nothing_is_changed(tmp_path):
    """Which of them keeps it is for the lab to say."""
    path = tmp_path / "metadata.sqlite"
    first, second = record(pid="same"), record(pid="same")
    make_database(path, 2, [first, second, record(pid="same", state="deleted")])
    for dry_run in (True, False):
        with pytest.raises(ConflictError, match=f"same.*{first.document.id}, {second.document.id}"):
            migrate(path, dry_run=dry_run)
    assert [file.name for file in tmp_path.iterdir() if "version" in file.name] == []


def test_a_database_of_a_later_version_is_refused(tmp_path):
    """By migrate as by the server."""
    path = tmp_path / "metadata.sqlite"
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    for opened in (lambda: migrate(path, dry_run=True), lambda: SqliteStore(path)):
        with pytest.raises(ConfigError, match="use the one that made it"):
            opened()
    with pytest.raises(ConfigError, match="there is no database"):
        migration.migrate(tmp_path / "absent.sqlite", dry_run=True)


def test_documents_of_a_later_form_are_refused_at_the_start(tmp_path):
    """Another server, newer than this one, wrote to the same database."""
    path = tmp_path / "metadata.sqlite"
    asyncio.run(SqliteStore(path).close())
    connection = sqlite3.connect(path)
    connection.execute("UPDATE progress SET value=value+1 WHERE name='format'")
    connection.commit()
    connection.close()
    with pytest.raises(ConfigError, match="use a newer one"):
        SqliteStore(path)
