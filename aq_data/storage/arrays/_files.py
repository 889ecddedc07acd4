"""Files that are on disk when they are said to be, in folders that others change at the same time."""

from __future__ import annotations

import errno
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from aq_data.storage.arrays.blobs import Buffer

__all__ = ["RACES", "create", "folds_names", "link", "refuse", "remove_tree", "replace", "sync_directory", "write_all"]

RACES = 20
"""How often an operation starts over when another process removed or added a file under its hands."""


def folds_names(folder: Path) -> bool:
    """Whether the file system takes names for one that differ only in case, as those of macOS and Windows do."""
    name = f".Case-{os.getpid()}-{time.monotonic_ns()}"
    try:
        (folder / name).touch()
    except OSError:
        return False  # nothing can be written, so nothing can be mixed up
    try:
        return (folder / name.lower()).exists()
    finally:
        with suppress(OSError):
            (folder / name).unlink()


def link(source: str, target: str) -> None:
    """A second name for a file, unless something has that name already."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except FileNotFoundError:
        if os.path.exists(target):
            return
        if not os.path.exists(source):
            raise
        os.makedirs(os.path.dirname(target), exist_ok=True)
        link(source, target)


def replace(path: str, temporary: str, data: Buffer) -> None:
    """Put data in the place of what stands under a path, flushed first; the temporary file lies in the same folder."""
    try:
        descriptor = create(temporary)
        try:
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_directory(os.path.dirname(path))


def remove_tree(path: str) -> None:
    """Remove a folder, also one in which somebody who is about to be refused is still writing."""
    for _ in range(RACES):
        try:
            shutil.rmtree(path)
            return
        except OSError as exc:
            if exc.errno != errno.ENOTEMPTY:
                raise
    shutil.rmtree(path)


def create(path: str) -> int:
    """A descriptor of a fresh file, whose folders are made when they are not there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o644)


def write_all(descriptor: int, data: Buffer) -> None:
    """Write to the end, however often the operating system stops in the middle."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view) :]


def sync_directory(path: str) -> None:
    """Flush the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse(exc: OSError) -> None:
    """What `os.walk` is to do with a folder it cannot read, unless the folder is gone."""
    if not isinstance(exc, FileNotFoundError):
        raise exc
