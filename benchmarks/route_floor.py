"""The floor of a request: a bare Litestar route, fetched by httpx into a NumPy array, as aq-data's client does.

As a program (`python -m benchmarks.route_floor PORT`) it is the server; as a peer, the client. Every read answers the
same numbers, so it is good for nothing but the time of a box (W4).
"""

import sys
from types import EllipsisType
from typing import Any

import httpx
import numpy as np
import uvicorn
from litestar import Litestar, MediaType, get
from numpy.typing import NDArray

from benchmarks.peer import ArrayHandle, Options, Peer
from benchmarks.workloads import BOX, FULL, Selection, array_of

__all__ = ["RouteFloor", "connect"]

_SHAPE = (BOX, BOX, FULL.cube[2])
"""Of the one box: 16 kB."""


class Box:
    """One GET of 16 kB, streamed into memory of its own."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def __getitem__(self, selection: Selection | EllipsisType, /) -> NDArray[np.float64]:
        box = np.empty(_SHAPE)
        target = box.data.cast("B")
        filled = 0
        with self._client.stream("GET", "/box") as response:
            response.raise_for_status()
            for piece in response.iter_raw():
                target[filled : filled + len(piece)] = piece
                filled += len(piece)
        if filled != box.nbytes:
            raise EOFError(f"{filled} bytes of {box.nbytes}")
        return box


class RouteFloor:
    """Stores nothing; every path leads to the same box."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url)

    def save_file(self, name: str, arrays: dict[str, NDArray[np.float64]], metadata: dict[str, Any]) -> str:
        return name

    def save_array(self, name: str, data: NDArray[np.float64]) -> str:
        return name

    def open_array(self, path: str) -> ArrayHandle:
        return Box(self._client)

    def discard_array(self, path: str) -> None:
        pass


def connect(options: Options) -> Peer:
    """`options`: `url`."""
    return RouteFloor(options["url"])


def _serve(port: int) -> None:
    content = array_of(_SHAPE, seed=0).tobytes()

    @get("/box", media_type=MediaType.TEXT, sync_to_thread=False)
    def box() -> bytes:
        return content

    uvicorn.run(Litestar([box], openapi_config=None), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
