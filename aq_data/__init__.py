"""aq-data: the data server of a measurement lab, seen from Python.

    client = aq_data.connect("http://host:5000")      # or a folder: no server needed
    file = client.save(dataset, name="T1 vs flux", metadata={"chip": "C7"})
    client.search({"chip": "C7"})[0]["iq"][3, ::2]

Importing this is cheap; the parts load when they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aq_data import errors
    from aq_data.client.bulk import Result
    from aq_data.client.client import Client
    from aq_data.client.datafile import DataFile, Hits
    from aq_data.client.live import Event
    from aq_data.client.sweeps import Sweep
    from aq_data.connecting import connect
    from aq_data.models.difference import MISSING

__all__ = ["MISSING", "Client", "DataFile", "Event", "Hits", "Result", "Sweep", "connect", "errors"]

# `connect` lives in `connecting`: a module of its own name would take the function's place once imported.
_HOMES = {
    "MISSING": "aq_data.models.difference",
    "Client": "aq_data.client.client",
    "DataFile": "aq_data.client.datafile",
    "Event": "aq_data.client.live",
    "Hits": "aq_data.client.datafile",
    "Result": "aq_data.client.bulk",
    "Sweep": "aq_data.client.sweeps",
    "connect": "aq_data.connecting",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module("aq_data.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aq_data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
