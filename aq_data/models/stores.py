"""Named stores: what they are called, where they may lie. Pure.

A root is where a store lies, in one form: `/data/archive`, `gs://bucket/prefix`, `s3://bucket/prefix`, or `memory:`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath
from typing import Literal

import msgspec

from aq_data.errors import ValidationError
from aq_data.models.structs import resolve

__all__ = [
    "DEFAULT_STORE",
    "MEMORY",
    "AddedStore",
    "StoreStatus",
    "allowing",
    "check_store_name",
    "kind_of_root",
    "normal_allowance",
    "normal_root",
    "overlap",
]

DEFAULT_STORE = "default"
"""The store of all DataFiles that say nothing else, also of those that are older than named stores."""
MEMORY = "memory:"
"""The root of stores that go with the process. No two of them are the same place."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]", re.ASCII)
_ANY = "*"


class AddedStore(msgspec.Struct, frozen=True):
    """A store that an admin added. `closing` is set by whoever is about to take it away: nothing new is saved there then."""

    name: str
    root: str
    closing: str = ""


class StoreStatus(msgspec.Struct, frozen=True):
    """A store as it is told of: `kind` is folder, gs, s3 or memory; `default_for` the kinds of DataFiles that go there
    without a word, `*` for all others; `datafiles` how many lie there, exact up to 10,000; `state` is "ok", "closing" while
    it is being taken away, or what is wrong. `fallback` is the store that takes new DataFiles while this one does not
    answer, "" for none; `waiting` how many lie elsewhere until they are brought here.
    """

    name: str
    kind: str
    root: str
    origin: Literal["configured", "added"]
    default_for: list[str]
    datafiles: int
    datafiles_is_exact: bool
    state: str
    fallback: str = ""
    waiting: int = 0


def check_store_name(name: str) -> None:
    """Refuse what could not stand in an address, a configuration key or a list."""
    if not _NAME.fullmatch(name):
        raise ValidationError(
            f"the store name {name[:80]!r} cannot be used: 1 to 64 small letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit",
            code="bad_name",
        )


def normal_root(url: str) -> str:
    """The one form of a root; ValidationError for what is none, or climbs (`..`), or has an empty segment in a bucket."""
    if url == MEMORY:
        return MEMORY
    if not url.isprintable() or _ANY in url:
        raise ValidationError(f"a store cannot lie in {url[:200]!r}: it has characters that no root has")
    scheme, is_bucket, rest = url.partition("://")
    if is_bucket and "@" in rest:  # not shown: what stands before it may be a secret
        raise ValidationError("the address of a store holds no credentials; name a file that has them in the configuration")
    if is_bucket:
        return _normal_bucket(url, scheme, rest)
    path = PurePath(url)
    if not path.is_absolute() or ".." in path.parts:
        raise ValidationError(f"a store lies in an absolute folder without `..`, gs://… or s3://…, not in {url[:200]!r}")
    return re.sub("^/+", "/", str(path))


def _normal_bucket(url: str, scheme: str, rest: str) -> str:
    bucket, *segments = rest.rstrip("/").split("/")
    if scheme not in ("gs", "s3") or not _BUCKET.fullmatch(bucket):
        raise ValidationError(f"a bucket is gs://name/prefix or s3://name/prefix, not {url[:200]!r}")
    if any(segment in ("", ".", "..") or set(segment) & set("?#\\") for segment in segments):
        raise ValidationError(f"the prefix of {url[:200]!r} has a segment that is empty, `.`, `..` or has one of ? # \\")
    return "/".join((f"{scheme}://{bucket}", *segments))


def normal_allowance(entry: str) -> str:
    """The one form of an entry that allows roots: a root, which allows itself and all below; with `*` at its end it
    allows whatever begins so, as `gs://lab-*` does.
    """
    if not entry.endswith(_ANY):
        return normal_root(entry)
    before = entry.removesuffix(_ANY)
    parent, slash, start = before.rpartition("/")
    if parent in ("gs:/", "s3:/"):
        if start and not _BUCKET.fullmatch(f"{start}xxx"):
            raise ValidationError(f"{entry[:200]!r} allows no bucket: {start!r} begins none")
        return entry
    if not slash or start in (".", ".."):
        raise ValidationError(f"{entry[:200]!r} allows nothing: before its `*` stands the beginning of a root")
    above = normal_root(parent) if parent else ""
    if start:
        normal_root(f"{above}/{start}")
    return f"{above}/{start}{_ANY}"


def allowing(root: str, entries: Iterable[str]) -> str | None:
    """The longest of the entries (in their one form) that allows a root, or None."""
    return max((entry for entry in entries if _allows(entry, root)), key=len, default=None)


def _allows(entry: str, root: str) -> bool:
    return root.startswith(entry.removesuffix(_ANY)) if entry.endswith(_ANY) else _is_below(root, entry)


def _is_below(root: str, other: str) -> bool:
    """Whether it is the other or lies in it, segment by segment."""
    return root == other or root.startswith(other.rstrip("/") + "/")


def overlap(root: str, other: str) -> bool:
    """Whether one lies in the other, or they are the same: then each would take what is the other's for its own."""
    return root != MEMORY and other != MEMORY and (_is_below(root, other) or _is_below(other, root))


def kind_of_root(root: str) -> str:
    """folder, gs, s3 or memory."""
    if root == MEMORY:
        return "memory"
    return root.partition("://")[0] if "://" in root else "folder"


resolve(AddedStore, StoreStatus)
