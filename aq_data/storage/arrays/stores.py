"""The array stores of a server, by name: opened when first asked for, and closed together.

Those of the configuration never change while the server runs. Those that an admin added are asked for in the metadata store,
and remembered for `KNOWN_SECONDS`: that long a server may not know of a change, which is why whoever takes a root away waits
longer (service/stores.py).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from aq_data.errors import AqDataError, ConfigError, ForbiddenError, StorageError, UnavailableError, ValidationError
from aq_data.models.datafile import DataFile
from aq_data.models.placing import placed, placed_json
from aq_data.models.stores import DEFAULT_STORE, MEMORY, AddedStore, allowing, kind_of_root, normal_root
from aq_data.storage.arrays.blobs import BlobStore
from aq_data.storage.arrays.bucket import BucketOptions, open_bucket
from aq_data.storage.arrays.folder import FolderBlobs
from aq_data.storage.arrays.folding import Folder
from aq_data.storage.arrays.memory import MemoryBlobs
from aq_data.storage.arrays.store import ArrayStore

__all__ = ["ArrayStores", "Place", "StoreInfo", "Target", "open_blobs", "real_root"]

KNOWN_SECONDS = 1.0
OPEN_SECONDS = 10.0


NO_OPTIONS = BucketOptions()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a store lies (a root in its one form, models.stores) and how it is reached."""

    root: str
    options: BucketOptions = NO_OPTIONS

    def location(self, key: str) -> str:
        """As `BlobStore.location`, of a store that need not be opened."""
        return "" if self.root == MEMORY else f"{self.root}/{key}"


def open_blobs(place: Place) -> BlobStore:
    """The blob store at a place. A folder is made when it is absent; of a bucket nothing is asked yet."""
    if place.root == MEMORY:
        return MemoryBlobs()
    if kind_of_root(place.root) != "folder":
        return open_bucket(place.root, place.options)
    return FolderBlobs(Path(place.root))


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """A store this server knows of: by its configuration or added; `closing` as in `AddedStore`."""

    name: str
    place: Place
    origin: Literal["configured", "added"]
    closing: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """The store of a new DataFile."""

    name: str
    arrays: ArrayStore
    _confirm: Callable[[Target], Awaitable[None]]
    intended: str | None = None
    """The store that it belongs to, when this one stands in for it."""

    async def confirm(self) -> None:
        """To be called when the blobs are durable, before the DataFile is published: its store is there and takes it.

        UnavailableError when it was closed meanwhile. Whoever removes a store closes it first and then looks for blobs:
        either these are seen there, or it is seen closed here.
        """
        await self._confirm(self)


@dataclass(frozen=True, slots=True)
class _Opened:
    arrays: ArrayStore
    folder: Folder


async def _nothing_added() -> list[AddedStore]:
    return []


async def _nothing_lies(_: str) -> bool:
    return False


