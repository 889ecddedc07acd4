"""Commands of a user that compare DataFiles and look into their past."""

from __future__ import annotations

import argparse

from aq_server.commands.client import _connect, _print

__all__ = ["run_diff", "run_history", "run_revert"]


def run_diff(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        found = client.diff(options.before, options.after)
        if options.json:
            for each in found.to_json():
                _print(each)
        else:
            print(found)
    return 0


def run_history(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        found = client.history(options.id, limit=None)
        if options.json:
            for each in found.to_json():
                _print(each)
        else:
            print(found)
    return 0


def run_revert(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        file = client.revert(options.id, options.revision)
        if options.json:
            _print(file.to_json())
        else:
            print(f"{file.id} is at revision {file.revision}, with the fields and metadata of revision {options.revision}")
    return 0
