"""The addresses of the HTTP interface: what client and server must agree on."""

from __future__ import annotations

from urllib.parse import quote

from aq_data.errors import NotFoundError

__all__ = [
    "API",
    "BULK",
    "BULK_BYTES",
    "BULK_DELETE",
    "BULK_GET",
    "BULK_ITEMS",
    "COMPARE",
    "COUNT",
    "DATAFILES",
    "DISTINCT",
    "SEARCH",
    "SERVER_NAME",
    "STORES",
    "SWEEPS",
    "array_path",
    "blocks_path",
    "datafile_path",
    "diff_path",
    "events_path",
    "file_path",
    "preview_path",
    "revert_path",
    "revisions_path",
    "store_path",
    "sweep_path",
    "written_path",
]

API = "/api/v1"
DATAFILES = f"{API}/datafiles"
COMPARE = f"{DATAFILES}/compare"
BULK = f"{DATAFILES}/bulk"
BULK_GET = f"{BULK}/get"
BULK_DELETE = f"{BULK}/delete"
SWEEPS = f"{API}/sweeps"
SEARCH = f"{API}/search"
COUNT = f"{API}/search/count"
DISTINCT = f"{API}/search/distinct"
STORES = f"{API}/stores"

BULK_ITEMS = 1000
"""Items of one bulk request; clients send more in several."""
BULK_BYTES = 16 << 20
"""Its body, which is held in memory; a document larger than that is saved by itself."""

SERVER_NAME = "aq-data"
"""The `Server` header, by which a client makes sure that what answers is aq-data."""


def datafile_path(id: str) -> str:
    """NotFoundError for ids that an address cannot have: it would be that of something else."""
    return f"{DATAFILES}/{_segment(id)}"


def _segment(id: str) -> str:
    if id in ("", ".", ".."):
        raise NotFoundError(f"there is no DataFile {id!r}")
    return quote(id, safe="")


def diff_path(id: str, other: str) -> str:
    return f"{datafile_path(id)}/diff/{_segment(other)}"


def revisions_path(id: str) -> str:
    return f"{datafile_path(id)}/revisions"


def revert_path(id: str) -> str:
    return f"{datafile_path(id)}/revert"


def store_path(name: str) -> str:
    return f"{STORES}/{quote(name, safe='')}"


def array_path(id: str, name: str) -> str:
    return f"{datafile_path(id)}/arrays/{quote(name, safe='')}"


def written_path(id: str, name: str) -> str:
    return f"{array_path(id, name)}/written"


def preview_path(id: str, name: str) -> str:
    return f"{array_path(id, name)}/preview"


def file_path(id: str, name: str) -> str:
    return f"{datafile_path(id)}/files/{quote(name, safe='')}"


def events_path(id: str) -> str:
    return f"{datafile_path(id)}/events"


def sweep_path(id: str, step: str = "") -> str:
    """A sweep, or a step of it: finish, abandon."""
    return f"{SWEEPS}/{quote(id, safe='')}" + (f"/{step}" if step else "")


def blocks_path(id: str) -> str:
    return sweep_path(id, "blocks")
