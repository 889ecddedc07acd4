r"""What differs between two documents in tagged JSON, path by path.

Objects are compared key by key, in any order of keys. Lists of equal length whose elements are objects (channels, step
ranges) are compared by position; any other list is one value, as is what only one side has: an instrument that was added
is one difference, not one per setting. A setting `{value, unit}` is one value with its unit: one difference when either
changed, also when both sides are physically equal (1 V, 1000 mV), for somebody set it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from aq_data.models.datafile import SERVER_FIELDS, DataFile
from aq_data.models.paths import escape_segment, join_path, path_segments
from aq_data.models.structs import resolve
from aq_data.models.terms import comparable
from aq_data.models.values import tag_of

__all__ = [
    "LEFT_OUT",
    "MISSING",
    "Difference",
    "Step",
    "compared",
    "differences",
    "exact_differences",
    "place_of",
    "place_text",
    "undo",
    "units_of",
]

MISSING = msgspec.UNSET
"""Stands where a side has nothing, which is not null. In JSON the field is absent."""

Step = str | int
"""One step into a document: a key, or a position in a list."""


class Difference(msgspec.Struct, frozen=True, omit_defaults=True):
    r"""One setting or field that differs.

    `path` is as filters take it (dots inside a key are written `\.`), so that `{path: before}` finds the documents like the
    first. Elements of a list stand at the list's own path there; `at` tells which: for each list passed on the way, how many
    keys come before and the position. `before_unit` and `after_unit` are those of a setting `{value, unit}`.
    """

    path: str
    at: tuple[tuple[int, int], ...] = ()
    before: Any = MISSING
    after: Any = MISSING
    before_unit: Any = MISSING
    after_unit: Any = MISSING


LEFT_OUT: frozenset[str] = SERVER_FIELDS - {"state", "arrays", "files"}
"""Fields of a document that are not compared between DataFiles: set by the server, and nearly always different."""
_STORED = frozenset({"name", "chunks", "codec", "nbytes", "is_partial"})
"""What is left out of an array: how it is stored. Its name is the key."""


def compared(document: DataFile) -> dict[str, Any]:
    """A document as it is compared with those of other DataFiles: tagged JSON without `LEFT_OUT`.

    Arrays and files are keyed by name: arrays with dtype, shape, dims, attrs and role, files with their size, type and hash.
    """
    content = {field: value for field, value in json_of(document).items() if field not in LEFT_OUT}
    content["arrays"] = {info["name"]: _without(info, _STORED) for info in content["arrays"]}
    content["files"] = {info["name"]: _without(info, {"name", "key"}) for info in content["files"]}
    return content


def json_of(document: DataFile) -> dict[str, Any]:
    """The document as plain JSON objects."""
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))
    return decoded


def _without(info: dict[str, Any], fields: frozenset[str] | set[str]) -> dict[str, Any]:
    return {field: value for field, value in info.items() if field not in fields}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """What differs in meaning, in order of paths: 1 equals 1.0, NaN equals NaN, two spellings of one instant are equal."""
    found: list[Difference] = []
    _walk_object(before, after, (), _means_the_same, found)
    return found


def exact_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """What differs in form: all that `undo` needs to rebuild `before` exactly, but for the order of keys."""
    found: list[Difference] = []
    _walk_object(before, after, (), _is_identical, found)
    return found


Same = Callable[[Any, Any], bool]


def _encoded(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def _is_identical(before: Any, after: Any) -> bool:
    if before is MISSING or after is MISSING:
        return before is after
    return _encoded(before) == _encoded(after)


def _means_the_same(before: Any, after: Any) -> bool:
    if before is MISSING or after is MISSING:
        return before is after
    return comparable(before, "") == comparable(after, "")


def _walk(before: Any, after: Any, steps: tuple[Step, ...], same: Same, found: list[Difference]) -> None:
    if _is_identical(before, after):  # in C; whole unchanged branches end here
        return
    if tag_of(before) == tag_of(after) and is_object(before) and is_object(after):
        _walk_object(members(before), members(after), steps, same, found)
    elif is_list_of_objects(before) and is_list_of_objects(after) and len(before) == len(after):
        for position, (one, other) in enumerate(zip(before, after, strict=True)):
            _walk(one, other, (*steps, position), same, found)
    elif not same(before, after):
        found.append(_difference(steps, before, after))


def _walk_object(
    before: Mapping[str, Any], after: Mapping[str, Any], steps: tuple[Step, ...], same: Same, found: list[Difference]
) -> None:
    units = _units(before, after)
    for key in sorted(before.keys() | after.keys()):
        if units is not None and key in ("value", "unit"):
            if key == "value" and not (same(before["value"], after["value"]) and same(*units)):
                found.append(_difference((*steps, "value"), before["value"], after["value"], units))
        elif key in before and key in after:
            _walk(before[key], after[key], (*steps, key), same, found)
        else:
            found.append(_difference((*steps, key), before.get(key, MISSING), after.get(key, MISSING)))


def _units(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """The units, where both sides are a setting with a value and at least one has a unit."""
    if "value" not in before or "value" not in after or not ("unit" in before or "unit" in after):
        return None
    units = before.get("unit", MISSING), after.get("unit", MISSING)
    return units if all(unit is MISSING or unit is None or isinstance(unit, str) for unit in units) else None


def units_of(difference: Difference) -> tuple[Any, Any] | None:
    """The units of both sides; None when it is not that of a setting with a unit."""
    if difference.before_unit is MISSING and difference.after_unit is MISSING:
        return None
    return difference.before_unit, difference.after_unit


def _difference(steps: tuple[Step, ...], before: Any, after: Any, units: tuple[Any, Any] = (MISSING, MISSING)) -> Difference:
    return Difference(*place_of(steps), before, after, *units)


def place_of(steps: Iterable[Step]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The `path` and `at` of a place."""
    segments: list[str] = []
    at: list[tuple[int, int]] = []
    for step in steps:
        if isinstance(step, int):
            at.append((len(segments), step))
        else:
            segments.append(step)
    return join_path(segments), tuple(at)


