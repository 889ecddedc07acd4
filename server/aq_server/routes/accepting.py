"""Which media type to answer with, by what a client accepts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from litestar.datastructures.headers import Accept

__all__ = ["best_match"]

_REFUSES = re.compile(r";\s*q\s*=\s*0(\.0*)?\s*(;|$)", re.IGNORECASE)


def best_match(accept: str, possible: Sequence[str]) -> str | None:
    """The most preferred of the types that are possible, the first of equal ones; None when none is acceptable.

    RFC 9110, 12.5.1. Of a quality of 0 litestar alone makes a low preference; here it refuses what it names, unless a
    narrower range does not.
    """
    ranges = accept.split(",")
    kept = [each for each in ranges if not _REFUSES.search(each)]
    if len(kept) < len(ranges):
        is_kept = {_name(each): _REFUSES.search(each) is None for each in ranges}
        possible = [media for media in possible if _narrowest(media, is_kept)]
    try:
        return Accept(",".join(kept)).best_match(list(possible)) if kept else None
    except (ValueError, OverflowError):  # a quality that is no number
        return None


def _name(media_range: str) -> str:
    return media_range.partition(";")[0].strip().lower()


def _narrowest(media: str, is_kept: dict[str, bool]) -> bool:
    """What the narrowest of the ranges around a type says of it."""
    around = (_name(media), f"{media.partition('/')[0]}/*", "*/*")
    return next((is_kept[each] for each in around if each in is_kept), True)
