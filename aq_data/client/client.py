"""The client: what a script or a notebook does with a server, or with a folder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from aq_data.client.bulk import Result, delete_many, get_many, save_many, update_many
from aq_data.client.comparing import Comparison, Differences, History
from aq_data.client.connections import Source, release
from aq_data.client.counting import Values
from aq_data.client.datafile import DataFile, Hits
from aq_data.client.declaring import declare_sweep
from aq_data.client.http import TRIES, Http, decoded
from aq_data.client.live import Delivered, Event, deliver_in_background, deliver_left_behind, follow
from aq_data.client.outgoing import outgoing_save, tagged_fields
from aq_data.client.spools import is_being_delivered, spool_root
from aq_data.client.sweeps import Sweep, new_spool, spool_opening
from aq_data.errors import ConflictError, NotFoundError, UnavailableError, ValidationError
from aq_data.models.datafile import TYPED_FIELDS, check_id, make_id
from aq_data.models.stores import StoreStatus
from aq_data.models.sweep import NewSweep, NewSweepArray, check_new_sweep
from aq_data.models.values import from_tagged, to_tagged
from aq_data.wire.routes import (
    COMPARE,
    COUNT,
    DATAFILES,
    DISTINCT,
    STORES,
    datafile_path,
    diff_path,
    revert_path,
    revisions_path,
    store_path,
    sweep_path,
)

__all__ = ["Client"]

DELIVERING_SECONDS = 60.0
"""`close` waits so long for what is being delivered; the rest stays in the spool."""
WAIT_SECONDS = 0.05
CHANGES = 1000
"""Changes the server lists at once."""
FIRST = 100
"""Hits of a search that was given no limit."""


class Client:
    """One server or one folder, the same calls for both. Usable from many threads; a context manager.

    Every error is one of `aq_data.errors`, the same class the server raised.
    """

    def __init__(self, http: Http, source: Source) -> None:
        self._http, self._source, self._is_open = http, source, True
        self._delivering: threading.Thread | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<aq_data.Client {self._source.target}>"

    def close(self) -> None:
        """Let go of connections; in the embedded mode finish writing and let go of the folder."""
        if self._is_open:
            self._is_open = False
            if self._delivering is not None:
                self._delivering.join(DELIVERING_SECONDS)
            release(self._http)

    def save(
        self,
        dataset: Any = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        files: Mapping[str, Any] | Sequence[Any] | None = None,
        id: str | None = None,
        chunks: Mapping[str, Sequence[int]] | None = None,
        codec: str | None = None,
        store: str | None = None,
        **fields: Any,
    ) -> DataFile:
        """Save one DataFile: everything or nothing, on disk when this returns.

        `dataset`: an `xarray.Dataset`, a dict of arrays (or of `(dims, array[, attrs])`), or None. `metadata`: free JSON,
        as searchable as the typed fields (`name`, `station`, `tags`, `instruments`, …), which are keywords. `files`:
        paths, or a dict of name to path or bytes. `id`: a UUIDv7 to make a repeat by another process harmless. `chunks`
        (array name to chunk shape) and `codec` ("zstd", "lz4", "none") override the stored layout. `store`: the name of one
        of the server's stores, else its default for the kind.

        Raises ValidationError, before anything is stored, naming what cannot be kept.
        """
        outgoing = outgoing_save(
            dataset, metadata=metadata, files=files, id=id, chunks=chunks, codec=codec, store=store, **fields
        )
        return self._file(decoded(self._http.request("POST", DATAFILES, outgoing.body())))

    def save_many(self, items: Iterable[Mapping[str, Any]]) -> list[Result]:
        """Save many DataFiles, each given as the keywords of `save`; one result per item, in order.

            for result in client.save_many([{"name": "T1", "metadata": {"chip": "C7"}}, …]):
                print(result.id, result.error or "saved")

        Items without arrays and files travel together and cost a fraction of a `save`. One that fails hinders no other. When
        the server goes away, what was not yet sent has that error, too; to try again save under the `id` of the result.
        """
        return save_many(self._http, self._file, items)

    def sweep(
        self,
        name: str = "",
        *,
        dims: Mapping[str, Any],
        variables: Mapping[str, Any],
        metadata: Mapping[str, Any] | None = None,
        attrs: Mapping[str, Any] | None = None,
        planned: Mapping[str, int] | None = None,
        notify: Sequence[str] = (),
        id: str | None = None,
        chunks: Mapping[str, Sequence[int]] | None = None,
        codec: str | None = None,
        store: str | None = None,
        spool: str | os.PathLike[str] | None = None,
        **fields: Any,
    ) -> Sweep:
        """Open a DataFile that grows while it is measured; a context manager that finishes it.

        `dims`: each dim with the values of its coordinate (or `(values, attrs)`), a length, or None where it grows; the
        coordinate of a growing dim is written like any variable (float64 unless `variables` declares it). `variables`:
        name to `(dtype, dims[, attrs])`. `planned`: expected lengths of growing dims. `notify`: webhook addresses of the
        server's list to tell of the end. `metadata`, `chunks`, `codec`, `store` and the typed fields are as in `save`.
        `spool`: the folder that keeps what has not arrived (default AQ_DATA_SPOOL, else ~/.aq_data/spool).

        What the server refuses is raised; when it is away the sweep begins in the spool. ValidationError for what cannot be.
        """
        for field in fields:
            if field not in TYPED_FIELDS:
                raise ValidationError(f"there is no field {field!r}; free settings go into metadata={{{field!r}: …}}")
        arrays, given = declare_sweep(dims, variables, chunks, codec)
        document = {
            **tagged_fields(fields),
            "id": check_id(id) if id is not None else make_id(time.time_ns() // 1_000_000, os.urandom(10)),
            "name": name,
            "metadata": to_tagged(dict(metadata or {})),
            "attrs": to_tagged(dict(attrs or {}), "attrs", keep_arrays=True),
            "planned": dict(planned or {}),
            "notify": tuple(notify),
            **({} if store is None else {"store": store}),
        }
        try:
            new = msgspec.structs.replace(msgspec.convert(document, NewSweep), arrays=tuple(arrays))
        except msgspec.ValidationError as exc:
            raise ValidationError(f"the sweep's fields do not fit: {exc}") from exc
        check_new_sweep(new)
        own = new_spool(Path(spool) if spool is not None else spool_root(), self._source.target, document["id"], name)
        try:
            spool_opening(own, new, given)
            sweep = Sweep(self._http, own, new.arrays)
            sweep.begin()
        except BaseException:
            own.remove()
            raise
        return sweep

    def resume_sweep(self, id: str, *, shared: bool = False, spool: str | os.PathLike[str] | None = None) -> Sweep:
        """Go on with an open sweep: after a crash or a stop, or (`shared`) as one of several writers.

        Leaving the `with` block of a shared one leaves the sweep open: exactly one writer ends it, after the others left.
        What an earlier process of this computer left in the spool is delivered first. ConflictError when it has ended.
        """
        root = Path(spool) if spool is not None else spool_root()
        id = check_id(id)
        # Whoever delivers what came before must be through with it: the later in the order wins.
        if self._delivering is not None:
            self._delivering.join()
        while is_being_delivered(root, id):
            time.sleep(WAIT_SECONDS)
        for outcome in deliver_left_behind(self._http, self._source.target, root, id):
            if outcome.error is not None:
                raise outcome.error
        status = self._http.json("GET", sweep_path(id))
        if status["state"] != "open":
            raise ConflictError(f"the sweep {id} is {status['state']}; open a new one", code="finished")
        arrays = msgspec.convert(status["arrays"], tuple[NewSweepArray, ...])
        own = new_spool(root, self._source.target, status["id"], status["name"])
        sweep = Sweep(self._http, own, arrays, shared=shared)
        sweep.begin()
        return sweep

    def stores(self) -> list[StoreStatus]:
        """The places in which the server keeps arrays and files, with their state and use."""
        return [msgspec.convert(item, StoreStatus) for item in self._http.json("GET", STORES)["items"]]

    def add_store(self, name: str, root: str) -> StoreStatus:
        """Add a store, or give one in which nothing lies another root; needs the scope admin.

        `root` is a folder of the server's, `gs://bucket/prefix` or `s3://bucket/prefix`. ForbiddenError unless the server's
        `store_roots` allow it; ConflictError (`in_use`) when something stands against it.
        """
        return msgspec.convert(self._http.json("PUT", store_path(name), {"root": root}), StoreStatus)

    def remove_store(self, name: str) -> None:
        """Take away a store in which nothing lies, else ConflictError (`in_use`); needs the scope admin."""
        self._http.json("DELETE", store_path(name), repeatable=False)

    def deliver_in_background(self) -> None:
        """Begin to deliver what processes of this computer that are gone left in the spool for this target."""
        self._delivering = deliver_in_background(self._http, self._source.target, spool_root())

    def deliver(self, sweep: str | None = None) -> list[Delivered]:
        """Deliver what processes of this computer that are gone left in the spool for this target; what became of each.

        With `sweep` only what they left of the sweep of that id.
        """
        if self._delivering is not None:
            self._delivering.join()
        return deliver_left_behind(self._http, self._source.target, spool_root(), None if sweep is None else check_id(sweep))

    def follow(self, id: str, after: str = "") -> Iterator[Event]:
        """What happens to a DataFile, as it happens: `for event in client.follow(id)`; ends when the sweep does.

        From the beginning, or behind the `event.id` given as `after`: each event once, also across lost connections and
        restarted servers. NotFoundError when there is no such DataFile, or it is deleted meanwhile.
        """
        return follow(self._http, check_id(id), after, time.sleep)

    def get(self, id: str, include_deleted: bool = False, revision: int | None = None) -> DataFile:
        """The DataFile of an id; NotFoundError when there is none, or (code `deleted`) only a tombstone.

        With `revision` its document as it was then; arrays are what they are.
        """
        wanted = {"include_deleted": "true" if include_deleted else None, "revision": revision}
        query = "&".join(f"{name}={value}" for name, value in wanted.items() if value is not None)
        return self._file(self._http.json("GET", datafile_path(id) + (f"?{query}" if query else "")))

    def diff(self, a: str, b: str) -> Differences:
        """Which settings and fields differ between two DataFiles, by id; what the server sets is left out."""
        return Differences(self._http.json("GET", diff_path(a, b)))

    def compare(self, ids: Iterable[str]) -> Comparison:
        """Which settings and fields vary among up to 1000 DataFiles, and their values in each; `.table()` for pandas."""
        return Comparison(self._http.json("POST", COMPARE, {"ids": list(ids)}))

    def history(self, id: str, limit: int | None = 100) -> History:
        """The changes of a DataFile, also of one that was deleted: who, when, what; newest first. `limit` None for all."""
        changes: list[dict[str, Any]] = []
        before = ""
        while True:
            wanted = CHANGES if limit is None else min(CHANGES, limit - len(changes))
            page = self._http.json("GET", f"{revisions_path(id)}?limit={wanted}{before}")
            changes += page["items"]
            if page["next"] is None or (limit is not None and len(changes) >= limit):
                return History(id, changes)
            before = f"&before={page['next']}"

    def revert(self, id: str, revision: int) -> DataFile:
        """Give it the typed fields and metadata of an old revision, as a new one. Arrays, files and state stay."""
        return self._file(self._http.json("POST", revert_path(id), {"revision": revision}))

    def get_many(self, ids: Iterable[str]) -> list[Result]:
        """The DataFiles of many ids, each with `file` or `error`, in order."""
        return get_many(self._http, self._file, ids)

    def update(self, id: str, patch: Mapping[str, Any], revision: int | None = None) -> DataFile:
        """Merge `patch` into the document: typed fields and `metadata`, None deletes a key, lists are replaced whole.

        With `revision` the change is made to that revision only; StaleRevisionError when there is a newer one.
        """
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        return self._file(
            self._http.json("PATCH", datafile_path(id), tagged_fields(patch), headers, repeatable=revision is None)
        )

    def update_many(self, items: Iterable[Mapping[str, Any]]) -> list[Result]:
        """Many updates, each given as the arguments of `update` (`id`, `patch` and, where it counts, `revision`), in order.

            client.update_many([{"id": file.id, "patch": {"flag": "red"}} for file in hits])

        Items of one id are done one after the other.
        """
        return update_many(self._http, self._file, items)

    def delete(self, id: str, revision: int | None = None) -> None:
        """Turn the DataFile into a tombstone. Its bytes stay until `aq-data gc --delete`."""
        headers = {} if revision is None else {"If-Match": f'"{revision}"'}
        for attempt in range(TRIES):
            try:
                self._http.json("DELETE", datafile_path(id), headers=headers, repeatable=False)
                return
            except NotFoundError as exc:
                if attempt and exc.code == "deleted":
                    return  # by the try before, whose answer was lost
                raise
            except UnavailableError:
                if revision is not None or attempt + 1 == TRIES:
                    raise

    def delete_many(self, ids: Iterable[str]) -> list[Result]:
        """Turn many DataFiles into tombstones; each result has the `error`, if there was one, and no `file`."""
        return delete_many(self._http, self._file, ids)

    def search(
        self,
        filter: Mapping[str, Any] | None = None,
        *,
        text: str | None = None,
        sort: str = "-created_at",
        limit: int | msgspec.UnsetType | None = msgspec.UNSET,
        cursor: str | None = None,
        include_deleted: bool = False,
    ) -> Hits:
        """Find DataFiles by any setting: `{"chip": "C7", "measured_at": {"$gte": "2026-01-01"}}`.

        Keys are typed fields (`name`, `instruments.vna.settings.power.value`) or else free metadata. `text` are words that
        all have to be found, in any order, each the beginning of a word in names, comments, tags, settings and other texts.
        `sort` is a path, with `-` before it for descending. Without a `limit` there are up to 100 hits, with None all;
        `Hits.table` has every match unless there is a limit. QueryError names what cannot be understood.
        """
        question = {
            "filter": to_tagged(dict(filter or {}), "filter"),
            "text": text,
            "sort": sort,
            "cursor": cursor,
            "include_deleted": include_deleted,
        }
        if isinstance(limit, msgspec.UnsetType):
            return Hits(self._http, self._source, question, FIRST, None)
        return Hits(self._http, self._source, question, limit, limit)

    def count(self, filter: Mapping[str, Any] | None = None, *, text: str | None = None) -> int:
        """How many DataFiles match, exactly."""
        question = {"filter": to_tagged(dict(filter or {}), "filter"), "text": text}
        return int(self._http.json("POST", COUNT, question)["count"])

    def distinct(
        self, field: str, filter: Mapping[str, Any] | None = None, limit: int = 100, *, text: str | None = None
    ) -> Values:
        """The values at a path and how many DataFiles have each, most frequent first: `client.distinct("station")`.

        As a dict, but for `True` and 1 being two. Texts count by their first 100 characters, which are what is given; NaN,
        complex numbers, None, bytes and dicts are left out.
        """
        question = {"field": field, "filter": to_tagged(dict(filter or {}), "filter"), "text": text, "limit": limit}
        found = self._http.json("POST", DISTINCT, question)["values"]
        return Values((from_tagged(entry["value"]), entry["count"]) for entry in found)

    def _file(self, document: dict[str, Any]) -> DataFile:
        return DataFile(self._http, document, self._source)
