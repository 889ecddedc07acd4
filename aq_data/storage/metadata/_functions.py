"""What SQLite asks of Python during a search: patterns, and elements of lists, neither of which its index knows whole."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from aq_data.models.matching import Facts, matches
from aq_data.models.patterns import found_in
from aq_data.models.query import Element, Match
from aq_data.models.snapshots import snapshot_document
from aq_data.models.terms import TEXT_PREFIX, texts_at

__all__ = ["handing", "install"]

_numbers = itertools.count(1)
_handed: dict[int, Any] = {}


@contextmanager
def handing() -> Iterator[Any]:
    """A function that numbers nodes for the functions of `install`, until the end of the block."""
    mine: list[int] = []

    def hand(node: Match | Element) -> int:
        number = next(_numbers)
        _handed[number] = _Matcher(node) if isinstance(node, Match) else _Elements(node)
        mine.append(number)
        return number

    try:
        yield hand
    finally:
        for number in mine:
            _handed.pop(number, None)


def install(connection: sqlite3.Connection) -> None:
    """Make these functions known; each takes the number of a pattern or of an element.

    aq_regex(number, text)                   0, 1, or 2 where the text may be longer than what the index holds
    aq_document(number, document)            whether the whole document is matched
    aq_known(number, snapshot)               the same of a snapshot, or NULL before `aq_snapshot` was asked
    aq_snapshot(number, snapshot, content)   the same, for the first time
    """
    connection.create_function("aq_regex", 2, lambda number, text: _handed[number].judge(text))
    connection.create_function("aq_document", 2, lambda number, document: _handed[number].matches(_decoded(document)))
    connection.create_function("aq_known", 2, lambda number, snapshot: _handed[number].known.get(snapshot))
    connection.create_function("aq_snapshot", 3, lambda number, *snapshot: _handed[number].judge_snapshot(*snapshot))


def _decoded(document: bytes) -> Any:
    return msgspec.json.decode(document)


class _Judge:
    """Remembers what it found of snapshots: they are large, and many documents have the same."""

    def __init__(self) -> None:
        self.known: dict[int, bool] = {}

    def matches(self, document: Any) -> bool:
        raise NotImplementedError

    def judge_snapshot(self, snapshot: int, content: bytes) -> bool:
        answer = self.known[snapshot] = self.matches(snapshot_document(content))
        return answer


class _Matcher(_Judge):
    """A pattern that remembers its last answer: rows come in order, and the same text many times."""

    def __init__(self, node: Match) -> None:
        super().__init__()
        self._node = node
        self._last: tuple[str | None, int] = (None, 0)

    def judge(self, text: str) -> int:
        last, answer = self._last
        if text != last:
            answer = 2 if len(text) >= TEXT_PREFIX else int(found_in(self._node.pattern, text))
            self._last = (text, answer)
        return answer

    def matches(self, document: Any) -> bool:
        return any(found_in(self._node.pattern, text) for text in texts_at(document, self._node.path))


class _Elements(_Judge):
    def __init__(self, node: Element) -> None:
        super().__init__()
        self._node = node

    def matches(self, document: Any) -> bool:
        return matches(self._node, Facts(document))
