"""Use cases of many DataFiles at once: each item fares as it would alone, and is told so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from aq_data.errors import AqDataError
from aq_data.models.columns import field_segments, projected
from aq_data.models.datafile import DataFile, NewDataFile
from aq_data.models.difference import json_of
from aq_data.models.structs import resolve
from aq_server.service.datafiles import DataFiles
from aq_server.service.growing import Growing
from aq_server.service.saving import now

__all__ = ["Bulk", "Outcome", "Patch", "Removal"]

T = TypeVar("T")

SAVED_TOGETHER = 32
"""New documents worked on at once: as many share one commit of the database and of the disk's journal."""
HELD_TOGETHER = 8
"""The same of documents that are there already: each may be of many MB, however short the request."""


class Patch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A merge patch for one DataFile; with `revision` for that revision only."""

    id: str
    patch: dict[str, Any]
    revision: int | None = None


class Removal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A DataFile to delete; with `revision` only if that is the current one."""

    id: str
    revision: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item: a document (None when it was deleted; its parts where parts were asked for), or an error."""

    document: DataFile | dict[str, Any] | None = None
    is_new: bool = False
    error: Exception | None = None


class Bulk:
    """Results come in the order of the items, some at a time; an item may be the error met when it was read.

    Items that name one id are worked on one after the other. Not atomic: what was done when the caller goes away is done.
    """

    def __init__(self, datafiles: DataFiles, growing: Growing) -> None:
        self._datafiles, self._growing = datafiles, growing

    def save(self, items: Iterable[NewDataFile | AqDataError], user: str | None) -> AsyncIterator[list[Outcome]]:
        """Save documents without values of arrays; as with a single save, a repeat with the same ids is harmless."""

        async def save(new: NewDataFile) -> Outcome:
            at = now()  # taken in the order of the items, whatever each then waits for
            attempt = await self._datafiles.begin_save(new, user)
            try:
                document, is_new = await attempt.commit(at)
                return Outcome(await self._growing.present(document), is_new)
            except BaseException:
                await attempt.discard()
                raise

        return _outcomes(items, SAVED_TOGETHER, lambda new: new.id, save)

    def get(self, ids: Iterable[str], fields: list[str] | None) -> AsyncIterator[list[Outcome]]:
        """Documents, or what stands in them at `fields`. QueryError for a field that is no path."""
        paths = None if fields is None else [field_segments(field) for field in fields]

        async def get(id: str) -> Outcome:
            document = await self._growing.present((await self._datafiles.get(id)).document)
            return Outcome(document if paths is None else projected(json_of(document), paths))

        return _outcomes(ids, HELD_TOGETHER, lambda _: None, get)

    def patch(self, items: Iterable[Patch | AqDataError], user: str | None) -> AsyncIterator[list[Outcome]]:
        """Merge patches, as `DataFiles.patch` does."""

        async def patch(item: Patch) -> Outcome:
            changed = await self._datafiles.patch(item.id.lower(), item.patch, item.revision, user)
            return Outcome(await self._growing.present(changed))

        return _outcomes(items, HELD_TOGETHER, lambda item: item.id, patch)

    def delete(self, items: Iterable[Removal | AqDataError], user: str | None) -> AsyncIterator[list[Outcome]]:
        """Turn DataFiles into tombstones."""

        async def delete(item: Removal) -> Outcome:
            await self._datafiles.delete(item.id.lower(), item.revision, user)
            return Outcome()

        return _outcomes(items, HELD_TOGETHER, lambda item: item.id, delete)


async def _outcomes(
    items: Iterable[T | AqDataError], width: int, id_of: Callable[[T], str | None], act: Callable[[T], Awaitable[Outcome]]
) -> AsyncIterator[list[Outcome]]:
    async def attempt(item: T | AqDataError) -> Outcome:
        if isinstance(item, AqDataError):
            return Outcome(error=item)
        try:
            return await act(item)
        except Exception as exc:  # noqa: BLE001  (told to whoever sent this item; the others go on)
            return Outcome(error=exc)

    for together in _windows(items, width, id_of):
        yield list(await asyncio.gather(*map(attempt, together)))


def _windows(
    items: Iterable[T | AqDataError], width: int, id_of: Callable[[T], str | None]
) -> Iterator[list[T | AqDataError]]:
    """The items in turn, up to `width` at a time, none of which names the id of another."""
    window: list[T | AqDataError] = []
    ids: set[str] = set()
    for item in items:
        id = None if isinstance(item, AqDataError) else (id_of(item) or "").lower()
        if len(window) == width or id in ids:
            yield window
            window, ids = [], set()
        window.append(item)
        if id:
            ids.add(id)
    if window:
        yield window


resolve(Patch, Removal)
