"""SQLite keeps the contract of a sweep log: on a file, in memory, and by several stores on one file at once."""

from __future__ import annotations

import pytest
from sweep_suite import DurableSweepLogTests, SweepLogTests

from aq_data.storage.metadata.sqlite import SqliteStore


class TestFile(DurableSweepLogTests):
    """A database in a file, to which any number of stores may be open."""

    @pytest.fixture
    def open_store(self, tmp_path):
        return lambda name: SqliteStore(tmp_path / f"{name}.sqlite")


class TestMemory(SweepLogTests):
    """A database that goes with its store."""

    @pytest.fixture
    def open_store(self):
        return lambda name: SqliteStore(None)
