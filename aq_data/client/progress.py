"""Progress bars for long transfers: on a terminal's standard error or in a notebook, nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]

SHOWN_FROM = 32 << 20
"""Bytes below which a transfer is over before a bar could be read."""


def _is_watched() -> bool:
    if os.environ.get("AQ_DATA_PROGRESS", "").lower() in ("0", "false", "off"):
        return False
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], object]]:
    """A function to call with the bytes moved since the last call. `AQ_DATA_PROGRESS=0` turns bars off."""
    if total < SHOWN_FROM or not _is_watched():
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr) as bar:
        yield bar.update
