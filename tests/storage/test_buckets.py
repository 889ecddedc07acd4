"""Buckets keep the contract of a blob store."""

from __future__ import annotations

import pytest
from blob_suite import BlobStoreTests


@pytest.mark.services
class TestGcs(BlobStoreTests):
    """Blobs in Google Cloud Storage."""

    keeps_targets = False  # the emulator takes no notice of the precondition

    @pytest.fixture
    def open_store(self, gcs):
        return lambda: gcs.place().open()


@pytest.mark.services
class TestS3(BlobStoreTests):
    """Blobs in S3."""

    keeps_targets = False  # neither does this server

    @pytest.fixture
    def open_store(self, s3):
        return lambda: s3.place().open()
