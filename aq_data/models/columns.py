"""Values at paths as columns: what stands in one document at a path, and what type a column of such values has.

A cell is tagged JSON (`values`), None where the document has no value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec

from aq_data.models.datafile import DATE_FIELDS, DataFile
from aq_data.models.difference import is_object, members
from aq_data.models.paths import parse_path, path_segments
from aq_data.models.values import from_tagged, parse_instant, tag_of

__all__ = ["Cell", "ColumnType", "Kind", "cell_at", "column_type", "field_segments", "kinds", "projected", "typed_values"]

Cell = Any

Kind = Literal["bool", "integer", "long", "float", "instant", "text", "other"]
"""What one cell is; `long` is an integer of 64 bits that a float64 cannot hold exactly."""

ColumnType = Literal["empty", "bool", "integer", "float", "instant", "text", "json"]
"""What a column is; `json` holds cells of several kinds, lists, objects, complex numbers, bytes and huge integers."""

_EXACT = 1 << 53
_LONG = 1 << 63


def field_segments(field: str) -> list[str]:
    """The keys that lead to a field, looked up as in a filter; `attrs`, `path` and `format` may be asked for, too."""
    first = path_segments(field)[0]
    return path_segments(field if first in DataFile.__struct_fields__ else parse_path(field))


def projected(document: Mapping[str, Any], paths: Iterable[Sequence[str]]) -> dict[str, Any]:
    """The document with nothing but its id and what stands at the paths, where `cell_at` finds it as in the whole.

    Of a list that a path enters every element keeps its position, as `{}` if it has nothing there. What no path finds
    anything in is left out.
    """
    wanted: _Wanted = {"id": None}
    for *above, last in paths:
        at: _Wanted | None = wanted
        for segment in above:
            at = None if at is None else at.setdefault(segment, {})
        if at is not None:  # else a shorter path asks for all of it
            at[last] = None
    kept: dict[str, Any] = _pruned(document, wanted)
    return kept


_Wanted = dict[str, "_Wanted | None"]
"""Keys with what is wanted below each; None is all."""


def _pruned(value: Any, wanted: _Wanted) -> Any:
    """What is wanted of a value; `{}` where it has none of it."""
    if isinstance(value, list):
        items = [{} if isinstance(item, list) else _pruned(item, wanted) for item in value]
        return items if any(items) else {}
    if not is_object(value):
        return {}
    inner, kept = members(value), {}
    for key, below in wanted.items():
        if below is None and key in inner:
            kept[key] = inner[key]
        elif below is not None and (found := _pruned(inner.get(key), below)):
            kept[key] = found
    return kept if tag_of(kept) is None else {"$literal": kept}  # a key left alone may look like a tag


def cell_at(document: Mapping[str, Any], segments: Sequence[str]) -> Cell:
    """The cell of one document. A path through a list of objects gives a list: None where an element has no value."""
    value: Any = document
    for depth, segment in enumerate(segments):
        if isinstance(value, list):
            cells = [cell_at(item, segments[depth:]) if isinstance(item, dict) else None for item in value]
            return cells if any(cell is not None for cell in cells) else None
        if not isinstance(value, dict):
            return None
        tag = tag_of(value)
        if tag is not None and tag != "$literal":
            return None  # a tagged value is one value
        value = (value[tag] if tag is not None else value).get(segment)
    return value


def is_date(segments: Sequence[str]) -> bool:
    """Whether a path is a typed date, whose cells are plain ISO text."""
    return len(segments) == 1 and segments[0] in DATE_FIELDS


def kinds(cells: Iterable[Cell], segments: Sequence[str]) -> set[Kind]:
    """The kinds among the cells of one path; those of several pages are united."""
    text: Kind = "instant" if is_date(segments) else "text"
    return {_kind(cell, text) for cell in cells if cell is not None}


def _kind(cell: Cell, text: Kind) -> Kind:
    if isinstance(cell, str):
        return text
    if isinstance(cell, float):
        return "float"
    if isinstance(cell, bool):
        return "bool"
    if isinstance(cell, int):
        return "integer" if abs(cell) <= _EXACT else "long" if -_LONG <= cell < _LONG else "other"
    tag = tag_of(cell)
    return "float" if tag == "$float" else "instant" if tag == "$date" else "other"


def column_type(found: set[Kind]) -> ColumnType:
    """The one type that holds all cells of these kinds without loss."""
    if not found:
        return "empty"
    if found <= {"integer", "long"}:
        return "integer"
    if found == {"integer", "float"}:
        return "float"
    kind = next(iter(found))
    return "json" if len(found) > 1 or kind == "long" or kind == "other" else kind


def typed_values(cells: Iterable[Cell], type: ColumnType) -> list[Any]:
    """Cells as Python values of a column's type: floats, aware datetimes…; of `json` columns the JSON text. None is None."""
    if type == "float":
        return [None if cell is None else _float(cell) for cell in cells]
    if type == "instant":
        return [None if cell is None else _instant(cell) for cell in cells]
    if type == "json":
        return [None if cell is None else msgspec.json.encode(cell).decode() for cell in cells]
    return list(cells)


def _float(cell: Cell) -> float:
    return float(from_tagged(cell)) if isinstance(cell, dict) else float(cell)


def _instant(cell: Cell) -> datetime:
    return parse_instant(cell["$date"] if isinstance(cell, dict) else cell, "instant")
