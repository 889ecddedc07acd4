"""What the tests of the MongoDB stores share; those of SQLite have an `open_store` of their own."""

from __future__ import annotations

import pymongo
import pytest

from aq_data.storage.metadata.mongo import MongoStore


@pytest.fixture
def open_store(mongo, mongo_database):
    """Opens another store on the one empty database of the test, whatever the name."""
    return lambda name: MongoStore(mongo, mongo_database)


@pytest.fixture
def behind(mongo, mongo_database):
    """The database of `open_store` without the store."""
    with pymongo.MongoClient(mongo) as client:
        yield client[mongo_database]
