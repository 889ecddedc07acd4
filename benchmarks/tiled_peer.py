"""Tiled's client. Runs only inside Tiled's own environment, so nothing else here may import it."""

from typing import Any

import dask.array
import numpy as np
from numpy.typing import NDArray
from tiled.client import from_uri  # type: ignore[import-not-found]

from benchmarks.peer import ArrayHandle, Options, Peer, Rows

__all__ = ["TiledPeer", "TiledRows", "connect"]


class TiledPeer:
    """A file is a container with an array node for each array, which is what Tiled's documentation suggests."""

    def __init__(self, root: Any, chunks: tuple[int, ...] | None) -> None:
        self._root = root
        self._chunks = chunks

    def save_file(self, name: str, arrays: dict[str, NDArray[np.float64]], metadata: dict[str, Any]) -> str:
        container = self._root.create_container(metadata={"name": name, **metadata})
        for array_name, data in arrays.items():
            container.write_array(data, key=array_name)
        return str(container.item["id"])

    def save_array(self, name: str, data: NDArray[np.float64]) -> str:
        """Chunks are the client's choice (about 100 MB), unless `chunks` were given: dask carries those."""
        source = data if self._chunks is None else dask.array.from_array(data, chunks=self._chunks)  # type: ignore[no-untyped-call]
        return str(self._root.write_array(source, metadata={"name": name}).item["id"])

    def open_array(self, path: str) -> ArrayHandle:
        handle: ArrayHandle = self._root[tuple(path.split("/"))]
        return handle

    def begin_rows(self, name: str, width: int) -> Rows:
        return TiledRows(self._root, name, width)

    def discard_array(self, path: str) -> None:
        self._root.delete_contents(path, external_only=False)


class TiledRows:
    """An array that its client patches at the end, which is how Tiled appends."""

    def __init__(self, root: Any, name: str, width: int) -> None:
        self._root, self._name = root, name
        self._count = 0
        self._array: Any = None

    def append(self, row: NDArray[np.float64]) -> None:
        if self._array is None:
            self._array = self._root.write_array(row[np.newaxis], metadata={"name": self._name})
        else:
            self._array.patch(row[np.newaxis], offset=(self._count, 0), extend=True)
        self._count += 1

    def append_all(self, rows: list[NDArray[np.float64]]) -> None:
        for row in rows:
            self.append(row)

    def read(self) -> NDArray[np.float64]:
        values: NDArray[np.float64] = self._array[...]
        return values


def connect(options: Options) -> Peer:
    """`options`: `url`, `api_key`, and `chunks` (a list, or null for Tiled's own). No HTTP cache, NumPy answers."""
    root = from_uri(options["url"], structure_clients="numpy", cache=None, api_key=options["api_key"], remember_me=False)
    return TiledPeer(root, tuple(options["chunks"]) if options["chunks"] else None)
