"""Commands of an operator: they open the folder and the database themselves, beside a running server or without one."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from aq_data.errors import ConfigError, ValidationError
from aq_data.models.stores import DEFAULT_STORE
from aq_server.app import Stores, open_stores
from aq_server.config import ServerConfig, load_config
from aq_server.deployment import migrate_metadata
from aq_server.service.collecting import UNKNOWN
from aq_server.service.tokens import redacted

__all__ = ["run_gc", "run_migrate", "run_reindex", "run_token", "run_verify"]

_AGE = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

DAMAGED = 3
"""Exit status of `verify` when something is wrong that it did not repair."""


def parse_age(text: str) -> timedelta:
    """`30m`, `1h`, `7d`."""
    match = _AGE.fullmatch(text)
    if match is None:
        raise ValidationError(f"an age looks like 0s, 30m, 1h or 7d, not {text!r}")
    try:
        return timedelta(**{_UNITS[match[2]]: int(match[1])})
    except OverflowError as exc:
        raise ValidationError(f"the age {text!r} is longer than any clock counts") from exc


def _config(options: argparse.Namespace) -> ServerConfig:
    path = Path(options.config) if options.config else None
    return load_config(path, os.environ, {"data": options.data}).server


def _run(options: argparse.Namespace, work: Callable[[Stores], Awaitable[int]], *, must_exist: bool = True) -> int:
    config = _config(options)
    folder = Path(config.data).expanduser()
    if must_exist and DEFAULT_STORE not in config.stores and not (folder / "blobs").is_dir():
        raise ConfigError(f"{folder} holds no aq-data; name the folder with --data")

    async def with_stores() -> int:
        stores = open_stores(config)
        try:
            return await work(stores)
        finally:
            await stores.close()

    return asyncio.run(with_stores())


def _print(value: Any, as_json: bool, text: str) -> None:
    sys.stdout.write((msgspec.json.encode(value).decode() if as_json else text) + "\n")


def _in(store: str) -> str:
    return "" if store in ("", DEFAULT_STORE) else f"{store}: "


def run_gc(options: argparse.Namespace) -> int:
    older_than = parse_age(options.older_than).total_seconds()

    async def work(stores: Stores) -> int:
        count = size = kept = 0
        async for orphan in stores.maintenance.gc(older_than, options.delete, options.force):
            count, size, kept = count + 1, size + orphan.size, kept + (orphan.reason == UNKNOWN)
            word = "removed" if orphan.removed else "orphan"
            _print(
                orphan,
                options.json,
                f"{word}  {_in(orphan.store)}{orphan.prefix}  {orphan.size} bytes, {orphan.reason}, {orphan.age:.0f} s old",
            )
        if not options.json:
            word = "removed, or kept where that is said" if kept else "removed"
            word = word if options.delete else "found; --delete removes them"
            print(f"{count} orphan{'s' * (count > 1)} of {size} bytes {word}" if count else "no orphans")
            if kept:
                print(
                    f"{kept} of them look whole, and the database knows nothing of them: was it lost, or is it an old copy? "
                    "They are kept. `aq-data reindex` takes them in; --force removes them"
                )
        return 0

    return _run(options, work)


def run_verify(options: argparse.Namespace) -> int:
    async def work(stores: Stores) -> int:
        kinds: Counter[str] = Counter()
        damaged = False
        async for finding in stores.maintenance.verify(options.repair):
            kinds[finding.kind] += 1
            damaged |= not finding.repaired and finding.kind != "orphan"
            repaired = " (repaired)" if finding.repaired else ""
            _print(finding, options.json, f"{finding.kind}{repaired}  {_in(finding.store)}{finding.id}  {finding.detail}")
        if not options.json:
            print(
                ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "everything is there and unharmed"
            )
        return DAMAGED if damaged else 0

    return _run(options, work)


def run_reindex(options: argparse.Namespace) -> int:
    async def work(stores: Stores) -> int:
        outcomes: Counter[str] = Counter()
        async for entry in stores.reindexing.run():
            outcomes[entry.outcome] += 1
            if options.json or entry.outcome != "known":
                _print(entry, options.json, f"{entry.outcome}  {_in(entry.store)}{entry.id}  {entry.detail}")
        if not options.json:
            print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no blobs")
            print(
                "Not to be had from blobs: the history of changes, changes newer than a metadata copy, tokens (create them "
                "anew), added stores, and tombstones whose blobs are gone."
            )
        return 0

    return _run(options, work)


def run_migrate(options: argparse.Namespace) -> int:
    def told(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {of} documents indexed", end="" if done < of else "\n", file=sys.stderr)

    migration = migrate_metadata(_config(options), dry_run=options.dry_run, told=told)
    lines = [f"version {migration.version} -> {migration.target}, {migration.records} DataFiles"]
    lines += [f"{'would ' if options.dry_run else ''}{step}" for step in migration.steps]
    if migration.backup is not None:
        lines.append(f"the database as it was: {migration.backup}; {migration.way_back}")
    if not migration.steps:
        lines = [f"nothing to do: the database is of version {migration.version}"]
    _print(migration, options.json, "\n".join(lines))
    return 0


def run_token(options: argparse.Namespace) -> int:
    async def work(stores: Stores) -> int:
        if options.action == "create":
            lifetime = parse_age(options.expires) if options.expires else None
            token, secret = await stores.tokens.create(options.name, tuple(options.scope or ("write",)), lifetime)
            _print({**redacted(token), "secret": secret}, options.json, f"{secret}\n(token {token.id}; shown this once)")
        elif options.action == "list":
            for token in await stores.tokens.list():
                ends = f"revoked {token.revoked_at}" if token.revoked_at else f"expires {token.expires_at or 'never'}"
                _print(redacted(token), options.json, f"{token.id}  {token.name:<20}  {','.join(token.scopes):<10}  {ends}")
        else:
            await stores.tokens.revoke(options.id)
            _print({"revoked": options.id}, options.json, f"token {options.id} is refused from now on")
        return 0

    return _run(options, work, must_exist=options.action != "create")
