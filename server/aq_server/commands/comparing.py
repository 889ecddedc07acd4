"""Commands of a user that compare DataFiles and look into their past."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import msgspec

import aq_data

__all__ = ["run_diff", "run_history", "run_revert"]


def _connect(options: argparse.Namespace) -> aq_data.Client:
    return aq_data.connect(options.url or options.data)


def _print_lines(values: list[Any]) -> None:
    sys.stdout.writelines(msgspec.json.encode(value).decode() + "\n" for value in values)


def run_diff(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        found = client.diff(options.before, options.after)
        if options.json:
            _print_lines(found.to_json())
        else:
            print(found)
    return 0


def run_history(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        found = client.history(options.id, limit=None)
        if options.json:
            _print_lines(found.to_json())
        else:
            print(found)
    return 0


def run_revert(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        file = client.revert(options.id, options.revision)
        if options.json:
            _print_lines([file.to_json()])
        else:
            print(f"{file.id} is at revision {file.revision}, with the fields and metadata of revision {options.revision}")
    return 0
