"""The folder of all spools of this computer: which there are, what waits in them, which is being delivered."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from aq_data.client.spool import Spool, read_target
from aq_data.models.structs import resolve
from aq_data.models.sweep import Block

__all__ = ["SpoolInfo", "found_spools", "is_being_delivered", "spool_paths", "spool_root"]


class SpoolInfo(msgspec.Struct, frozen=True):
    """What `aq-data spool ls` shows. `blocks` and `bytes` are what is not known to have arrived; `live`: being written.

    `refused` is why the server did not take it when it was last tried.
    """

    path: str
    target: str
    sweep: str
    writer: str
    name: str
    blocks: int
    bytes: int
    live: bool
    refused: str = ""


def spool_root() -> Path:
    """`AQ_DATA_SPOOL`, else `~/.aq_data/spool`."""
    named = os.environ.get("AQ_DATA_SPOOL")
    return Path(named).expanduser() if named else Path.home() / ".aq_data" / "spool"


def is_being_delivered(root: Path, sweep: str) -> bool:
    """Whether some process is delivering what a writer of the sweep left behind."""
    for path in list(root.glob(f"{sweep}.*/delivering")):  # whole: a listing left half-way stays open
        spool = Spool.open(path.parent)
        if spool is None and path.exists():
            return True
        if spool is not None:
            spool.close()
    return False


def spool_paths(root: Path) -> list[Path]:
    """Folders of spools below `root`."""
    return sorted(path.parent for path in root.glob("*/target"))


def found_spools(root: Path) -> list[SpoolInfo]:
    """Every spool below `root`, also those being written."""
    infos = []
    for path in spool_paths(root):
        try:
            spool = Spool.open(path)
            reader = spool or Spool(path, read_target(path))
            blocks, size = _waiting(reader)
        except (OSError, msgspec.DecodeError):
            continue  # delivered meanwhile
        if spool is not None:
            spool.close()
        else:
            reader._close_reading()  # noqa: SLF001  (the lock is another's)
        target = reader.target
        infos.append(
            SpoolInfo(
                str(path),
                target.target,
                target.sweep,
                target.writer,
                target.name,
                blocks,
                size,
                spool is None,
                _refused(path),
            )
        )
    return infos


def _refused(path: Path) -> str:
    try:
        return (path / "refused").read_text()
    except OSError:
        return ""


def _waiting(spool: Spool) -> tuple[int, int]:
    """Blocks, and bytes of their values, beyond what is known to have arrived."""
    known, blocks, size = spool.acknowledged(), 0, 0
    for segment in spool.segments():
        for frame, _ in spool.frames(segment, 0, spool.whole(segment)):
            if frame.kind == "block" and msgspec.json.decode(frame.header, type=Block).n > known:
                blocks, size = blocks + 1, size + frame.length
    return blocks, size


resolve(SpoolInfo)
