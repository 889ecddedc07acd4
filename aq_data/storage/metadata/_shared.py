"""Which parts of a filter a snapshot may match on its own, so that they are looked up there and found by its hash.

A document without its instruments and its snapshot have no path in common, so a condition on instruments holds in one of
the two; conditions that have to hold together are looked up together. Words may be in both, each for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from aq_data.models.matching import Facts, matches
from aq_data.models.query import All, AnyOf, Node, Not, Words

__all__ = ["NO_SNAPSHOTS", "Shared", "grouped", "has_negated_part", "holds", "is_in_instruments", "shared_parts"]

Shared = Mapping[Node, list[str] | None]
"""For parts of a filter the hashes of the snapshots that match them; None where these are too many to name."""
NO_SNAPSHOTS: Shared = {}


def is_in_instruments(path: str) -> bool:
    """Whether what stands at a path may be in a snapshot."""
    return path == "instruments" or path.startswith("instruments.")


def grouped(node: Node) -> Node:
    """The same filter with the conditions on instruments together, and every word apart."""
    if isinstance(node, (All, AnyOf)):
        children = tuple(grouped(child) for child in node.children)
        inside = tuple(child for child in children if _is_condition(child))
        if len(inside) < 2 or len(inside) == len(children):
            return type(node)(children)
        return type(node)((type(node)(inside), *(child for child in children if not _is_condition(child))))
    if isinstance(node, Not):
        return Not(grouped(node.child))
    if isinstance(node, Words) and len(node.words) > 1:
        return All(tuple(Words((word,)) for word in node.words))
    return node


def shared_parts(node: Node) -> Iterator[Node]:
    """The largest parts of a `grouped` filter that one snapshot may match as a whole; each is true where some term is."""
    if isinstance(node, Words) or _is_condition(node):
        yield node
    elif isinstance(node, (All, AnyOf)):
        for child in node.children:
            yield from shared_parts(child)
    elif isinstance(node, Not):
        yield from shared_parts(node.child)


def has_negated_part(node: Node) -> bool:
    """Whether a record may match because its snapshot does not."""
    if isinstance(node, Not):
        return any(True for _ in shared_parts(node.child))
    return isinstance(node, (All, AnyOf)) and any(map(has_negated_part, node.children))


def _is_condition(node: Node) -> bool:
    if isinstance(node, (All, AnyOf)):
        return bool(node.children) and all(map(_is_condition, node.children))
    return not isinstance(node, (Not, Words)) and is_in_instruments(node.path)


def holds(node: Node, facts: Facts, found: Mapping[Node, bool], end: float) -> bool:
    """Whether a document is matched: `facts` are of what is outside its snapshot, `found` says which parts are inside.

    Slow ones end as `matches` does.
    """
    if found.get(node):
        return True
    if isinstance(node, All):
        return all(holds(child, facts, found, end) for child in node.children)
    if isinstance(node, AnyOf):
        return any(holds(child, facts, found, end) for child in node.children)
    if isinstance(node, Not):
        return not holds(node.child, facts, found, end)
    return matches(node, facts, end)
