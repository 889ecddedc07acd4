"""What a record looks like in MongoDB: one document of `datafiles` under the DataFile's id, and the indexes over it.

    revision, deleted, attempt, digest, document    as in `Record`; `document` is JSON bytes
    snapshot                                        the hash of its instruments, when `document` is without them
    pid                                             that of the document, while it is alive
    holds                                           what it claims outside: see `_mongo_claims`
    apart                                           where the values of it lie that are large: see `_mongo_parts`
    o                                               its place in order of saving: `created_at`, then the id, in 24 bytes
    c                                               the first part of that, `created_at` in microseconds since 1970
    d                                               the day of that, counted since 1970; a tombstone has none
    s                                               for each path of `SORTED` its sort value and `o`, compared as one
    t                                               its terms: a field for each (path, kind), named by a hash of the two
    n                                               the numbers, dates and quantities among `t`; of several values in one
                                                    field the least and the greatest
    x                                               its texts too long for the index, whole, under the names they have in `t`
    by                                              whose write was the last: a caller who got no answer looks here
    barred                                          keys never to be published; it and `holds` may stand before the record
    change                                          how it came from the revision before; older ones are in `changes`
    sweep                                           plan, state and `version` while it has a log; `pending`: work to do

No field grows beyond a bound: `t`, `n`, `x` and `s` together have at most `INDEXED_BYTES`, the state of a sweep
`STATE_BYTES`; `document`, `change` and plan are apart when they are large. `barred` has some 30 bytes for each orphan that
`gc` removed under this id. 16 MB are far from the sum.

One wildcard index over `t` serves every path, counts without reading a document, and has the records of a value in order of
time; another, over `n`, has the records of a range by the day (decision 0008). A tombstone has its terms in `g`, out of
their way. Values in one field are of one BSON type. MongoDB
compares a list by any of its elements, and each of two bounds by another one if need be: that is what `models.matching` says
of several terms.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import bson
import msgspec
from bson import Binary

from aq_data.errors import AqDataError, TooLargeError
from aq_data.models.datafile import DataFile
from aq_data.models.matching import Facts
from aq_data.models.paths import MAX_PATH, SortKey
from aq_data.models.snapshots import Snapshot
from aq_data.models.terms import TEXT_PREFIX, Kind, Term, sort_key, texts_at
from aq_data.models.units import QUANTITY
from aq_data.storage.metadata._mongo_parts import Place
from aq_data.storage.metadata.record import Record

__all__ = [
    "DAY",
    "DAYS_INDEX",
    "INDEXED_BYTES",
    "INDEXED_KEYS",
    "INDEXES",
    "LARGE_BYTES",
    "LONG",
    "ORDER_BYTES",
    "SCHEMA_VERSION",
    "SNAPSHOT",
    "SORTED",
    "TERMS_INDEX",
    "TIME_INDEX",
    "WORDS",
    "Stored",
    "claims_of",
    "created_of",
    "field_of",
    "fields_of",
    "found_by",
    "is_ranged",
    "make_mark",
    "pid_key",
    "stored",
]

log = logging.getLogger("aq_data")

SCHEMA_VERSION = 4
"""Of a database of version 1 the records are whole, whatever the size of their instruments; they stay as they are until they
are changed. `c` came with version 3, `d` and `n` with version 4."""

SORTED: dict[str, Kind] = {"name": "text", "measured_at": "date", "updated_at": "date", "size": "number"}
"""Paths with an index in sort order, besides `created_at` (by `o`) and `id`, and the one kind that their values have."""

TERMS_INDEX = "terms_by_time"
DAYS_INDEX = "numbers_by_day"
TIME_INDEX = "time"
INDEXES: tuple[tuple[str, list[tuple[str, int]], dict[str, Any]], ...] = (
    (TERMS_INDEX, [("t.$**", 1), ("c", 1)], {}),
    (DAYS_INDEX, [("d", 1), ("n.$**", 1), ("c", 1)], {}),
    (TIME_INDEX, [("deleted", 1), ("c", 1), ("o", 1)], {}),
    *((path, [("deleted", 1), (f"s.{path}", 1)], {}) for path in SORTED),
    ("holds", [("holds", 1)], {"sparse": True}),
    ("pending", [("sweep.pending", 1)], {"partialFilterExpression": {"sweep.pending": True}}),
)
"""Name, keys and options."""

WORDS = "words"
"""The field under `t` with the document's words."""
SNAPSHOT = "snapshot"
"""The field under `t` with the hash of the document's snapshot: by this term whatever is found in a snapshot leads to it."""
LONG = "long"
"""A kind of our own: at this path stands a text of which the index has only the beginning."""