def place_text(path: str, at: Iterable[tuple[int, int]]) -> str:
    """A place as it is shown to people, as in `metadata.channels[2].gain`."""
    segments = [escape_segment(segment) for segment in path_segments(path)]
    for count, position in at:
        segments[count - 1] += f"[{position}]"
    return ".".join(segments)


def is_object(value: Any) -> bool:
    """Whether `value` has keys of the user's own, behind `$literal` or not."""
    return isinstance(value, dict) and (tag_of(value) is None or isinstance(value.get("$literal"), dict))


def members(value: dict[str, Any]) -> dict[str, Any]:
    """The keys and values of an object."""
    return value["$literal"] if tag_of(value) == "$literal" else value


def is_list_of_objects(value: Any) -> bool:
    """Whether `value` is a list, not empty, that is looked into."""
    return isinstance(value, list) and bool(value) and all(map(is_object, value))


# --- undoing -------------------------------------------------------------------------------------------------------------


class _Before:
    """A leaf of the tree of what is to be restored."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def undo(document: Mapping[str, Any], found: Iterable[Difference]) -> dict[str, Any]:
    """The document before its exact differences; `document` stays as it is.

    Raises LookupError or TypeError when they are not those that led to it.
    """
    tree: dict[Step, Any] = {}
    for difference in found:
        *above, last = _steps(difference)
        place = tree
        for step in above:
            place = place.setdefault(step, {})
        place[last] = _Before(difference.before)
        if units_of(difference) is not None:
            place["unit"] = _Before(difference.before_unit)
    return _restored_object(document, tree)


def _steps(difference: Difference) -> list[Step]:
    steps: list[Step] = list(path_segments(difference.path))
    for count, position in reversed(difference.at):
        steps.insert(count, position)
    return steps


def _restored(value: Any, node: Any) -> Any:
    # What kind of container it is was decided by what it holds now, never by what it is about to hold: one key less may
    # make an object look like a tagged value.
    if isinstance(node, _Before):
        return node.value
    if isinstance(value, list):
        restored = list(value)
        for position, child in node.items():
            restored[position] = _restored(value[position], child)
        return restored
    inner = _restored_object(members(value), node)
    return {"$literal": inner} if tag_of(value) == "$literal" else inner


def _restored_object(value: Mapping[str, Any], tree: dict[Step, Any]) -> dict[str, Any]:
    restored: dict[Any, Any] = dict(value)
    for key, node in tree.items():
        if isinstance(node, _Before) and node.value is MISSING:
            restored.pop(key, None)
        elif isinstance(node, _Before):
            restored[key] = node.value
        else:
            restored[key] = _restored(restored[key], node)
    return restored


resolve(Difference)
