"""Where a DataFile lies, as its document is answered: kept is a path inside its store, which may move."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from aq_data.models.datafile import DataFile
from aq_data.models.stores import DEFAULT_STORE

__all__ = ["inner_path", "placed", "placed_json"]

Locate = Callable[[str, str], str]
"""From the name of a store and a key in it to the address of the key; "" where there is none."""

_FIELD = b'"path":"'
_TAIL = re.compile(rb'"path":"([^"\\]*)"(?:,"store":"([^"\\]*)")?,"format":\d+\}')


def inner_path(path: str) -> str:
    """The key of the group in its store. Documents older than named stores have its whole address."""
    return "/".join(path.split("/")[-3:])


def placed(document: DataFile, locate: Locate) -> DataFile:
    """The document with the address that the path has now."""
    path = document.path and locate(document.store, inner_path(document.path))
    return document if path == document.path else msgspec.structs.replace(document, path=path)


def placed_json(document: bytes, locate: Locate) -> bytes:
    """As `placed`, from and to JSON, of which only the end is looked at: fields stand in the order of the struct, and
    behind the path comes nothing that a client wrote.
    """
    at = document.rfind(_FIELD)
    found = _TAIL.fullmatch(document, at) if at >= 0 else None
    if found is None:
        return msgspec.json.encode(placed(msgspec.json.decode(document, type=DataFile), locate))
    path, store = found[1].decode(), (found[2] or DEFAULT_STORE.encode()).decode()
    address = path and locate(store, inner_path(path))
    return document[:at] + b'"path":' + msgspec.json.encode(address) + document[found.end(1) + 1 :]
