"""A DataFile as a client sees it, and lists of them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, overload

import msgspec

from aq_data.client.arrays import MOMENTS, RemoteArray
from aq_data.client.connections import Source
from aq_data.client.html import datafile_html, hits_html
from aq_data.client.http import Body, Http
from aq_data.client.outgoing import outgoing_files
from aq_data.client.progress import progress
from aq_data.client.tables import table_of, table_pieces
from aq_data.errors import ConflictError, CorruptionError, NotFoundError, UnavailableError
from aq_data.models.query import looked_for, parse_filter
from aq_data.models.structs import resolve
from aq_data.models.values import from_tagged
from aq_data.models.words import highlights
from aq_data.wire.codec import CSV, NDJSON
from aq_data.wire.routes import SEARCH, datafile_path, file_path

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import xarray as xr

__all__ = ["DataFile", "Highlight", "Hits"]

PAGE = 1000
"""Documents the server gives at once."""


class DataFile:
    """One saved DataFile: its document as of when it was fetched, its arrays on demand.

    Typed fields are attributes (`file.name`, `file.tags`, `file.instruments`); `file.document` is everything.
    """

    def __init__(self, http: Http, document: dict[str, Any] | msgspec.Raw, source: Source) -> None:
        """A document that is still JSON is decoded when it is first looked at: of a long list few are."""
        self._http, self._source = http, source
        self._held = document

    @property
    def _document(self) -> dict[str, Any]:
        if isinstance(self._held, msgspec.Raw):
            self._held = msgspec.json.decode(self._held, type=dict[str, Any])
        return self._held

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

        As of when this was fetched: a store may be moved.

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
        for _ in range(MOMENTS):
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
        self._held = self._http.json("GET", datafile_path(self.id))
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
        # Made for this alone: whatever else lies beside the target stays what it is.
        partial = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with (
                self._http.stream("GET", file_path(self.id, name)) as response,
                partial.open("xb") as file,
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


class Highlight(NamedTuple):
    """A place where words were found: `text` around it, with their half-open [start, stop) positions in it."""

    path: str
    text: str
    spans: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        """`comment: T1 vs [flux]`."""
        parts, last = [], 0
        for start, stop in self.spans:
            parts += [self.text[last:start], "[", self.text[start:stop], "]"]
            last = stop
        return f"{self.path}: {''.join(parts)}{self.text[last:]}"


class _Page(msgspec.Struct):
    """A page as it comes."""

    items: list[msgspec.Raw]
    total: int
    total_is_exact: bool
    cursor: str | None


class Hits(Sequence[DataFile]):
    """What a search found: a sequence of DataFiles, in order. `total` counts all matches, exactly if `total_is_exact`.

    Of more than 1000 the rest is fetched when it is looked at.
    """

    def __init__(
        self, http: Http, source: Source, question: Mapping[str, Any], limit: int | None, table_limit: int | None
    ) -> None:
        """Asks for the first page: up to `limit` hits from after `question["cursor"]`, None for all of them."""
        self._http, self._source, self._limit = http, source, limit
        self._table = {**question, "limit": table_limit}
        self._question = dict(question)
        self._files: list[DataFile] = []
        self._highlights: list[list[Highlight]] = []
        page = self._fetch()
        self.total, self.total_is_exact = page.total, page.total_is_exact

    def _fetch(self) -> _Page:
        wanted = PAGE if self._limit is None else min(PAGE, self._limit - len(self._files))
        page: _Page = self._http.json("POST", SEARCH, {**self._question, "limit": wanted}, type=_Page)
        self._files += [DataFile(self._http, document, self._source) for document in page.items]
        self._question["cursor"] = page.cursor
        return page

    @property
    def _is_whole(self) -> bool:
        return self._question["cursor"] is None or (self._limit is not None and len(self._files) >= self._limit)

    def _all(self) -> list[DataFile]:
        while not self._is_whole:
            self._fetch()
        return self._files

    @property
    def highlights(self) -> list[list[Highlight]]:
        """For each hit where its words stand, at most five places; empty lists where no words were looked for."""
        files = self._all()
        words = looked_for(parse_filter(self._question["filter"], self._question["text"]))
        for file in files[len(self._highlights) :] if words else ():
            shown = highlights(file.to_json(), words)
            self._highlights.append([Highlight(one["path"], one["text"], tuple(map(tuple, one["spans"]))) for one in shown])
        return self._highlights if words else [[] for _ in files]

    @property
    def cursor(self) -> str | None:
        """Where the next hits begin, for a search that goes on from here; None when these are the last."""
        self._all()
        return cast("str | None", self._question["cursor"])

    @overload
    def __getitem__(self, index: int) -> DataFile: ...
    @overload
    def __getitem__(self, index: slice) -> list[DataFile]: ...
    def __getitem__(self, index: int | slice) -> DataFile | list[DataFile]:
        if isinstance(index, int) and index >= 0:
            while index >= len(self._files) and not self._is_whole:
                self._fetch()
            return self._files[index]
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def table(self, columns: Sequence[str]) -> pd.DataFrame:
        """A pandas DataFrame with one row per match and one column per dotted path, indexed by id, in one request.

        It has every match, not only the hits of this page, unless the search had a `limit`; it is asked for anew, so that
        what was saved since is there, too. Numbers, booleans and text have pandas' own dtypes, instants are Timestamps;
        nested values and columns of several kinds are Python objects. What a document lacks is missing as pandas has it:
        NaN among numbers and text, NaT among instants, None among booleans and objects. A path through a list of objects
        gives lists.
        """
        return table_of(self._http, self._table, columns)

    def lines(self, columns: Sequence[str], format: Literal["csv", "ndjson"] = "csv") -> Generator[bytes, None, None]:
        """The same table as the server streams it, in pieces: CSV with a header, or one JSON object per line.

        Whoever may stop before the end closes it (`contextlib.closing`), which ends it on the server too. Text stands in
        the CSV as it is: a spreadsheet may run one that begins with `=`.
        """
        return table_pieces(self._http, self._table, columns, CSV if format == "csv" else NDJSON)

    def __repr__(self) -> str:
        more = "" if self.total_is_exact else "+"
        lines = "".join(f"\n  {file.id}  {file.name}" for file in self._files[:10])
        return f"<{len(self._files)} of {self.total}{more} DataFiles{lines}{'…' if len(self._files) > 10 else ''}>"

    def _repr_html_(self) -> str:
        return hits_html([file.to_json() for file in self._files], self.total, self.total_is_exact)


resolve(_Page)