DAY = 86_400_000_000
"""Microseconds."""
ORDER_BYTES = 24
INDEXED_BYTES = 10 << 20
"""What a document is found by takes no more. Its text as JSON may be as large as the server lets it."""
INDEXED_KEYS = 80_000
"""Nor has it more values. All keys of a document are written at once, and MongoDB gives up, again and again, on what takes
more than a tenth of its cache: 100,000 keys where that has 256 MB."""
LARGE_BYTES = 64 << 10
"""Documents of so much JSON are taken apart in a thread, and what they are found by is measured."""
LONG_PID = 500


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
    """What is written of a record: fields to set, and to remove, as a tombstone has no `t`; its quantities' (path, kind).

    `needs` has to be claimed and `snapshot` put before it is written, and nothing of `keys` be barred. `replaces` may be
    removed once it has taken the place of the record before.
    """

    fields: dict[str, Any]
    removed: dict[str, str]
    quantities: frozenset[tuple[str, Kind]]
    snapshot: Snapshot | None
    needs: tuple[str, ...]
    keys: tuple[str, ...] = ()
    replaces: Place | None = None

    @property
    def wanted(self) -> dict[str, Any]:
        """What must hold of the document that it is written to."""
        return {"holds": {"$all": list(self.needs)}} if self.needs else {}


