"""A DataFile as a client sees it, and lists of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from aq_data.client.arrays import RemoteArray
from aq_data.client.connections import Source
from aq_data.client.html import datafile_html, hits_html
from aq_data.client.http import Body, Http
from aq_data.client.outgoing import outgoing_files
from aq_data.client.progress import progress
from aq_data.errors import ConflictError, CorruptionError, NotFoundError, UnavailableError
from aq_data.models.paths import path_segments
from aq_data.models.values import from_tagged
from aq_data.wire.routes import datafile_path, file_path

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import xarray as xr

__all__ = ["DataFile", "Hits"]

LOAD_TRIES = 8


class DataFile:
    """One saved DataFile: its document as of when it was fetched, its arrays on demand.

    Typed fields are attributes (`file.name`, `file.tags`, `file.instruments`); `file.document` is everything.
    """

    def __init__(self, http: Http, document: dict[str, Any], source: Source) -> None:
        self._http, self._document, self._source = http, document, source

    @property
    def id(self) -> str:
        return str(self._document["id"])

    @property
    def revision(self) -> int:
        """Counts changes to the document, from 1."""
        return int(self._document["revision"])

    @property
    def document(self) -> dict[str, Any]:
        """The whole document as Python objects (dates, complex numbers, NaN…); a copy."""
        return dict(from_tagged(self._document))

    def to_json(self) -> dict[str, Any]:
        """The whole document as the server gave it: JSON, with what JSON lacks tagged."""
        return self._document

    @property
    def metadata(self) -> dict[str, Any]:
        """The free metadata as Python objects; a copy. Change it with `update`."""
        return dict(from_tagged(self._document.get("metadata", {})))

    @property
    def path(self) -> str:
        """Where `arrays.zarr` lies on the server's side: `xarray.open_zarr(file.path)` needs no aq-data.

        Empty while a sweep is open: then only the server can put its values together.
        """
        return str(self._document.get("path", ""))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._document:
            return from_tagged(self._document[name])
        raise AttributeError(f"a DataFile has no {name!r}; free metadata is in `.metadata`")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self._document})

    # --- arrays ----------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> RemoteArray:
        for info in self._document["arrays"]:
            if info["name"] == name:
                return RemoteArray(self._http, self.id, info)
        raise NotFoundError(f"DataFile {self.id} has no array {name!r}; it has {', '.join(self) or 'none'}")

    def __iter__(self) -> Iterator[str]:
        return iter([str(info["name"]) for info in self._document["arrays"]])

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __len__(self) -> int:
        return len(self._document["arrays"])

    def __bool__(self) -> bool:
        return True

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def open(self, chunks: Any = None, *, live: bool = False) -> xr.Dataset:
        """A lazy dataset: `isel` and `sel` fetch what they need. `chunks={}` gives dask arrays along stored chunks.

        Of an open sweep it has the extents of when the document was fetched; `live` fetches it anew first.
        """
        if live:
            self.refresh()
        import xarray as xr

        from aq_data.client.xarray import AqDataEntrypoint, dataset_of

        if chunks is None:
            return dataset_of(self._document, self._source)
        return xr.open_dataset(
            self._source.address(self.id),
            engine=AqDataEntrypoint,
            chunks=chunks,
            backend_kwargs={"source": self._source, "document": self._document},
        )

    def written(self, name: str, selection: str = "") -> np.ndarray[Any, Any]:
        """Which elements of an array were measured, as booleans: not measured yet is no NaN. `selection` as in `select`."""
        return self[name].written(selection)

    def load(self) -> xr.Dataset:
        """The whole dataset in memory, equal to the one that was saved.

        Of an open sweep it is that of one moment, now: no variable has a block that another lacks. UnavailableError when it
        grows faster than it can be read whole.
        """
        for _ in range(LOAD_TRIES):
            if self._document.get("state") != "open":
                return self.open().load()
            from aq_data.client.xarray import dataset_of

            self.refresh()
            head = self._document["sweep"].get("head", 0)
            try:
                return dataset_of(self._document, self._source, head=head).load()
            except ConflictError:
                continue  # folded meanwhile: that moment is gone
        raise UnavailableError(f"DataFile {self.id} grows faster than it can be read whole; read slices, or try again")

    # --- changes ---------------------------------------------------------------------------------------------------

    def refresh(self) -> DataFile:
        """Fetch the document anew, and with it how far an open sweep has grown; self."""
        self._document = self._http.json("GET", datafile_path(self.id))
        return self

    def __repr__(self) -> str:
        arrays = "".join(f"\n  {self[name]!r}" for name in self)
        return f"<DataFile {self.id} {self._document.get('name', '')!r} {self._document.get('state')}{arrays}>"

    def _repr_html_(self) -> str:
        return datafile_html(self._document)

    # --- files -----------------------------------------------------------------------------------------------------

    @property
    def files(self) -> list[str]:
        """Names of the attached files."""
        return [str(info["name"]) for info in self._document.get("files", [])]

    def read_file(self, name: str) -> bytes:
        """The content of an attached file, in memory."""
        content = self._http.request("GET", file_path(self.id, name)).content
        self._check_content(self._file_info(name), hashlib.sha256(content).hexdigest())
        return content

    def _file_info(self, name: str) -> dict[str, Any]:
        for info in self._document.get("files", []):
            if info["name"] == name:
                return dict(info)
        raise NotFoundError(f"DataFile {self.id} has no file {name!r}; it has {', '.join(self.files) or 'none'}")

    def _check_content(self, info: dict[str, Any], sha256: str) -> None:
        if sha256 != info["sha256"]:
            raise CorruptionError(f"file {info['name']!r} of DataFile {self.id} does not match its SHA-256")

    def download(self, name: str, to: str | Path = ".") -> Path:
        """Write an attached file into a folder, or under a new name; the path. Nothing stands there before it is whole."""
        info, digest = self._file_info(name), hashlib.sha256()
        target = Path(to) / Path(name).name if Path(to).is_dir() else Path(to)
        partial = target.with_name(target.name + ".part")
        try:
            with (
                self._http.stream("GET", file_path(self.id, name)) as response,
                partial.open("wb") as file,
                progress(info["size"], f"reading {name}") as advance,
            ):
                for piece in response.iter_raw():
                    file.write(piece)
                    digest.update(piece)
                    advance(len(piece))
            self._check_content(info, digest.hexdigest())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def attach(self, file: str | Path) -> None:
        """Attach one more file from disk. The same content again is harmless, other content under its name is refused."""
        outgoing = outgoing_files([file])[0]
        body = Body(outgoing.pieces, outgoing.size, outgoing.content_type)
        self._http.request("PUT", file_path(self.id, outgoing.name), body)
        self.refresh()


class Hits(Sequence[DataFile]):
    """What a search found: a sequence of DataFiles, in order. `total` counts all matches, exactly if `total_is_exact`."""

    def __init__(
        self, files: list[DataFile], total: int, total_is_exact: bool, cursor: str | None, documents: list[dict[str, Any]]
    ) -> None:
        self._files, self._documents = files, documents
        self.total, self.total_is_exact, self.cursor = total, total_is_exact, cursor

    @overload
    def __getitem__(self, index: int) -> DataFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[DataFile]: ...
    def __getitem__(self, index: int | slice) -> DataFile | list[DataFile]:
        return self._files[index]

    def __len__(self) -> int:
        return len(self._files)

    def table(self, columns: Sequence[str]) -> pd.DataFrame:
        """A pandas DataFrame with one row per hit and one column per dotted path; None where a document has no value."""
        import pandas as pd

        rows = [[_at(document, column) for column in columns] for document in self._documents]
        return pd.DataFrame(rows, columns=list(columns), index=pd.Index([file.id for file in self._files], name="id"))

    def __repr__(self) -> str:
        more = "" if self.total_is_exact else "+"
        lines = "".join(f"\n  {file.id}  {file.name}" for file in self._files[:10])
        return f"<{len(self)} of {self.total}{more} DataFiles{lines}{'…' if len(self) > 10 else ''}>"

    def _repr_html_(self) -> str:
        return hits_html(self._documents, self.total, self.total_is_exact)


def _at(document: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, looked up as a filter does: among the typed fields first, then in the metadata."""
    segments = path_segments(path)
    if segments[0] not in document:
        segments = ["metadata", *segments]
    value: Any = document
    for segment in segments:
        if not isinstance(value, Mapping) or segment not in value:
            return None
        value = value[segment]
    return from_tagged(value)
