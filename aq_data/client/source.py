"""Where data comes from, in a form that travels to other processes."""

from __future__ import annotations

from dataclasses import dataclass

from aq_data.client.http import Http
from aq_data.wire.routes import datafile_path

__all__ = ["Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """How another process comes to the same server: an address or a folder, and a token."""

    target: str
    token: str | None = None

    def http(self) -> Http:
        """The connection of this process to that server, made once and shared."""
        from aq_data.connect import shared_http

        return shared_http(self.target, self.token)

    def address(self, id: str) -> str:
        return f"{self.target}{datafile_path(id)}" if "://" in self.target else f"{self.target}#{id}"
