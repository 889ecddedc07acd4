"""DataFiles as lazy xarray datasets: `file.open()` and `xarray.open_dataset(url, engine="aq-data")`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray, BackendEntrypoint
from xarray.core import indexing

from aq_data.client.arrays import read_selection
from aq_data.client.connections import Source
from aq_data.errors import ValidationError
from aq_data.models.arrays import parse_dtype
from aq_data.models.selection import select
from aq_data.models.values import from_tagged
from aq_data.wire.routes import datafile_path

__all__ = ["AqDataEntrypoint", "LazyArray", "dataset_of"]

_URL = re.compile(r"(?:aq-data\+)?(?P<server>https?://[^/]+)/api/v1/datafiles/(?P<id>[0-9a-fA-F-]{36})/?")


class LazyArray(BackendArray):
    """One stored array that xarray indexes: each access is one request for just that part. Pickles to other processes."""

    def __init__(
        self, source: Source, id: str, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], head: int | None = None
    ) -> None:
        self._source, self._id, self._name, self._head = source, id, name, head
        self.dtype, self.shape = dtype, shape

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        # OUTER is what the selection language does: integers, slices and one list per axis, each axis in turn.
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple[Any, ...]) -> np.ndarray[Any, Any]:
        selection = select(key, self.shape, self._name)
        return read_selection(self._source.http(), self._id, self._name, self.dtype, selection, self._head)


def dataset_of(
    document: dict[str, Any], source: Source, drop_variables: Iterable[str] | None = None, head: int | None = None
) -> xr.Dataset:
    """A dataset whose values are read when they are used; index coordinates are read now, as xarray's indexes need them.

    With `head` all of an open sweep is read as of that block, while that is possible.
    """
    dropped = set(drop_variables or ())
    variables: dict[str, xr.Variable] = {}
    coordinates: list[str] = []
    for info in document["arrays"]:
        name = info["name"]
        if name in dropped:
            continue
        shape, dims = tuple(info["shape"]), tuple(info["dims"])
        lazy = LazyArray(source, document["id"], name, parse_dtype(info["dtype"], name), shape, head)
        encoding = {
            "chunks": tuple(info["chunks"]),
            "preferred_chunks": dict(zip(dims, info["chunks"], strict=True)),
        }
        attrs = from_tagged(info.get("attrs", {}))
        variables[name] = xr.Variable(dims, indexing.LazilyIndexedArray(lazy), attrs, encoding)
        if info.get("role") == "coordinate":
            coordinates.append(name)
    dataset = xr.Dataset(variables, attrs=from_tagged(document.get("attrs", {})))
    dataset = dataset.set_coords(coordinates)
    dataset.encoding["source"] = source.address(document["id"])
    return dataset


class AqDataEntrypoint(BackendEntrypoint):
    """`xarray.open_dataset("http://host:5000/api/v1/datafiles/<id>", engine="aq-data")`."""

    description = "DataFiles of an aq-data server, read lazily"
    open_dataset_parameters = ("filename_or_obj", "drop_variables", "token", "source", "document")

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        token: str | None = None,
        source: Source | None = None,
        document: dict[str, Any] | None = None,
    ) -> xr.Dataset:
        """Open one DataFile. The token is `token`, else the environment variable AQ_DATA_TOKEN.

        `source` and `document` are what `DataFile.open` already knows.
        """
        if isinstance(drop_variables, str):
            drop_variables = [drop_variables]
        if source is None:
            match = _URL.fullmatch(str(filename_or_obj))
            if match is None:
                raise ValidationError(
                    f"{filename_or_obj!r} is not the address of a DataFile; it looks like http://host:5000/api/v1/datafiles/<id>"
                )
            source = Source(match["server"], token or os.environ.get("AQ_DATA_TOKEN"))
            document = source.http().json("GET", datafile_path(match["id"].lower()))
        assert document is not None
        return dataset_of(document, source, drop_variables)

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """True for our own addresses only: xarray asks every engine about every address."""
        return isinstance(filename_or_obj, (str, os.PathLike)) and bool(_URL.fullmatch(str(filename_or_obj)))
