"""aq-data's client, used as a user would."""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

import aq_data
from benchmarks.peer import ArrayHandle, Options, Peer, Rows

__all__ = ["AqPeer", "AqRows", "connect"]


_turns: dict[str, Iterator[str]] = {}


class AqPeer:
    """A file is a DataFile; a large array is a DataFile with one array."""

    def __init__(self, url: str) -> None:
        self._client = aq_data.connect(url)

    def save_file(self, name: str, arrays: dict[str, NDArray[np.float64]], metadata: dict[str, Any]) -> str:
        return str(self._client.save(arrays, name=name, metadata=metadata).id)

    def save_array(self, name: str, data: NDArray[np.float64]) -> str:
        return f"{self.save_file(name, {'data': data}, {})}/data"

    def open_array(self, path: str) -> ArrayHandle:
        file, _, name = path.partition("/")
        handle: ArrayHandle = self._client.get(file)[name]
        return handle

    def begin_rows(self, name: str, width: int) -> Rows:
        return AqRows(self._client, name, width)

    def discard_array(self, path: str) -> None:
        self._client.delete(path.partition("/")[0])


class AqRows:
    """A sweep."""

    def __init__(self, client: aq_data.Client, name: str, width: int) -> None:
        variables = {"y": ("float64", ("row", "column"))}
        self._client = client
        self._sweep = client.sweep(name, dims={"row": None, "column": width}, variables=variables)

    def append(self, row: NDArray[np.float64]) -> None:
        self._sweep.append(y=row)
        self._sweep.flush()

    def append_all(self, rows: list[NDArray[np.float64]]) -> None:
        for row in rows:
            self._sweep.append(y=row)
        self._sweep.flush()

    def read(self) -> NDArray[np.float64]:
        self._sweep.finish()
        values: NDArray[np.float64] = self._client.get(self._sweep.id)["y"][...]
        return values


def connect(options: Options) -> Peer:
    """`options`: `url`, or several `urls`, which take turns: clients spread over the servers of a cluster."""
    return AqPeer(next(_turns.setdefault(options["url"], cycle(options.get("urls", [options["url"]])))))
