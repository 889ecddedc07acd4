"""MongoDB keeps the contract of a sweep log, also by several stores on one database at once."""

from __future__ import annotations

import pytest
from sweep_suite import DurableSweepLogTests


@pytest.mark.services
class TestMongo(DurableSweepLogTests):
    """One database, to which any number of stores may be open."""
