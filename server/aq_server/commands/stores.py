"""Commands that see and change the stores of a server."""

from __future__ import annotations

import argparse

import msgspec

from aq_data.models.stores import StoreStatus
from aq_server.commands.client import _connect, _connect_or_make, _print

__all__ = ["run_store"]


def run_store(options: argparse.Namespace) -> int:
    """`ls`, `add`, `rm`."""
    with (_connect_or_make if options.action == "add" else _connect)(options) as client:
        if options.action == "rm":
            client.remove_store(options.name)
            if not options.json:
                print(f"the store {options.name} is gone; what it may have had of marks and folders is left where it was")
            return 0
        for status in client.stores() if options.action == "ls" else [client.add_store(options.name, options.root)]:
            if options.json:
                _print(msgspec.to_builtins(status))
            else:
                print(_line(status))
    return 0


def _line(status: StoreStatus) -> str:
    more = "" if status.datafiles_is_exact else "+"
    default = f"  default for {', '.join(status.default_for)}" if status.default_for else ""
    return f"{status.name:<20}  {status.root}  {status.datafiles}{more} DataFiles  {status.origin}  {status.state}{default}"
