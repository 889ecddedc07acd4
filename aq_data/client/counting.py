"""What `Client.distinct` gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

__all__ = ["Values"]


class Values(Mapping[Any, int]):
    """Values with the number of DataFiles of each, most frequent first: a dict in which `True` is not 1, nor `False` 0.

    Equal to a dict (or another of these) that has the same numbers for the same values, in whatever order.
    """

    def __init__(self, counted: Iterable[tuple[Any, int]]) -> None:
        self._counted = {_key(value): (value, count) for value, count in counted}

    def __getitem__(self, value: Any) -> int:
        try:
            return self._counted[_key(value)][1]
        except KeyError:
            raise KeyError(value) from None

    def __iter__(self) -> Iterator[Any]:
        return (value for value, _ in self._counted.values())

    def __len__(self) -> int:
        return len(self._counted)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        return {key: count for key, (_, count) in self._counted.items()} == {_key(v): n for v, n in other.items()}

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{value!r}: {count}" for value, count in self._counted.values()) + "}"


def _key(value: Any) -> tuple[bool, Any]:
    return isinstance(value, bool), value
