"""SQLite keeps the history of records: on a file, in memory, and by several stores on one file at once."""

from __future__ import annotations

import pytest
from changes_suite import ChangesTests, DurableChangesTests

from aq_data.storage.metadata.sqlite import SqliteStore


class TestFile(DurableChangesTests):
    """A database in a file, to which any number of stores may be open."""

    @pytest.fixture
    def open_store(self, tmp_path):
        return lambda name: SqliteStore(tmp_path / f"{name}.sqlite")


class TestMemory(ChangesTests):
    """A database that goes with its store."""

    @pytest.fixture
    def open_store(self):
        return lambda name: SqliteStore(None)
