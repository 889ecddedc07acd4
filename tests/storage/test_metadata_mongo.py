"""MongoDB keeps the contract of a metadata store, lets no error of its own out, and answers by its indexes."""

from __future__ import annotations

import pytest
from metadata_suite import DurableMetadataStoreTests

from aq_data.storage.metadata.mongo import MongoStore


@pytest.mark.services
class TestMongo(DurableMetadataStoreTests):
    """One database, to which any number of stores may be open."""

    @pytest.fixture
    def open_store(self, mongo, mongo_database):
        names = {}
        return lambda name: MongoStore(mongo, f"{mongo_database}-{names.setdefault(name, len(names))}")
