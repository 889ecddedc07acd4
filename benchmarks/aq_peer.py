"""aq-data's client, used as a user would."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

import aq_data
from benchmarks.peer import ArrayHandle, Options, Peer

__all__ = ["AqPeer", "connect"]


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

    def discard_array(self, path: str) -> None:
        self._client.delete(path.partition("/")[0])


def connect(options: Options) -> Peer:
    """`options`: `url`."""
    return AqPeer(options["url"])
