"""The services that tests start: they answer, and one that is not there says what to do."""

from __future__ import annotations

import pymongo
import pytest
from services import buckets as bucket_service
from services import fetch
from services import mongo as mongo_service


@pytest.mark.services
def test_mongodb_answers_at_its_address(mongo, mongo_database):
    """And with a database that is this test's own."""
    with pymongo.MongoClient(mongo, readConcernLevel="majority") as client:
        things = client[mongo_database]["things"]
        assert things.count_documents({}) == 0
        things.insert_one({"_id": 1, "value": 2**62})
        assert things.find_one() == {"_id": 1, "value": 2**62}


def test_a_service_that_is_not_there_names_the_command_that_brings_it(monkeypatch, tmp_path):
    """Nobody has to know where its programs come from."""
    monkeypatch.setattr(fetch, "MONGO", tmp_path / "mongo-0")
    monkeypatch.setattr(mongo_service, "IN_DOCKER", False)
    assert "mongo-0" in fetch.missing()
    assert "mongo-0" not in fetch.missing("gcs", "s3")
    assert not mongo_service.is_there()
    with pytest.raises(AssertionError, match=r"mongo-0.*make services"), mongo_service.running():
        pass


@pytest.mark.parametrize("service", ["gcs", "s3"])
def test_a_bucket_that_cannot_be_run_names_the_command_too(monkeypatch, tmp_path, service):
    """Of each kind by itself."""
    monkeypatch.setattr(fetch, service.upper(), tmp_path / "absent-1")
    monkeypatch.setattr(bucket_service, service.upper(), tmp_path / "absent-1")
    monkeypatch.delenv(f"AQ_DATA_{service.upper()}", raising=False)
    assert not bucket_service.are_there()
    with pytest.raises(AssertionError, match=r"absent-1.*make services"), getattr(bucket_service, f"{service}_running")():
        pass


def test_an_old_debian_takes_the_library_from_its_own_mirror(monkeypatch, tmp_path):
    """Whichever of the two forms its package sources have; without one the message says what else there is."""
    sources = {
        "one.sources": "Types: deb\nURIs: http://mirror.example/debian/\nSuites: bookworm\n",
        "two.list": "deb [arch=amd64] http://mirror.example/debian bookworm main\n",
        "three.list": "deb http://other.example/ubuntu jammy main\n",
    }
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    for name in ("one.sources", "two.list"):
        monkeypatch.setattr(fetch, "SOURCES", [tmp_path / name])
        assert fetch.debian_mirror() == "http://mirror.example/debian"
    monkeypatch.setattr(fetch, "SOURCES", [tmp_path / "three.list", tmp_path / "absent.list"])
    with pytest.raises(SystemExit, match="AQ_DATA_MONGO=docker"):
        fetch.debian_mirror()
