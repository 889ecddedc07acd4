"""What a document is found by: its terms, (path, kind, value) triples, the same for every store.

A value's kind keeps numbers from being compared with text. Containers, long texts, bytes and integers beyond 64 bits are
known by a digest. A number beside a unit, `{"value": 20, "unit": "mK"}`, has a second term with its value in SI units.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from aq_data.errors import QueryError, ValidationError
from aq_data.models.datafile import DATE_FIELDS
from aq_data.models.paths import ELEMENT, UNSEARCHED, SortKey, escape_segment, path_segments
from aq_data.models.units import QUANTITY, parse_unit
from aq_data.models.values import parse_instant, tag_of

__all__ = [
    "KIND_ORDER",
    "TEXT_PREFIX",
    "Kind",
    "Term",
    "comparable",
    "elements_at",
    "nearest_float",
    "pack_key",
    "sort_key",
    "terms",
    "terms_at",
    "terms_of_element",
    "texts_at",
    "unpack_key",
]

TEXT_PREFIX = 100
"""Characters of a text value that are indexed for order; longer texts are equal by digest."""

Kind = str
"""`number nan text bool null date complex`; `object` and `whole` for values known only by a digest: objects, and lists, long
texts, integers beyond 64 bits, bytes; `size` for the length of a list; `si <dimension>` for a number in SI units."""

KIND_ORDER: dict[str, int] = {"null": 0, "nan": 1, "number": 2, "text": 3, "complex": 4, "bool": 5, "date": 6}
"""How kinds sort among each other, missing first (with null); the others have no order and sort as missing."""


class Term(NamedTuple):
    """One indexed fact of a document: somewhere at `path` stands a value of `kind`."""

    path: str
    kind: Kind
    value: int | float | str | bytes


_term: Callable[[type[Term], tuple[Any, ...]], Term] = tuple.__new__
_BEYOND = float(1 << 63)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _scalar(value: Any, path: str) -> tuple[Kind, int | float | str | bytes] | None:
    """Kind and comparable value of one scalar in tagged JSON; None for containers."""
    if value is None:
        return "null", 0
    if isinstance(value, bool):
        return "bool", int(value)
    if isinstance(value, int):
        return ("number", value) if -(1 << 63) <= value < 1 << 63 else ("whole", _digest(b"n%x" % value))
    if isinstance(value, float):
        # Whole and beyond 64 bits it may equal an integer that no database holds: both are known by the same digest.
        return ("number", value) if abs(value) < 1 << 63 or value == -(1 << 63) else ("whole", _digest(b"n%x" % int(value)))
    if isinstance(value, str):
        if path in DATE_FIELDS:
            return "date", _microseconds(value, path)
        return ("text", value) if len(value) < TEXT_PREFIX else ("whole", _digest(b"s" + value.encode()))
    tag = tag_of(value)
    if tag == "$float":
        return ("nan", 0) if value["$float"] == "NaN" else ("number", math.inf * (1 if value["$float"][0] == "I" else -1))
    if tag == "$date":
        return "date", _microseconds(value["$date"], path)
    if tag == "$complex":
        return "complex", ",".join(_part(part) for part in value["$complex"])
    if tag in ("$bytes", "$ndarray"):
        return "whole", _digest(tag.encode() + msgspec.json.encode(value[tag], order="deterministic"))
    return None


def _part(part: Any) -> str:
    return part["$float"] if isinstance(part, dict) else repr(float(part) + 0.0)


def _microseconds(text: str, path: str) -> int:
    try:
        instant = parse_instant(text, path)
    except ValidationError as exc:
        raise QueryError(str(exc)) from exc
    delta = instant - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86400 + delta.seconds) * 1_000_000 + delta.microseconds


def nearest_float(value: float) -> float:
    """What a number beyond 64 bits is ordered by."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def terms(document: Mapping[str, Any]) -> list[Term]:
    """Every term of a document in its JSON form (`msgspec.to_builtins`); duplicates may occur.

    Of arrays and files only the names are indexed. Elements of a list stand at the list's own path.
    """
    found: list[Term] = []
    for field, value in document.items():
        if field in ("arrays", "files"):
            for item in value:
                _collect(f"{field}.name", item["name"], found)
        elif field not in UNSEARCHED:
            _collect(field, value, found)
    return found


def comparable(value: Any, path: str) -> tuple[Kind, int | float | str | bytes]:
    """The kind and value by which a tagged JSON value at `path` equals another. QueryError for a bad date."""
    return _scalar(value, path) or ("whole" if isinstance(value, list) else "object", _collect(path, value, []))


def terms_at(path: str, value: Any) -> list[Term]:
    """The terms that a document has in which `value` stands at `path`; others may have them, too."""
    found: list[Term] = []
    _collect(path, value, found)
    return found


def values_at(document: Any, path: str) -> list[Any]:
    """The values that stand at one path, found without walking the rest; lists on the way are entered."""
    segments = path_segments(path)
    if segments[0] == ELEMENT:
        segments = segments[1:]
    elif segments[0] in ("arrays", "files") and segments[1:] != ["name"]:
        return []
    values: list[Any] = [document]
    for segment in segments:
        elements = [item for value in values for item in (value if isinstance(value, list) else [value])]
        objects = [item["$literal"] if tag_of(item) == "$literal" else item for item in elements if _is_object(item)]
        values = [item[segment] for item in objects if segment in item]
    return values


