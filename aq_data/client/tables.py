"""Search results as a pandas table: asked for as columns, by Arrow where it is installed, else by NDJSON."""

from __future__ import annotations

import importlib.util
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from aq_data.client.http import Http
from aq_data.errors import ValidationError
from aq_data.models.columns import column_type, field_segments, kinds, typed_values
from aq_data.models.values import from_tagged
from aq_data.wire.codec import ARROW, NDJSON
from aq_data.wire.routes import SEARCH

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EXACT", "integers", "table_of", "table_pieces"]

EXACT = 1 << 53
"""A float64 has every integer up to here."""


def table_pieces(
    http: Http, question: Mapping[str, Any], columns: Sequence[str], media: str
) -> Generator[bytes, None, None]:
    """The table as the server streams it."""
    content = msgspec.json.encode({**question, "fields": _listed(columns)})
    headers = {"Accept": media, "Content-Type": "application/json"}
    with http.stream("POST", SEARCH, content=content, headers=headers) as answer:
        yield from answer.iter_bytes()


def table_of(http: Http, question: Mapping[str, Any], columns: Sequence[str]) -> pd.DataFrame:
    """One row per match, with the ids as index."""
    import pandas as pd

    columns = _listed(columns)
    fields = columns if "id" in columns else ["id", *columns]
    accept = f"{ARROW}, {NDJSON};q=0.5" if importlib.util.find_spec("pyarrow") else NDJSON
    content = msgspec.json.encode({**question, "fields": fields})
    answer = http.request("POST", SEARCH, content=content, headers={"Accept": accept, "Content-Type": "application/json"})
    is_arrow = answer.headers["content-type"].startswith(ARROW)
    found = _from_arrow(answer.content) if is_arrow else _from_lines(answer.content, fields)
    index = pd.Index(list(found["id"]), name="id", dtype=object)
    return pd.DataFrame({name: found[name].set_axis(index) for name in columns}, columns=columns, index=index)


def _listed(columns: Sequence[str]) -> list[str]:
    if isinstance(columns, str):
        raise ValidationError(f"columns are a list of paths, not the text {columns!r}: write {[columns]!r}")
    return list(columns)


def _from_arrow(content: bytes) -> dict[str, pd.Series[Any]]:
    import pandas as pd
    import pyarrow as pa

    found = {}
    with pa.ipc.open_stream(content) as stream:
        table = stream.read_all()
    for field in table.schema:
        column = table[field.name]
        if (field.metadata or {}).get(b"aq_data") == b"json":
            cells = [None if text is None else from_tagged(msgspec.json.decode(text)) for text in column.to_pylist()]
            found[field.name] = pd.Series(cells, dtype=object)
        elif pa.types.is_integer(field.type) and column.null_count:
            found[field.name] = integers(column.to_pylist())
        else:
            found[field.name] = column.to_pandas()
    return found


def _from_lines(content: bytes, fields: Sequence[str]) -> dict[str, pd.Series[Any]]:
    import pandas as pd

    rows = msgspec.json.Decoder().decode_lines(content)
    found = {}
    for field in fields:
        cells, path = [row[field] for row in rows], field_segments(field)
        type = column_type(kinds(cells, path))
        if type in ("json", "empty"):
            found[field] = pd.Series([from_tagged(cell) for cell in cells], dtype=object)
        elif type == "integer":
            found[field] = integers(cells)
        else:
            dtype = {"float": "float64", "instant": "datetime64[us, UTC]"}.get(type)
            found[field] = pd.Series(typed_values(cells, type), dtype=dtype)
    return found


def integers(values: list[int | None]) -> pd.Series[Any]:
    """As pandas has them: with a missing one float64, unless that would change a number."""
    import pandas as pd

    if None in values and any(value is not None and abs(value) > EXACT for value in values):
        return pd.Series(values, dtype="Int64")
    return pd.Series(values)
