"""MongoDB keeps the history of records, also by several stores on one database at once."""

from __future__ import annotations

import pytest
from changes_suite import DurableChangesTests


@pytest.mark.services
class TestMongo(DurableChangesTests):
    """One database, to which any number of stores may be open. A document of it has at most 16 MB."""

    holds_larger_ones = False
