"""What a record looks like in MongoDB: one document of `datafiles` under the DataFile's id, and the indexes over it.

    revision, deleted, attempt, digest, document    as in `Record`; `document` is JSON bytes
    pid                                             that of the document, while it is alive: unique
    o                                               its place in order of saving: `created_at`, then the id, in 24 bytes
    s                                               for each path of `SORTED` its sort value and `o`, compared as one
    t                                               its terms: a field for each (path, kind), named by a hash of the two
    x                                               its texts too long for the index, whole, under the names they have in `t`
    by                                              whose write was the last: a caller who got no answer looks here
    barred                                          keys never to be published; it may stand alone before the record
    change                                          how it came from the revision before; older ones are in `changes`
    sweep                                           plan, state and `version` while it has a log; `pending`: work to do

One wildcard index over `t` serves every path, and counts without reading a document (decision 0008). A tombstone has its
terms in `g`, out of its way. Values in one field are of one BSON type. MongoDB compares a list by any of its elements, and
each of two bounds by another one if need be: that is what `models.matching` says of several terms.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
from bson import Binary

from aq_data.errors import AqDataError
from aq_data.models.datafile import DataFile
from aq_data.models.matching import Facts
from aq_data.models.paths import SortKey
from aq_data.models.terms import TEXT_PREFIX, Kind, Term, sort_key, texts_at
from aq_data.models.units import QUANTITY
from aq_data.storage.metadata.record import Record

__all__ = [
    "INDEXES",
    "LONG",
    "ORDER_BYTES",
    "SCHEMA_VERSION",
    "SORTED",
    "TERMS_INDEX",
    "WORDS",
    "Stored",
    "field_of",
    "make_mark",
    "read_record",
    "stored",
]

log = logging.getLogger("aq_data")

SCHEMA_VERSION = 1

SORTED: dict[str, Kind] = {"name": "text", "measured_at": "date", "updated_at": "date", "size": "number"}
"""Paths with an index in sort order, besides `created_at` (by `o`) and `id`, and the one kind that their values have."""

TERMS_INDEX = "terms"
INDEXES: tuple[tuple[str, list[tuple[str, int]], dict[str, Any]], ...] = (
    (TERMS_INDEX, [("t.$**", 1)], {}),
    ("created_at", [("deleted", 1), ("o", 1)], {}),
    *((path, [("deleted", 1), (f"s.{path}", 1)], {}) for path in SORTED),
    ("pids", [("pid", 1)], {"unique": True, "partialFilterExpression": {"pid": {"$type": "string"}}}),
    ("pending", [("sweep.pending", 1)], {"partialFilterExpression": {"sweep.pending": True}}),
)
"""Name, keys and options."""

WORDS = "words"
"""The field under `t` with the document's words."""
LONG = "long"
"""A kind of our own: at this path stands a text of which the index has only the beginning."""

ORDER_BYTES = 24


@lru_cache(100_000)
def field_of(path: str, kind: Kind) -> str:
    """The name under `t` of the values of one kind at one path: 64 bits, so that two never meet in practice.

    Digests of objects are kept with the other digests.
    """
    kind = "whole" if kind == "object" else kind
    digest = hashlib.blake2b(f"{kind}:{path}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return base64.urlsafe_b64encode(digest).decode("ascii").rstrip("=")


@dataclass(frozen=True, slots=True)
class Stored:
    """What is written of a record: fields to set, and to remove, as a tombstone has no `t`; its quantities' (path, kind)."""

    fields: dict[str, Any]
    removed: dict[str, str]
    quantities: frozenset[tuple[str, Kind]]


def stored(record: Record) -> Stored:
    """The form in which a record is kept."""
    document = record.document
    encoded = msgspec.json.encode(document)
    facts = _facts_of(document, encoded)
    found = facts.terms if facts else frozenset()
    terms, texts = _stored_terms(facts) if facts else ({}, {})
    order = _order_of(document, found)
    is_deleted = document.state == "deleted"
    fields = {
        "revision": document.revision,
        "deleted": is_deleted,
        "attempt": record.attempt,
        "digest": record.digest,
        "document": encoded,
        "o": order,
        "s": _sort_values(found, order),
        "x": texts,
        "g" if is_deleted else "t": terms,
    }
    kinds = frozenset((term.path, term.kind) for term in found if term.kind.startswith(QUANTITY))
    removed = {"t" if is_deleted else "g": ""}
    if document.pid is None or is_deleted:
        removed["pid"] = ""
    else:
        fields["pid"] = document.pid
    if record.change is None:
        removed["change"] = ""
    else:
        fields["change"] = msgspec.json.encode(record.change)
    return Stored(fields, removed, kinds)


def make_mark() -> bytes:
    """What tells one write from every other."""
    return os.urandom(8)


def read_record(row: dict[str, Any]) -> Record:
    """The record in a document of `datafiles`."""
    return Record(msgspec.json.decode(row["document"], type=DataFile), row["attempt"], row["digest"])


def _facts_of(document: DataFile, encoded: bytes) -> Facts | None:
    """None, loudly, for a document that cannot be understood: one must not stop every search."""
    try:
        facts = Facts(msgspec.json.decode(encoded))
        assert facts.terms is not None
        assert facts.words is not None
    except (ArithmeticError, AqDataError, LookupError, TypeError, ValueError) as exc:
        log.error("a document cannot be indexed and will not be found", exc_info=exc, extra={"fields": {"id": document.id}})
        return None
    return facts


def _stored_terms(facts: Facts) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The fields `t` and `x`: a value where there is one, a list where there are several."""
    fields: dict[str, list[Any]] = {}
    texts: dict[str, list[str]] = {}
    for term in facts.terms:
        fields.setdefault(field_of(term.path, term.kind), []).append(term.value)
        if term.kind == "text" and len(str(term.value)) >= TEXT_PREFIX:
            fields[field_of(term.path, LONG)] = [True]
            whole = texts_at(facts.document, term.path)
            texts[field_of(term.path, "text")] = [text for text in whole if len(text) >= TEXT_PREFIX]
    stored = {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
    if facts.words:
        stored[WORDS] = sorted(facts.words)
    return stored, texts


def _order_of(document: DataFile, found: frozenset[Term]) -> Binary:
    """The field `o`: bytes that compare as (`created_at`, `id`) do."""
    _, created = sort_key(found, SortKey("created_at", False))
    try:
        place = uuid.UUID(document.id).bytes
    except ValueError:
        place = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
    return Binary((int(created) + (1 << 63)).to_bytes(8, "big") + place)


def _sort_values(found: Iterable[Term], order: Binary) -> dict[str, Any]:
    few = frozenset(term for term in found if term.path in SORTED)
    keys = {path: sort_key(few, SortKey(path, False)) for path in SORTED}
    return {path: {"v": value if rank else None, "o": order} for path, (rank, value) in keys.items()}
