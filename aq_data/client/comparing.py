"""What differs between DataFiles and what became of one, as a client sees it: sequences that print as tables."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, overload

import msgspec

from aq_data.client.html import table_html
from aq_data.client.tables import EXACT, integers
from aq_data.models.difference import MISSING, Difference, place_text
from aq_data.models.history import Change
from aq_data.models.values import from_tagged
from aq_data.models.variation import Variation

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Differences", "History"]

T = TypeVar("T")

SHOWN_ROWS = 200
SHOWN_COLUMNS = 8
WIDTH = 40
"""Characters of one value in a table."""


class _Table(NamedTuple):
    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


class _Printed(Sequence[T], Generic[T]):
    """An immutable sequence that prints as a table, in a terminal and in a notebook."""

    def __init__(self, items: Sequence[T]) -> None:
        self._items = tuple(items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    @abstractmethod
    def _table(self) -> _Table:
        """The whole table, as text."""

    def __str__(self) -> str:
        title, heads, rows = self._table()
        if not rows:
            return title
        shown = [heads, *rows[:SHOWN_ROWS]]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
        return "\n".join([title, *lines, *_more(rows)])

    def __repr__(self) -> str:
        return f"<{self}>"

    def _repr_html_(self) -> str:
        title, heads, rows = self._table()
        return table_html(title, heads, rows[:SHOWN_ROWS], "".join(_more(rows)))


def _more(rows: list[tuple[str, ...]]) -> list[str]:
    return [f"… and {len(rows) - SHOWN_ROWS} more"] if len(rows) > SHOWN_ROWS else []


class Differences(_Printed[Difference]):
    """What differs between two DataFiles, in order of paths; `{d.path: d.before}` is a filter that finds the first.

    A side that has nothing at a path has `aq_data.MISSING` there, which is not None. Printed, it is a table.
    """

    def __init__(self, answer: Mapping[str, Any]) -> None:
        """From the answer of the server."""
        super().__init__([_pythonic(each) for each in msgspec.convert(answer["differences"], list[Difference])])
        self.before, self.after = str(answer["before"]), str(answer["after"])
        self._answer = answer

    def to_json(self) -> list[dict[str, Any]]:
        """The differences as the server gave them: JSON, with what JSON lacks tagged."""
        return list(self._answer["differences"])

    def _table(self) -> _Table:
        title = f"{_counted(len(self), 'difference')} between {self.before} and {self.after}"
        return _Table(title, ("path", "before", "after"), [_cells(difference) for difference in self])


class Comparison(_Printed[Variation]):
    """The paths that vary among DataFiles, each with the `values` in order of `ids`; a table when printed."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        """From the answer of the server."""
        found = msgspec.convert(answer["variations"], list[Variation])
        super().__init__([msgspec.structs.replace(each, values=tuple(map(_pythonic, each.values))) for each in found])
        self.ids = [str(id) for id in answer["ids"]]

    def table(self) -> pd.DataFrame:
        """A pandas DataFrame with one row per DataFile and one column per path.

        A unit that all values have is in the column's name, as in `….power.value [dBm]`; where units differ, the cells are
        texts, such as "1 V" and "1 mV". Where there is nothing it is missing as pandas has it; no number changes for that.
        """
        import pandas as pd

        index = pd.Index(self.ids, name="id")
        columns = {name: _column(values).set_axis(index) for name, values in map(_named, self)}
        return pd.DataFrame(columns, index=index, dtype=None if columns else object)

    def _table(self) -> _Table:
        more = ("…",) if len(self.ids) > SHOWN_COLUMNS else ()
        rows = [
            (place_text(each.path, each.at), *(_text(v.value, v.unit) for v in each.values[:SHOWN_COLUMNS]), *more)
            for each in self
        ]
        title = f"{_counted(len(self), 'difference')} among {len(self.ids)} DataFiles"
        return _Table(title, ("path", *self.ids[:SHOWN_COLUMNS], *more), rows)


def _named(each: Variation) -> tuple[str, list[Any]]:
    """The name of a column and its cells, None where there is nothing, with units in the one or the other."""
    name = place_text(each.path, each.at)
    cells = [(None if v.value is MISSING else v.value, v.unit or "") for v in each.values]
    units = {unit for value, unit in cells if value is not None or unit}
    if len(units) > 1:
        return name, [f"{value} {unit}".removesuffix(" ") if value is not None or unit else None for value, unit in cells]
    unit = "".join(units)
    return f"{name} [{unit}]" if unit else name, [value for value, _ in cells]


def _column(values: list[Any]) -> pd.Series[Any]:
    """With pandas' own dtype, unless that would change an integer."""
    import pandas as pd

    whole = [value for value in values if type(value) is int]
    if all(abs(value) <= EXACT for value in whole):
        return pd.Series(values)
    if len(whole) + values.count(None) == len(values) and all(-(1 << 63) <= value < 1 << 63 for value in whole):
        return integers(values)
    return pd.Series(values, dtype=object)


class History(_Printed[Change]):
    """The changes of a DataFile, newest first; each made a `revision`. The first revision is what was saved: no change."""

    def __init__(self, id: str, changes: Sequence[Mapping[str, Any]]) -> None:
        """From the answers of the server."""
        found = msgspec.convert(changes, list[Change])
        super().__init__(
            [msgspec.structs.replace(each, differences=tuple(map(_pythonic, each.differences))) for each in found]
        )
        self.id = id
        self._changes = changes

    def to_json(self) -> list[Mapping[str, Any]]:
        """The changes as the server gave them."""
        return list(self._changes)

    def _table(self) -> _Table:
        rows: list[tuple[str, ...]] = []
        for change in self:
            head = str(change.revision), change.at[:19], change.actor
            cells = [_cells(difference) for difference in change.differences] or [("", "", "")]
            rows += [(*head, *cells[0]), *(("", "", "", *row) for row in cells[1:])]
        heads = "revision", "at", "actor", "path", "before", "after"
        return _Table(f"{_counted(len(self), 'change')} of {self.id}", heads, rows)


S = TypeVar("S", bound=msgspec.Struct)


def _pythonic(each: S) -> S:
    """Tagged values as Python objects."""
    fields = {name: getattr(each, name) for name in ("before", "after", "value") if hasattr(each, name)}
    python = {name: from_tagged(value) for name, value in fields.items() if value is not MISSING}
    return msgspec.structs.replace(each, **python)


def _counted(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _cells(each: Difference) -> tuple[str, str, str]:
    place = place_text(each.path, each.at)
    return place, _text(each.before, each.before_unit), _text(each.after, each.after_unit)


def _text(value: Any, unit: Any) -> str:
    if value is MISSING:
        return "–"
    if isinstance(value, dict) and "value" in value and isinstance(value.get("unit"), str):
        value, unit = value["value"], value["unit"]  # a whole setting that only one side has
    text = repr(value)
    if len(text) > WIDTH:
        text = text[: WIDTH - 1] + "…"
    return f"{text} {unit}" if isinstance(unit, str) and unit else text
