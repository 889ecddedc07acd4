"""Snapshots of instruments are stored and indexed once, and nobody who asks can tell."""

from __future__ import annotations

import pytest
from metadata_suite import DurableMetadataStoreTests
from test_metadata_sqlite import plan_of

from aq_data.models import snapshots
from aq_data.storage.metadata.sqlite import SqliteStore


class TestEverythingShared(DurableMetadataStoreTests):
    """The whole contract where also the smallest instruments are snapshots."""

    @pytest.fixture
    def open_store(self, tmp_path, monkeypatch):
        monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 1)
        return lambda name: SqliteStore(tmp_path / f"{name}.sqlite")

    @pytest.fixture(params=["sort", "in turns"])
    def plan(self, request, monkeypatch):
        return plan_of(request.param, monkeypatch)