class ArrayStores:
    """Usable from any task of one event loop. What cannot be opened is UnavailableError naming it; the others work."""

    def __init__(
        self,
        configured: Mapping[str, Place],
        *,
        added: Callable[[], Awaitable[list[AddedStore]]] = _nothing_added,
        holds: Callable[[str], Awaitable[bool]] = _nothing_lies,
        roots: Mapping[str, BucketOptions] | None = None,
        default: str = DEFAULT_STORE,
        of_kind: Mapping[str, str] | None = None,
        fallbacks: Mapping[str, str] | None = None,
        scratch: Path | None = None,
        open: Callable[[Place], BlobStore] = open_blobs,
    ) -> None:
        """`added` gives the stores that an admin added, `holds` whether any DataFile lies in a store; `roots` says where
        they may lie (in the one form of allowances, models.stores) and how they are reached.

        New DataFiles without a word go to `of_kind[kind]`, else `default`. `fallbacks` names the store that stands in for
        another, both of the configuration, while that is marked as down. `scratch` is as in `ArrayStore`.
        """
        self._configured = {name: StoreInfo(name, place, "configured") for name, place in configured.items()}
        self._ask, self._holds, self._roots = added, holds, dict(roots or {})
        self.default, self._of_kind = default, dict(of_kind or {})
        self.fallbacks: Mapping[str, str] = dict(fallbacks or {})
        self._down: set[str] = set()
        self._scratch, self._open_blobs_at = scratch, open
        self._added: dict[str, StoreInfo] = {}
        self._asked = float("-inf")
        # By name too: memory is a place of its own for each.
        self._opened: dict[tuple[str, Place], _Opened] = {}
        self._opening: dict[tuple[str, Place], asyncio.Task[BlobStore]] = {}

    # --- which there are -------------------------------------------------------------------------------------------

    async def infos(self) -> list[StoreInfo]:
        """Every store, as of now; those of the configuration first."""
        await self._refresh()
        return [*self._configured.values(), *self._added.values()]

    async def names(self) -> list[str]:
        """The names of all, as of now."""
        return [info.name for info in await self.infos()]

    def known(self) -> list[str]:
        """The names of those this server has heard of."""
        return [*self._configured, *self._added]

    async def _refresh(self) -> None:
        asked = time.monotonic()
        found = {
            store.name: StoreInfo(store.name, self._place_of(store.root), "added", store.closing)
            for store in await self._ask()
            if store.name not in self._configured
        }
        if asked >= self._asked:  # else somebody who began to ask later was answered before
            self._added, self._asked = found, asked

    def _place_of(self, root: str) -> Place:
        entry = allowing(root, self._roots)
        return Place(root) if entry is None else Place(root, self._roots[entry])

    def _known(self, name: str) -> StoreInfo | None:
        if name in self._configured:
            return self._configured[name]
        return self._added.get(name) if time.monotonic() - self._asked < KNOWN_SECONDS else None

    async def _find(self, name: str) -> StoreInfo | None:
        info = self._known(name)
        if info is None:
            await self._refresh()
            info = self._added.get(name)
        return info

    # --- what is read there ----------------------------------------------------------------------------------------

    async def at(self, name: str) -> ArrayStore:
        """The store of that name. UnavailableError when this server does not know it (yet) or may not go there."""
        return (await self._found(name)).arrays

    async def folder(self, name: str) -> Folder:
        """What makes and reads the objects of sweeps in the store of that name; as `at`."""
        return (await self._found(name)).folder

    async def _found(self, name: str) -> _Opened:
        info = await self._find(name)
        if info is None:
            raise UnavailableError(f"the store {name!r} is not known to this server; its administrator has to add it")
        opened = self._opened.get((name, info.place))
        return opened if opened is not None else await self._opened_once(info)

    async def _opened_once(self, info: StoreInfo) -> _Opened:
        """One thread for all that wait: a folder of a network that hangs must not take the threads of the others."""
        key = (info.name, info.place)
        if key not in self._opening:
            self._opening[key] = asyncio.create_task(self._open_truly(info))
            self._opening[key].add_done_callback(lambda done: self._take(key, done))
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await asyncio.shield(self._opening[key])
        except TimeoutError as exc:
            raise UnavailableError(f"the store {info.name!r} does not answer") from exc
        return self._opened[key]

    async def _open_truly(self, info: StoreInfo) -> BlobStore:
        blobs = await asyncio.to_thread(self._open_blobs, info)
        if await blobs.is_bare() and await self._holds(info.name):
            await blobs.close()
            raise UnavailableError(
                f"the store {info.name!r} has DataFiles, and its folder {info.place.root} is empty: is its disk mounted?"
            )
        return blobs

    def _take(self, key: tuple[str, Place], done: asyncio.Task[BlobStore]) -> None:
        del self._opening[key]
        if not done.cancelled() and done.exception() is None:
            self._opened[key] = self._made(done.result())

    def _made(self, blobs: BlobStore) -> _Opened:
        return _Opened(ArrayStore(blobs, self._scratch), Folder(blobs))

    def open(self, name: str) -> ArrayStore:
        """As `at`, for one of the configuration, at the start: what is wrong with its root is then said at once."""
        place = self._configured[name].place
        if (name, place) not in self._opened:
            self._opened[name, place] = self._made(self._open_blobs_at(place))
        return self._opened[name, place].arrays

    def _open_blobs(self, info: StoreInfo) -> BlobStore:
        try:
            place = info.place if info.origin == "configured" else self.allowed(info.place.root)
            if place.root != info.place.root:
                raise ForbiddenError(f"{info.place.root} has become a link")
            return self._open_blobs_at(place)
        except AqDataError as exc:
            raise UnavailableError(f"the store {info.name!r} cannot be opened by this server: {exc}") from exc

    def allowed(self, root: str) -> Place:
        """The place of a root that an admin may add, links resolved. Blocks: a folder is looked at.

        ValidationError for what is no root, ForbiddenError for one that no entry of `store_roots` allows.
        """
        root, entries = normal_root(root), self._roots
        if root == MEMORY:
            raise ValidationError(f"{MEMORY} is forgotten with the process; only a configuration may name it")
        if kind_of_root(root) == "folder":
            root, entries = real_root(root), {_real_entry(entry): self._roots[entry] for entry in entries}
        entry = allowing(root, entries)
        if entry is None:
            raise ForbiddenError(f"{root} is not among the roots this server allows (`store_roots`)")
        return Place(root, entries[entry])

    async def probe(self, place: Place) -> None:
        """Return when a blob can be written there; ValidationError when none can, UnavailableError when none can now."""
        try:
            blobs = await asyncio.to_thread(self._open_blobs_at, place)
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    await blobs.check()
            finally:
                await blobs.close()
        except TimeoutError as exc:
            raise UnavailableError(f"{place.root} does not answer") from exc
        except (ConfigError, StorageError) as exc:
            raise ValidationError(f"nothing can be kept in {place.root}: {exc}") from exc

    # --- where new DataFiles go ------------------------------------------------------------------------------------

    def default_for(self, name: str) -> list[str]:
        """Of what a store is the default: of kinds, and `*` for all others."""
        return [kind for kind, store in sorted(self._of_kind.items()) if store == name] + ["*"] * (self.default == name)

    def mark(self, name: str, *, is_down: bool) -> None:
        """Say whether a store that has a fallback answers, as far as this server knows."""
        (self._down.add if is_down else self._down.discard)(name)

    def is_down(self, name: str) -> bool:
        """Whether it was marked so."""
        return name in self._down

    async def target(self, store: str | msgspec.UnsetType, kind: str, *, may_fall_back: bool = False) -> Target:
        """The store for a new DataFile. ValidationError, with the names there are, for one that takes none.

        Of a store that is marked as down it is the fallback with `may_fall_back`, and UnavailableError without.
        """
        name = self._of_kind.get(kind, self.default) if isinstance(store, msgspec.UnsetType) else store
        info = await self._find(name)
        if info is None or info.closing:
            there = {info.name: info for info in await self.infos()}
            info = there.get(name)
        if name in self._down and not may_fall_back:
            raise UnavailableError(f"the store {name!r} does not answer; try again, or name another")
        if name in self._down:
            return Target(self.fallbacks[name], await self.at(self.fallbacks[name]), self._confirm, name)
        if info is not None and not info.closing:
            return Target(name, await self.at(name), self._confirm)
        names = ", ".join(other.name for other in there.values() if not other.closing)
        what = "is being removed" if info is not None else "does not exist"
        if isinstance(store, msgspec.UnsetType):
            raise UnavailableError(f"the default store {name!r} {what}; name one of {names}")
        raise ValidationError(f"the store {name[:80]!r} {what}; there are {names}")

    async def _confirm(self, target: Target) -> None:
        if target.name in self._configured:
            return
        await self._refresh()
        info = self._added.get(target.name)
        opened = self._opened.get((target.name, info.place)) if info is not None and not info.closing else None
        if opened is None or opened.arrays is not target.arrays:
            raise UnavailableError(f"the store {target.name!r} was closed meanwhile; send it again, or to another store")

    # --- addresses -------------------------------------------------------------------------------------------------

    async def placed(self, document: DataFile) -> DataFile:
        """The document as it is answered: with the address its path has now, "" when its store is not known here."""
        try:
            return placed(document, self._location)
        except LookupError:
            await self._refresh()
            return placed(document, self._location_now)

    async def placed_json(self, documents: Sequence[bytes]) -> list[bytes]:
        """As `placed`, from and to JSON."""
        try:
            return [placed_json(document, self._location) for document in documents]
        except LookupError:
            await self._refresh()
            return [placed_json(document, self._location_now) for document in documents]

    def _location(self, name: str, key: str) -> str:
        info = self._known(name)
        if info is None:
            raise LookupError(name)
        return info.place.location(key)

    def _location_now(self, name: str, key: str) -> str:
        info = self._configured.get(name) or self._added.get(name)
        return info.place.location(key) if info is not None else ""

    # --- the end ---------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Finish what was begun, in every store that was opened."""
        for task in self._opening.values():
            task.cancel()
        closing = [opened.arrays.blobs.close() for opened in self._opened.values()]
        for outcome in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome


def real_root(root: str) -> str:
    """A root with the links of its folder resolved. Blocks."""
    return os.path.realpath(root) if kind_of_root(root) == "folder" else root


def _real_entry(entry: str) -> str:
    """An allowance with the links of its folder resolved."""
    if "://" in entry:
        return entry
    above, _, start = entry.rpartition("/")
    return f"{os.path.realpath(above or '/').rstrip('/')}/{start}" if entry.endswith("*") else os.path.realpath(entry)
