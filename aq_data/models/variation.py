"""What varies among many documents: for every path where they differ, the value in each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from aq_data.errors import TooLargeError
from aq_data.models.difference import MISSING, Step, is_list_of_objects, is_object, members, place_of
from aq_data.models.structs import resolve
from aq_data.models.terms import comparable

__all__ = ["Comparison", "Reading", "Variation"]

MAX_CELLS = 500_000
"""Paths times documents of one answer."""
MAX_BYTES = 64 << 20
"""Bytes, as JSON, of the values that one comparison keeps."""


class Reading(msgspec.Struct, frozen=True, omit_defaults=True):
    """The value one document has at a path, with the unit of a setting; without a value it has nothing there."""

    value: Any = MISSING
    unit: Any = MISSING


class Variation(msgspec.Struct, frozen=True, omit_defaults=True):
    """A path that varies, as in `Difference`, and the reading of each document in their order."""

    path: str
    at: tuple[tuple[int, int], ...] = ()
    values: tuple[Reading, ...] = ()


NOTHING = Reading()

Place = tuple[Step, ...]


class Comparison:
    """Takes documents one after the other and keeps only what differs from the first.

    Unlike `differences` it looks into everything that is an object on any side, so that an instrument that one document
    lacks does not hide how the others differ in it. Raises TooLargeError when more varies than one answer can hold.
    """

    def __init__(self) -> None:
        self._first: dict[Place, Reading] | None = None
        self._keys: dict[Place, Any] = {}
        self._others: list[dict[Place, Reading]] = []
        self._varying: set[Place] = set()
        self._bytes = 0

    def add(self, document: Mapping[str, Any]) -> None:
        """The next document, as `compared` gives it."""
        readings = dict(_leaves(document, ()))
        if self._first is None:
            self._first, self._keys = readings, {place: _key(reading) for place, reading in readings.items()}
            return
        other = {
            place: reading
            for place, reading in readings.items()
            if place not in self._keys or self._keys[place] != _key(reading)
        }
        other |= dict.fromkeys(self._first.keys() - readings.keys(), NOTHING)
        self._others.append(other)
        self._varying |= other.keys()
        self._bytes += sum(len(msgspec.json.encode(reading)) for reading in other.values())
        if len(self._varying) * (len(self._others) + 1) > MAX_CELLS or self._bytes > MAX_BYTES:
            raise TooLargeError(
                f"{len(self._varying)} paths vary among the first {len(self._others) + 1} DataFiles, more than one answer "
                "holds; compare fewer at a time"
            )

    def variations(self) -> list[Variation]:
        """What varies among the documents so far, in order of paths."""
        first = self._first or {}
        above = {place[:depth] for place in self._varying for depth in range(1, len(place))}
        rows = []
        for place in self._varying:
            usual = first.get(place, NOTHING)
            values = (usual, *(other.get(place, usual) for other in self._others))
            # That one has instruments and the other none is told by what the one has.
            if place not in above or any(reading.value not in (MISSING, {}, []) for reading in values):
                rows.append(Variation(*place_of(place), values))
        return sorted(rows, key=lambda row: (row.path, row.at))


def _key(reading: Reading) -> Any:
    """What equal readings have in common."""
    unit = None if reading.unit is MISSING else comparable(reading.unit, "")
    return None if reading.value is MISSING else comparable(reading.value, ""), unit


def _leaves(value: Any, steps: Place) -> Iterator[tuple[Place, Reading]]:
    """Every value that is not looked into, where it stands; an object without keys is one, too."""
    if is_list_of_objects(value):
        for position, item in enumerate(value):
            yield from _leaves(item, (*steps, position))
        return
    inner = members(value) if is_object(value) else {}
    if not inner:
        yield steps, Reading(value)
        return
    is_setting = "value" in inner and "unit" in inner and isinstance(inner["unit"], str | None)
    for key, item in inner.items():
        if not is_setting or key not in ("value", "unit"):
            yield from _leaves(item, (*steps, key))
        elif key == "value":
            yield (*steps, "value"), Reading(item, inner["unit"])


resolve(Reading, Variation)
