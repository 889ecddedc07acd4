"""`aq-data migrate` on MongoDB: what a server does when it opens a database of an older version, with a backup first."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest
from aq_server.__main__ import main
from metadata_suite import changed, expected_ids, insert_all, pages, record, within
from test_metadata_mongo import _as_version_2, _as_version_3

from aq_data.errors import ConfigError, UnavailableError
from aq_data.models.paths import parse_sort
from aq_data.storage.metadata import _mongo_schema, mongo_migration
from aq_data.storage.metadata._mongo_border import open_client
from aq_data.storage.metadata._mongo_records import SCHEMA_VERSION
from aq_data.storage.metadata.mongo_migration import PATIENT, migrate_mongo

STEPS = {
    3: ["store days, and numbers a second time (19 DataFiles)", "build the indexes of this version"],
    2: [
        "store times as numbers (20 DataFiles)",
        "store days, and numbers a second time (19 DataFiles)",
        "build the indexes of this version",
    ],
}
"""For 20 records, of which one is a tombstone."""


def everything(database):
    """Every document and index of a database, by collection."""
    return {
        name: (list(database[name].find().sort("_id", 1)), sorted(database[name].index_information()))
        for name in database.list_collection_names()
    }


def backups(database):
    return [name for name in database.list_collection_names() if name.startswith("datafiles.")]


@pytest.fixture(autouse=True)
def _without_backups(request):
    if "behind" in request.fixturenames:
        database = request.getfixturevalue("behind")
        for name in backups(database):
            database.drop_collection(name)


@pytest.fixture
def migrating(mongo, mongo_database, tmp_path, capsys):
    """Runs the command as an operator does, on a folder without a database; what it printed."""
    config, address = tmp_path / "c.json", tmp_path / "mongo"
    address.write_text(mongo)
    server = {"data": str(tmp_path), "mongo_file": str(address), "mongo_database": mongo_database}
    config.write_text(json.dumps({"server": server}))

    def run(*flags, status=0):
        assert main(["migrate", "--config", str(config), *flags]) == status
        said = capsys.readouterr()
        return said.err if status else said.out

    return run


@pytest.fixture(params=[2, 3])
def old(request, open_store, behind):
    """An old database: its version and its records, one of them a tombstone."""
    records = [record(name=f"T{i}", pid=f"pid-{i}" if i % 2 else None, metadata={"n": i}) for i in range(20)]
    gone = changed(records[0], state="deleted", pid=None)

    async def save(store):
        await insert_all(store, records)
        assert await store.replace(gone, 1)
        await store.bar(record().document.id, "key")

    within(open_store, save)
    (_as_version_2 if request.param == 2 else _as_version_3)(behind)
    return request.param, [gone, *records[1:]]


@pytest.mark.services
def test_a_dry_run_says_what_it_would_do_and_changes_nothing(old, behind, migrating):
    """Not even the version."""
    version, records = old
    before = everything(behind)
    said = migrating("--dry-run").splitlines()
    assert said == [
        f"version {version} -> {SCHEMA_VERSION}, {len(records)} DataFiles",
        *(f"would {step}" for step in STEPS[version]),
    ]
    assert everything(behind) == before


@pytest.mark.services
def test_a_migrated_database_has_every_record_finds_it_and_leaves_a_backup(old, open_store, behind, migrating):
    """The backup is what was there before; once more there is nothing to do, and no second one."""
    version, records = old
    before = everything(behind)["datafiles"][0]
    said = migrating().splitlines()
    [backup] = backups(behind)
    assert backup.startswith(f"datafiles.version-{version}.")
    assert said[:-1] == [f"version {version} -> {SCHEMA_VERSION}, {len(records)} DataFiles", *STEPS[version]]
    assert backup in said[-1]
    assert "way back" in said[-1]
    assert everything(behind)[backup][0] == before

    async def look(store):
        sort = parse_sort("-created_at")
        assert [one async for one in store.scan()] == records
        query = {"n": {"$gte": 7}}
        assert await pages(store, query, sort, 5) == expected_ids(records, query, sort)

    migrated = everything(behind)
    assert behind["meta"].find_one({"_id": "schema"})["version"] == SCHEMA_VERSION
    within(open_store, look)
    assert everything(behind) == migrated, "nothing is left for a server to do"
    for flags in ((), ("--dry-run",)):
        assert migrating(*flags) == f"nothing to do: the database is of version {SCHEMA_VERSION}\n"
    assert everything(behind) == migrated


@pytest.mark.services
def test_the_backup_is_the_way_back(old, behind, migrating):
    """As it is told: renamed, and the version with it. It can be migrated again."""
    version, _ = old
    before = everything(behind)["datafiles"][0]
    done = json.loads(migrating("--json"))
    assert (done["version"], done["target"], done["records"], done["steps"]) == (version, 4, 20, STEPS[version])
    behind[done["backup"]].rename("datafiles", dropTarget=True)
    behind["meta"].update_one({"_id": "schema"}, {"$set": {"version": version}})
    assert everything(behind)["datafiles"][0] == before
    again = json.loads(migrating("--json"))
    assert again["steps"] == done["steps"]


@pytest.mark.services
def test_nothing_is_changed_before_the_backup_is_there(old, behind, mongo, mongo_database, monkeypatch):
    """And what is interrupted after that is done by the next."""

    async def no_room(*_):
        raise UnavailableError("as if the disk were full")

    before = everything(behind)
    with monkeypatch.context() as patch:
        patch.setattr(mongo_migration, "_back_up", no_room)
        with pytest.raises(UnavailableError, match="disk"):
            asyncio.run(migrate_mongo(mongo, mongo_database, dry_run=False))
    assert everything(behind) == before
    with monkeypatch.context() as patch:
        patch.setattr(_mongo_schema, "_index", no_room)
        with pytest.raises(UnavailableError, match="disk"):
            asyncio.run(migrate_mongo(mongo, mongo_database, dry_run=False))
    [backup] = backups(behind)
    assert everything(behind)[backup][0] == before["datafiles"][0]
    assert behind["meta"].find_one({"_id": "schema"})["version"] == old[0]
    assert asyncio.run(migrate_mongo(mongo, mongo_database, dry_run=False)).steps
    assert behind["meta"].find_one({"_id": "schema"})["version"] == SCHEMA_VERSION


@pytest.mark.services
@pytest.mark.parametrize("newer", [{"version": SCHEMA_VERSION + 1}, {"format": 99}], ids=str)
def test_a_database_of_a_later_version_or_none_is_refused(behind, migrating, newer):
    """By migrate as by the server, and nothing is made."""
    for flags in ((), ("--dry-run",)):
        before = everything(behind)
        assert "there is no database" in migrating(*flags, status=1)
        assert everything(behind) == before
    behind["meta"].insert_one({"_id": "schema", "version": SCHEMA_VERSION, "format": 1, **newer})
    for flags in ((), ("--dry-run",)):
        before = everything(behind)
        assert "use the one that made it" in migrating(*flags, status=1)
        assert everything(behind) == before


def test_it_connects_as_a_server_does(tmp_path):
    """A certificate that is not there is named; a database that does not answer is unavailable, soon and without its secret."""
    options = f"tls=true&tlsCertificateKeyFile={tmp_path}/absent.pem&authMechanism=MONGODB-X509"
    with pytest.raises(ConfigError, match=r"absent\.pem cannot be read"):
        asyncio.run(migrate_mongo(f"mongodb://db.example/?{options}", "aq_data", dry_run=True))
    # As a process: the driver leaves the socket that it was about to connect to Python's collector.
    environment = {**os.environ, "AQ_DATA_SERVER__MONGO": "mongodb://lab:s3cret@127.0.0.1:1/?serverSelectionTimeoutMS=50"}
    command = [sys.executable, "-m", "aq_server", "migrate", "--data", str(tmp_path), "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "the metadata database failed" in done.stderr
    assert "s3cret" not in done.stderr


@pytest.mark.parametrize("options", ["", "?socketTimeoutMS=5000&wtimeoutMS=5000"])
def test_it_waits_for_a_large_copy_as_long_as_it_takes(options):
    """A server gives up after the time in its address, or 20 s; where the database is down, both do."""
    client = open_client(f"mongodb://db.example/{options}", **PATIENT)
    assert client.options.pool_options.socket_timeout is None
    assert not client.write_concern.document["wtimeout"]
    assert client.options.server_selection_timeout == 3
    assert client.write_concern.document["w"] == "majority"
