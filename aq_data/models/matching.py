"""The filter language evaluated over one document: what every store's compiled form must agree with."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from aq_data.models.paths import ELEMENT
from aq_data.models.patterns import found_in
from aq_data.models.query import All, AnyOf, Compare, Element, Exists, Match, Node, Not, Operator
from aq_data.models.terms import Term, elements_at, terms, terms_of_element, texts_at
from aq_data.models.words import document_words

__all__ = ["Facts", "matches", "outside"]


class Facts:
    """What a filter may ask of a document in its JSON form, or of an element of a list; made when first asked."""

    def __init__(self, document: Any, is_element: bool = False) -> None:
        self.document, self._is_element = document, is_element

    @classmethod
    def of_element(cls, element: Any) -> Facts:
        return cls(element, is_element=True)

    @cached_property
    def terms(self) -> frozenset[Term]:
        return frozenset(terms_of_element(self.document) if self._is_element else terms(self.document))

    def texts(self, path: str) -> list[str]:
        """Whole, at a path."""
        return [] if self._is_list else texts_at(self.document, path)

    def elements(self, path: str) -> list[Any]:
        """Of the lists at a path."""
        return [] if self._is_list and path != ELEMENT else elements_at(self.document, path)

    @property
    def _is_list(self) -> bool:
        return self._is_element and isinstance(self.document, list)

    @cached_property
    def words(self) -> frozenset[str]:
        return document_words(self.document) if isinstance(self.document, Mapping) else frozenset()


def matches(node: Node, facts: Facts, end: float = math.inf) -> bool:
    """Whether the document is matched.

    TimeoutError after `end` (of `time.monotonic`), which is looked at before each element of a list and each text.
    QueryError for a text that is too long for a pattern.
    """
    _check_time(end)
    if isinstance(node, All):
        return all(matches(child, facts, end) for child in node.children)
    if isinstance(node, AnyOf):
        return any(matches(child, facts, end) for child in node.children)
    if isinstance(node, Not):
        return not matches(node.child, facts, end)
    if isinstance(node, Exists):
        return any(term.path == node.path for term in facts.terms)
    if isinstance(node, Match):
        return any(_found_in_time(node, text, end) for text in facts.texts(node.path))
    if isinstance(node, Element):
        return any(matches(node.child, Facts.of_element(item), end) for item in facts.elements(node.path))
    if isinstance(node, Compare):
        return any(t.path == node.path and t.kind == node.kind and _holds(t.value, node.op, node.value) for t in facts.terms)
    return all(any(word.startswith(wanted) for word in facts.words) for wanted in node.words)


def _found_in_time(node: Match, text: str, end: float) -> bool:
    _check_time(end)
    return found_in(node.pattern, text)


def _check_time(end: float) -> None:
    if time.monotonic() > end:
        raise TimeoutError


def outside(node: Node, path: str) -> Node:
    """What must hold of the document when an element of the list at `path` is matched by `node`; perhaps more general.

    Of a list within the list a document has nothing but its digest, so of what that holds nothing can be said.
    """
    if (isinstance(node, Element) and node.path == ELEMENT) or (isinstance(node, Compare) and node.kind == "size"):
        return Exists(path + node.path.removeprefix(ELEMENT))
    if isinstance(node, (Compare, Exists, Match)):
        inside = node.path.removeprefix(ELEMENT)
        return replace(node, path=path + inside)
    if isinstance(node, Element):
        return outside(node.child, path + node.path.removeprefix(ELEMENT))
    if isinstance(node, AnyOf):
        return AnyOf(tuple(outside(child, path) for child in node.children))
    if isinstance(node, All):
        return All(tuple(outside(child, path) for child in node.children))
    return All(())


def _holds(left: Any, op: Operator, right: Any) -> bool:
    if op == "eq":
        return bool(left == right)
    if op in ("gt", "gte"):
        return bool(left > right or (op == "gte" and left == right))
    return bool(left < right or (op == "lte" and left == right))
