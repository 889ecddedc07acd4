"""What a side must be able to do for the loops that time it."""

from types import EllipsisType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.workloads import Selection

__all__ = ["ArrayHandle", "Options", "Peer"]

Options: TypeAlias = dict[str, Any]
"""What a peer needs to connect, as JSON: `url`, and whatever else it asks for."""


class ArrayHandle(Protocol):
    """An opened array. Indexing answers an array in memory."""

    def __getitem__(self, selection: Selection | EllipsisType, /) -> NDArray[np.float64]: ...


class Peer(Protocol):
    """One client of one side, for one thread. Paths are `<file>/<array>`, in the side's own words for a file."""

    def save_file(self, name: str, arrays: dict[str, NDArray[np.float64]], metadata: dict[str, Any]) -> str:
        """Store one file; return what goes before the `/` of its arrays' paths."""
        ...

    def save_array(self, name: str, data: NDArray[np.float64]) -> str:
        """Store one large array in the side's usual way; return its path."""
        ...

    def open_array(self, path: str) -> ArrayHandle: ...

    def discard_array(self, path: str) -> None:
        """Remove what `save_array` stored, to keep the disk small between rounds."""
        ...
