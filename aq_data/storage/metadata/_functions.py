"""What SQLite asks of Python during a search: patterns, and elements of lists, neither of which its index knows whole."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from aq_data.errors import QueryError
from aq_data.models.matching import Facts, matches
from aq_data.models.patterns import found_in
from aq_data.models.query import Element, Match
from aq_data.models.snapshots import snapshot_document
from aq_data.models.terms import TEXT_PREFIX

__all__ = ["handing", "install"]

_numbers = itertools.count(1)
_handed: dict[int, Any] = {}


@contextmanager
def handing(end: float) -> Iterator[Any]:
    """A function that numbers nodes for the functions of `install`, until the end of the block.

    After `end` (of `time.monotonic`) those that read whole documents fail: SQLite looks at the clock only every so many
    steps of its own, between which there may be thousands of documents. Of what they refuse SQLite tells only that a
    function failed; it leaves the block as the QueryError that it was.
    """
    mine: list[int] = []

    def hand(node: Match | Element) -> int:
        number = next(_numbers)
        _handed[number] = _Matcher(node, end) if isinstance(node, Match) else _Judge(node, end)
        mine.append(number)
        return number

    try:
        yield hand
    except sqlite3.OperationalError as exc:
        for number in mine:
            if _handed[number].refusal is not None:
                raise _handed[number].refusal from exc
        raise
    finally:
        for number in mine:
            _handed.pop(number, None)


def install(connection: sqlite3.Connection) -> None:
    """Make `aq_regex(number, text)`, `aq_text` and `aq_element(number, position, document)`, `aq_known(number, position)`.

    The last is what the two before it answered of a document: the index leads to one as often as it has values there, and to
    a snapshot as often as there are documents that have it.
    """
    connection.create_function("aq_regex", 2, lambda number, text: _handed[number].judge(text))
    connection.create_function("aq_known", 2, lambda number, d: _handed[number].known.get(d))
    connection.create_function("aq_text", 3, lambda number, d, document: _handed[number].judge_whole(d, document))
    connection.create_function("aq_element", 3, lambda number, d, document: _handed[number].judge_whole(d, document))


class _Judge:
    """Judges whole documents, and remembers what it said of each."""

    def __init__(self, node: Match | Element, end: float) -> None:
        self._node, self._end = node, end
        self.known: dict[int, bool] = {}
        self.refusal: QueryError | None = None

    def judge_whole(self, d: int, document: bytes) -> bool:
        try:
            answer = self.known[d] = matches(self._node, Facts(_document(d, document)), self._end)
        except QueryError as exc:
            self.refusal = exc
            raise
        return answer


class _Matcher(_Judge):
    """A pattern that remembers its last answer, too: rows come in order, and the same text many times."""

    def __init__(self, node: Match, end: float) -> None:
        super().__init__(node, end)
        self._pattern = node.pattern
        self._last: tuple[str | None, int] = (None, 0)

    def judge(self, text: str) -> int:
        """0, 1, or 2 where the text may be longer than what the index holds."""
        last, answer = self._last
        if text != last:
            answer = 2 if len(text) >= TEXT_PREFIX else int(found_in(self._pattern, text))
            self._last = (text, answer)
        return answer


def _document(d: int, content: bytes) -> Any:
    return snapshot_document(content) if d < 0 else msgspec.json.decode(content)
