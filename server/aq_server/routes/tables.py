"""Rows of search results as they travel: NDJSON, CSV, Arrow."""

from __future__ import annotations

import asyncio
import csv
import io
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import msgspec

from aq_data.errors import NotAcceptableError, UnavailableError
from aq_data.models.columns import Cell, ColumnType, Kind, column_type, field_segments, kinds, typed_values
from aq_data.wire.codec import ARROW, CSV, JSON, NDJSON
from aq_server.routes.accepting import best_match

__all__ = ["choose_table", "table_pieces"]

Rows = list[list[Cell]]

HELD_BYTES = 8 << 20
"""Rows of an Arrow table that wait in memory until their types are known; more wait in a temporary file."""


@lru_cache
def choose_table(accept: str) -> str:
    """The media type of an answer to a search: JSON unless another is preferred."""
    possible = [JSON, NDJSON, CSV, *([ARROW] if find_spec("pyarrow") else [])]
    media = best_match(accept, possible)
    if media is None:
        extra = "" if ARROW in possible else "; Arrow needs pip install 'aq-data[arrow]' on the server"
        raise NotAcceptableError(f"search results can be sent as {', '.join(possible)}{extra}")
    return media


async def table_pieces(fields: Sequence[str], pages: AsyncIterator[Rows], media: str) -> AsyncIterator[bytes]:
    """The table in pieces. What raises before the first piece can still be answered as what it is."""
    if media == ARROW:
        async for piece in _arrow(fields, pages):
            yield piece
        return
    encode = partial(_ndjson, fields) if media == NDJSON else _csv
    head = _csv([list(fields)]) if media == CSV else b""
    async for rows in pages:
        yield head + await asyncio.to_thread(encode, rows)
        head = b""


def _ndjson(fields: Sequence[str], rows: Rows) -> bytes:
    return msgspec.json.Encoder().encode_lines(dict(zip(fields, row, strict=True)) for row in rows)


def _csv(rows: Rows) -> bytes:
    """RFC 4180. Missing is empty; what is neither a number, a boolean, an instant nor text is JSON."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\r\n").writerows([[_plain(cell) for cell in row] for row in rows])
    return text.getvalue().encode()


def _plain(cell: Cell) -> Any:
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, dict) and len(cell) == 1:
        for tag in ("$date", "$float"):
            if tag in cell:
                return cell[tag]
    return msgspec.json.encode(cell).decode() if isinstance(cell, (list, dict)) else cell


async def _arrow(fields: Sequence[str], pages: AsyncIterator[Rows]) -> AsyncIterator[bytes]:
    """An Arrow IPC stream. Its schema comes first, so every row is read before the first is sent."""
    import pyarrow as pa

    with _Waiting(fields) as waiting:
        async for rows in pages:
            await asyncio.to_thread(waiting.add, rows)
        types = waiting.types()
        schema = pa.schema(
            [
                pa.field(field, _arrow_type(pa, type), metadata={"aq_data": "json"} if type == "json" else None)
                for field, type in zip(fields, types, strict=True)
            ]
        )
        sink = io.BytesIO()

        def batch(rows: Rows) -> bytes:
            columns = zip(*rows, strict=True)
            values = [
                pa.array(typed_values(column, type), field.type)
                for column, type, field in zip(columns, types, schema, strict=True)
            ]
            writer.write_batch(pa.record_batch(values, schema=schema))
            return _taken(sink)

        with pa.ipc.new_stream(sink, schema) as writer:
            yield _taken(sink)
            for rows in waiting.pages():
                yield await asyncio.to_thread(batch, rows)
        yield _taken(sink)


def _arrow_type(pa: Any, type: ColumnType) -> Any:
    return {
        "empty": pa.null(),
        "bool": pa.bool_(),
        "integer": pa.int64(),
        "float": pa.float64(),
        "instant": pa.timestamp("us", tz="UTC"),
    }.get(type, pa.string())


def _taken(sink: io.BytesIO) -> bytes:
    """What was written since the last time."""
    content = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return content


class _Waiting:
    """Pages of rows that wait, on disk when they are many, and what their columns hold."""

    def __init__(self, fields: Sequence[str]) -> None:
        self._paths = [field_segments(field) for field in fields]
        self._kinds: list[set[Kind]] = [set() for _ in fields]
        self._file = tempfile.SpooledTemporaryFile(HELD_BYTES)  # noqa: SIM115  (closed by `__exit__`)
        self._lengths: list[int] = []

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def add(self, rows: Rows) -> None:
        for found, column, path in zip(self._kinds, zip(*rows, strict=True), self._paths, strict=False):
            found |= kinds(column, path)
        encoded = msgspec.json.encode(rows)
        try:
            self._file.write(encoded)
        except OSError as exc:
            raise UnavailableError(f"the server has no room for a table of this size ({exc.strerror}); ask for CSV") from exc
        self._lengths.append(len(encoded))

    def types(self) -> list[ColumnType]:
        return [column_type(found) for found in self._kinds]

    def pages(self) -> Iterator[Rows]:
        self._file.seek(0)
        for length in self._lengths:
            rows = msgspec.json.decode(self._file.read(length))
            if rows:
                yield rows
