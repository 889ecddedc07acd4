"""zarr-python in the driver's own process: what the array workloads cost with no server at all.

The layout is aq-data's default (chunks of about 1 MB, blosc zstd 3 with shuffle, crc32c). zarr-python never calls
fsync, so its W2 is a floor nobody who promises durability can reach.
"""

import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

from benchmarks.peer import ArrayHandle, Options, Peer

__all__ = ["ZarrFloor", "connect"]

CHUNKS = (80, 80, 20)
"""1.02 MB of float64."""


class ZarrFloor:
    """A file is a group in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save_file(self, name: str, arrays: dict[str, NDArray[np.float64]], metadata: dict[str, Any]) -> str:
        key = f"{name}-{uuid.uuid4()}"
        group = zarr.create_group(self._folder / key, attributes=metadata)
        for array_name, data in arrays.items():
            array = group.create_array(
                array_name,
                shape=data.shape,
                dtype=data.dtype,
                chunks=tuple(min(length, chunk) for length, chunk in zip(data.shape, CHUNKS, strict=False)),
                compressors=[BloscCodec(cname="zstd", clevel=3, shuffle=BloscShuffle.shuffle), Crc32cCodec()],
            )
            array[...] = data
        return key

    def save_array(self, name: str, data: NDArray[np.float64]) -> str:
        return f"{self.save_file(name, {'data': data}, {})}/data"

    def open_array(self, path: str) -> ArrayHandle:
        handle: Any = zarr.open_array(self._folder / path, mode="r")
        floor: ArrayHandle = handle
        return floor

    def discard_array(self, path: str) -> None:
        shutil.rmtree(self._folder / path.partition("/")[0])


def connect(options: Options) -> Peer:
    """`options`: `url`, a folder."""
    return ZarrFloor(Path(options["url"]))
