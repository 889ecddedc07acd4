"""The addresses of the HTTP interface: what client and server must agree on."""

from __future__ import annotations

from urllib.parse import quote

__all__ = [
    "API",
    "COUNT",
    "DATAFILES",
    "DISTINCT",
    "SEARCH",
    "SERVER_NAME",
    "array_path",
    "datafile_path",
    "file_path",
]

API = "/api/v1"
DATAFILES = f"{API}/datafiles"
SEARCH = f"{API}/search"
COUNT = f"{API}/search/count"
DISTINCT = f"{API}/search/distinct"

SERVER_NAME = "aq-data"
"""The `Server` header, by which a client makes sure that what answers is aq-data."""


def datafile_path(id: str) -> str:
    return f"{DATAFILES}/{quote(id, safe='')}"


def array_path(id: str, name: str) -> str:
    return f"{datafile_path(id)}/arrays/{quote(name, safe='')}"


def file_path(id: str, name: str) -> str:
    return f"{datafile_path(id)}/files/{quote(name, safe='')}"