def stored(record: Record, encoded: bytes, snapshot: Snapshot | None) -> Stored:
    """The form in which a record is kept: `encoded` is its document, without instruments if there is a `snapshot`."""
    document, plain = record.document, msgspec.json.decode(encoded)
    if snapshot is not None:
        del plain["instruments"]
    found = found_by(plain, f"the document {document.id}")
    order = _order_of(document, found.known)
    is_deleted = document.state == "deleted"
    kept = {"g": found.terms} if is_deleted else {"t": found.terms, "n": found.numbers, "d": created_of(order) // DAY}
    _check_size({**kept, "x": found.texts}, encoded)
    fields = {
        "revision": document.revision,
        "deleted": is_deleted,
        "attempt": record.attempt,
        "digest": record.digest,
        "document": encoded,
        "o": order,
        "c": created_of(order),
        "s": _sort_values(found.known, order),
        "x": found.texts,
        **kept,
    }
    removed = {"t": "", "n": "", "d": ""} if is_deleted else {"g": ""}
    optional: dict[str, Any] = {
        "snapshot": None if snapshot is None else snapshot.hash,
        "pid": None if is_deleted or document.pid is None else short_pid(document.pid),
        "change": None if record.change is None else msgspec.json.encode(record.change),
    }
    claims = claims_of(optional)
    optional["holds"] = claims or None
    for name, value in optional.items():
        if value is None:
            removed[name] = ""
        else:
            fields[name] = value
    if snapshot is not None:
        found.terms[SNAPSHOT] = snapshot.hash
    return Stored(fields, removed, found.quantities, snapshot, tuple(claims))


def _check_size(kept: dict[str, Any], encoded: bytes) -> None:
    if len(encoded) < LARGE_BYTES:
        return
    values = [value for name in ("t", "n") for value in kept.get(name, {}).values()]
    keys = sum(len(value) if isinstance(value, list) else 1 for value in values)
    size = len(bson.encode(kept))
    if keys > INDEXED_KEYS or size > INDEXED_BYTES:
        raise TooLargeError(
            f"the document has {len(encoded)} bytes and is found by {keys} values, which take {size} bytes; MongoDB takes "
            f"{INDEXED_KEYS} values and {INDEXED_BYTES} bytes of each document: keep long lists as arrays, long texts and "
            "programs as attached files",
            limit=INDEXED_BYTES,
        )


def claims_of(row: Mapping[str, Any]) -> list[str]:
    """What the record in a document of `datafiles` has claimed, or must."""
    snapshot, pid = row.get("snapshot"), row.get("pid")
    return [*([] if snapshot is None else [snapshot]), *([] if pid is None else [pid_key(pid)])]


def short_pid(pid: str) -> str:
    """What stands for a pid outside of its document; itself, unless it is very long."""
    return pid if len(pid) <= LONG_PID else f"{hashlib.sha256(pid.encode()).hexdigest()} {pid[:20]}"


def pid_key(pid: str) -> str:
    """The claim of a pid, and its `_id`; never that of a snapshot."""
    return f"pid {short_pid(pid)}"


def make_mark() -> bytes:
    """What tells one write from every other."""
    return os.urandom(8)


@dataclass(frozen=True, slots=True)
class Found:
    """What a document is found by: the fields `t`, `n` and `x`, and the terms they are made of."""

    terms: dict[str, Any]
    numbers: dict[str, Any]
    texts: dict[str, list[str]]
    known: frozenset[Term]

    @property
    def quantities(self) -> frozenset[tuple[str, Kind]]:
        asked = (term for term in self.known if term.kind.startswith(QUANTITY) and len(term.path) <= 2 * MAX_PATH)
        return frozenset((term.path, term.kind) for term in asked)


def found_by(plain: dict[str, Any], what: str) -> Found:
    """What a document in its JSON form is found by; nothing, loudly, when it cannot be understood.

    One such document must not stop every search. `what` names it.
    """
    try:
        facts = Facts(plain)
        terms, texts = _stored_terms(facts)
        ranged = {field_of(term.path, term.kind) for term in facts.terms if is_ranged(term.kind)}
        return Found(terms, {name: _extremes(terms[name]) for name in ranged}, texts, facts.terms)
    except (ArithmeticError, AqDataError, LookupError, TypeError, ValueError) as exc:
        log.error("a document cannot be indexed and will not be found", exc_info=exc, extra={"fields": {"what": what}})
        return Found({}, {}, {}, frozenset())


def is_ranged(kind: Kind) -> bool:
    """Whether values of the kind are numbers that ranges are asked of."""
    return kind in ("number", "date") or kind.startswith(QUANTITY)


def _extremes(value: Any) -> Any:
    """Of several values the least and the greatest: some is above a bound if the greatest is, below one if the least is."""
    return [min(value), max(value)] if isinstance(value, list) else value


def _stored_terms(facts: Facts) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The fields `t` and `x`."""
    fields, texts = fields_of(facts.terms, facts.document)
    if facts.words:
        fields[WORDS] = sorted(facts.words)
    return fields, texts


def fields_of(found: Iterable[Term], document: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Terms as fields, a value where there is one, a list where there are several; and the long texts of the document."""
    fields: dict[str, list[Any]] = {}
    texts: dict[str, list[str]] = {}
    for term in found:
        name = field_of(term.path, term.kind)
        fields.setdefault(name, []).append(term.value)
        if term.kind == "text" and len(str(term.value)) >= TEXT_PREFIX and name not in texts:
            fields[field_of(term.path, LONG)] = [True]
            texts[name] = [text for text in texts_at(document, term.path) if len(text) >= TEXT_PREFIX]
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}, texts


def _order_of(document: DataFile, found: frozenset[Term]) -> Binary:
    """The field `o`: bytes that compare as (`created_at`, `id`) do."""
    _, created = sort_key(found, SortKey("created_at", False))
    try:
        place = uuid.UUID(document.id).bytes
    except ValueError:
        place = hashlib.blake2b(document.id.encode(), digest_size=16).digest()
    return Binary((int(created) + (1 << 63)).to_bytes(8, "big") + place)


def created_of(order: bytes) -> int:
    """The field `c` of a record with this `o`."""
    return int.from_bytes(order[:8], "big") - (1 << 63)


def _sort_values(found: Iterable[Term], order: Binary) -> dict[str, Any]:
    few = frozenset(term for term in found if term.path in SORTED)
    keys = {path: sort_key(few, SortKey(path, False)) for path in SORTED}
    return {path: {"v": value if rank else None, "o": order} for path, (rank, value) in keys.items()}
