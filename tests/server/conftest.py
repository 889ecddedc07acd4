"""A server that the tests of a module share, and a bare HTTP client for it."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from aq_server.commands.serving import running
from services.deployment import PRODUCTION, deployed


@pytest.fixture(scope="module")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the shared server: tests look into it, none damages what another saved."""
    return tmp_path_factory.mktemp("shared") / "data"


@pytest.fixture(scope="module")
def shared(shared_data: Path):
    """The address of a server that lives as long as the module."""
    with running(deployed(shared_data)) as url:
        yield url


@pytest.fixture(scope="module")
def wire(shared: str):
    """HTTP as any program would speak it, with nothing of aq-data's client in between."""
    with httpx.Client(base_url=shared, timeout=60, verify=False) as client:  # reading CA certificates takes 30 ms
        yield client


@pytest.fixture(params=["--url"] if PRODUCTION else ["--data", "--url"])
def where(request: pytest.FixtureRequest, data: Path) -> list[str]:
    """Flags of a user's command that lead to `data`: as a folder, or through a server."""
    return ["--data", str(data)] if request.param == "--data" else ["--url", request.getfixturevalue("server")]


@pytest.fixture
def own(server: str):
    """The same for the server of this test alone, whose folder is `data`."""
    with httpx.Client(base_url=server, timeout=60, verify=False) as client:
        yield client