def texts_at(document: Any, path: str) -> list[str]:
    """The texts at one path, whole; elements of a list stand at the list's own path."""
    if path in DATE_FIELDS:
        return []
    found = values_at(document, path)
    return [item for value in found for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]


def elements_at(document: Any, path: str) -> list[Any]:
    """The elements of the lists at one path."""
    return [item for value in values_at(document, path) if isinstance(value, list) for item in value]


def terms_of_element(element: Any) -> list[Term]:
    """Every term of an element of a list, at paths that begin with `@`.

    One that is a list itself is asked for as a whole, by its length, or for elements of its own: like a document, it has no
    values of these.
    """
    found = terms_at(ELEMENT, element)
    if isinstance(element, list):
        return [term for term in found if (term.path, term.kind) == (ELEMENT, "size") or term is found[-1]]
    return found


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and tag_of(value) in (None, "$literal")


def _collect(path: str, value: Any, found: list[Term]) -> bytes:
    """Append the terms of `value` to `found`; bytes that are equal for equal values.

    A container's digest is made from the bytes of its members, so that a document is walked once. Every save runs through
    here for each of its settings, hence the tests of exact types and the plain tuples that become terms.
    """
    kind = type(value)
    if kind is str and path not in DATE_FIELDS and len(value) < TEXT_PREFIX:
        found.append(_term(Term, (path, "text", value)))
        return bytes(b"text:" + value.encode())
    if kind is float and -_BEYOND <= value < _BEYOND:
        found.append(_term(Term, (path, "number", value)))
        return b"number:%d" % int(value) if value.is_integer() else b"number:" + repr(value).encode()  # 2.0 and 2 are one
    if kind is list:
        return _collect_list(path, value, found)
    if kind is dict and tag_of(value) is None:
        return _collect_object(path, value, found)
    scalar = _scalar(value, path)
    if scalar is None:
        return _collect_object(path, value["$literal"], found)
    found.append(_term(Term, (path, *scalar)))
    if scalar[0] == "whole":
        found.extend(_approximations(path, value))
    known = scalar[1]
    return known if isinstance(known, bytes) else f"{scalar[0]}:{known}".encode()


def _collect_list(path: str, value: list[Any], found: list[Term]) -> bytes:
    """Elements stand at the list's own path; those of a list within a list only in its digest."""
    parts = []
    for item in value:
        inner = isinstance(item, list)
        part = _collect(path, item, [] if inner else found)
        parts.append(b"%d:%b" % (len(part), part))
        if inner:
            found.append(_term(Term, (path, "whole", part)))
    digest = _digest(b"[" + b"".join(parts))
    found.append(_term(Term, (path, "size", len(value))))
    found.append(_term(Term, (path, "whole", digest)))
    return digest


def _collect_object(path: str, value: dict[str, Any], found: list[Term]) -> bytes:
    parts = []
    for key in sorted(value):
        part = _collect(f"{path}.{escape_segment(key)}", value[key], found)
        name = key.encode()
        parts.append(b"%d:%d:%b%b" % (len(name), len(part), name, part))
    digest = _digest(b"{" + b"".join(parts))
    if "unit" in value and "value" in value and isinstance(value["unit"], str):
        found.extend(_quantities(f"{path}.value", value["value"], value["unit"]))
    found.append(_term(Term, (path, "object", digest)))
    return digest


def _quantities(path: str, value: Any, text: str) -> Iterator[Term]:
    numbers = [
        item
        for item in (value if isinstance(value, list) else [value])
        if isinstance(item, (int, float)) and not isinstance(item, bool)
    ]
    unit = parse_unit(text) if numbers else None
    if unit is not None:
        for value in map(unit.in_si, numbers):
            if not math.isnan(value):  # which no quantity is compared with
                yield Term(path, f"{QUANTITY}{unit.dimension}", value)


def _approximations(path: str, value: Any) -> Iterator[Term]:
    """What a value known by its digest is ordered by: the beginning of a text, the nearest float of an integer."""
    if isinstance(value, str):
        yield Term(path, "text", value[:TEXT_PREFIX])
    elif isinstance(value, (int, float)):
        yield Term(path, "number", nearest_float(value))


def sort_key(found: frozenset[Term], key: SortKey) -> tuple[int, Any]:
    """(rank of the kind, value) to order by: of several values the least, or the greatest when descending."""
    keys = [
        (KIND_ORDER[term.kind], term.value if term.kind not in ("null", "nan") else 0)
        for term in found
        if term.path == key.path and term.kind in KIND_ORDER
    ]
    if not keys:
        return (0, 0)
    return max(keys) if key.descending else min(keys)


def pack_key(key: tuple[int, Any]) -> str:
    """A sort key as text for a cursor; `unpack_key` reads it back exactly."""
    rank, value = key
    if isinstance(value, float):
        return f"{rank}f{struct.pack('>d', value).hex()}"
    return f"{rank}i{value}" if isinstance(value, int) else f"{rank}s{value}"


def unpack_key(text: str) -> tuple[int, Any]:
    """The key that `pack_key` was given; ValueError for anything else."""
    rank, form, rest = text[:1], text[1:2], text[2:]
    if not rank.isascii() or not rank.isdigit():
        raise ValueError(text)
    if form == "f" and len(rest) == 16 and rest.isalnum():  # fromhex passes over blanks
        return int(rank), struct.unpack(">d", bytes.fromhex(rest))[0]
    if form == "i" and -(1 << 63) <= int(rest) < 1 << 63:
        return int(rank), int(rest)
    if form == "s":
        return int(rank), rest
    raise ValueError(text)
