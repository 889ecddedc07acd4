"""What SQLite asks of Python during a search: patterns, and elements of lists, neither of which its index knows whole."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from aq_data.models.matching import Facts, matches
from aq_data.models.patterns import found_in
from aq_data.models.query import Element, Match
from aq_data.models.snapshots import snapshot_document
from aq_data.models.terms import TEXT_PREFIX, elements_at, texts_at

__all__ = ["handing", "install"]

_numbers = itertools.count(1)
_handed: dict[int, Any] = {}


@contextmanager
def handing(end: float) -> Iterator[Any]:
    """A function that numbers nodes for the functions of `install`, until the end of the block.

    After `end` (of `time.monotonic`) those that read whole documents fail: SQLite looks at the clock only every so many
    steps of its own, between which there may be thousands of documents.
    """
    mine: list[int] = []

    def hand(node: Match | Element) -> int:
        number = next(_numbers)
        _handed[number] = _Matcher(node, end) if isinstance(node, Match) else _Elements(node, end)
        mine.append(number)
        return number

    try:
        yield hand
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


class _Matcher:
    """A pattern that remembers its last answer: rows come in order, and the same text many times."""

    def __init__(self, node: Match, end: float) -> None:
        self._node, self._end = node, end
        self.known: dict[int, bool] = {}
        self._last: tuple[str | None, int] = (None, 0)

    def judge(self, text: str) -> int:
        """0, 1, or 2 where the text may be longer than what the index holds."""
        last, answer = self._last
        if text != last:
            answer = 2 if len(text) >= TEXT_PREFIX else int(found_in(self._node.pattern, text))
            self._last = (text, answer)
        return answer

    def judge_whole(self, d: int, document: bytes) -> bool:
        _check_time(self._end)
        texts = texts_at(_document(d, document), self._node.path)
        answer = self.known[d] = any(found_in(self._node.pattern, text) for text in texts)
        return answer


class _Elements:
    """What is asked of the elements of a list."""

    def __init__(self, node: Element, end: float) -> None:
        self._node, self._end = node, end
        self.known: dict[int, bool] = {}

    def judge_whole(self, d: int, document: bytes) -> bool:
        elements = elements_at(_document(d, document), self._node.path)
        answer = self.known[d] = any(self._is_match(element) for element in elements)
        return answer

    def _is_match(self, element: Any) -> bool:
        _check_time(self._end)
        return matches(self._node.child, Facts.of_element(element))


def _document(d: int, content: bytes) -> Any:
    return snapshot_document(content) if d < 0 else msgspec.json.decode(content)


def _check_time(end: float) -> None:
    if time.monotonic() > end:
        raise TimeoutError  # SQLite makes an error of its own of it
