"""What a side must be able to do for the loops that time it."""

from types import EllipsisType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.workloads import Selection

__all__ = ["ArrayHandle", "Options", "Peer", "Rows"]

Options: TypeAlias = dict[str, Any]
"""What a peer needs to connect, as JSON: `url`, and whatever else it asks for."""


class ArrayHandle(Protocol):
    """An opened array. Indexing answers an array in memory."""

    def __getitem__(self, selection: Selection | EllipsisType, /) -> NDArray[np.float64]: ...


class Rows(Protocol):
    """A two-dimensional float64 array that grows by rows."""

    def append(self, row: NDArray[np.float64]) -> None:
        """One row more; durable when this returns, if the side can say so."""
        ...

    def append_all(self, rows: list[NDArray[np.float64]]) -> None:
        """Many rows, in the side's fastest way; durable when this returns."""
        ...

    def read(self) -> NDArray[np.float64]: ...


class Peer(Protocol):
    """One client of one side, for one thread. Paths are `<file>/<array>`, in the side's own words for a file."""

    def save_file(self, name: str, arrays: dict[str, NDArray[np.float64]], metadata: dict[str, Any]) -> str:
        """Store one file; return what goes before the `/` of its arrays' paths."""
        ...

    def save_array(self, name: str, data: NDArray[np.float64]) -> str:
        """Store one large array in the side's usual way; return its path."""
        ...

    def open_array(self, path: str) -> ArrayHandle: ...

    def begin_rows(self, name: str, width: int) -> Rows:
        """An array of `width` columns and no rows yet."""
        ...

    def discard_array(self, path: str) -> None:
        """Remove what `save_array` stored, to keep the disk small between rounds."""
        ...
