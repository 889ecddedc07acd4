"""One care that msgspec asks of programs with threads."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["resolve"]


def resolve(*types: Any) -> None:
    """Have msgspec work out these types now, while their module is imported.

    It does so when a type is first decoded, and two threads that come to that at the same time crash the interpreter
    (msgspec 0.22, seen in a server whose first two requests came together). Every module calls this for its own structs.
    """
    for type_ in types:
        msgspec.json.Decoder(type_)
