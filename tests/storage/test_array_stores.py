"""The array stores of one server: where they may lie in a real file system, and when they are opened."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aq_data.errors import ForbiddenError, StorageError, UnavailableError, ValidationError
from aq_data.models.stores import AddedStore, normal_allowance
from aq_data.storage.arrays import stores as stores_module
from aq_data.storage.arrays.bucket import BucketOptions
from aq_data.storage.arrays.memory import MemoryBlobs
from aq_data.storage.arrays.stores import ArrayStores, Place

SEGMENTS = st.sampled_from(["a", "b", "ab", "lab-1", "link", "..", ".", ""])
places = st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join)
real_places = st.lists(st.sampled_from(["a", "b", "ab", "lab-1"]), min_size=1, max_size=3).map("/".join)


@given(
    st.lists(st.tuples(real_places, places), max_size=4),
    st.lists(places | real_places.map(lambda p: f"{p}*"), max_size=3),
    places,
)
def test_what_may_be_added_lies_in_the_end_where_the_operator_allowed_it(links, entries, root):
    """Whatever links stand on the way, also loops, `..` and names that begin alike: the folder that would be opened is in
    one that an entry names, and has no link in it.
    """
    with tempfile.TemporaryDirectory() as folder:
        base = os.path.realpath(folder)
        for where, target in links:
            link = Path(base, where, "link")
            link.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(link):
                link.symlink_to(os.path.join(base, target))
        known = []
        for entry in entries:
            try:
                known.append(normal_allowance(f"{base}/{entry}"))
            except ValidationError:
                assert ".." in entry.split("/") or entry.endswith((".*", "/*"))
        stores = ArrayStores({}, roots=dict.fromkeys(known, BucketOptions()))
        try:
            place = stores.allowed(f"{base}/{root}")
        except (ForbiddenError, ValidationError):
            return
        assert os.path.realpath(place.root) == place.root
        assert any(allows(entry, place.root) for entry in known)


def allows(entry: str, folder: str) -> bool:
    """The same, said in terms of the file system."""
    if not entry.endswith("*"):
        return Path(folder).is_relative_to(os.path.realpath(entry))
    above, start = os.path.split(entry.removesuffix("*"))
    above = os.path.realpath(above)
    return Path(folder).is_relative_to(above) and os.path.relpath(folder, above).startswith(start) and folder != above


def test_a_store_is_opened_once_when_it_is_first_asked_for():
    opened: list[str] = []

    def open_blobs(place: Place) -> MemoryBlobs:
        opened.append(place.root)
        return MemoryBlobs()

    async def body() -> None:
        stores = ArrayStores({"a": Place("/a"), "b": Place("/b")}, open=open_blobs)
        assert opened == []
        found = await asyncio.gather(*(stores.at("a") for _ in range(20)), stores.folder("a"))
        assert len(set(map(id, found[:-1]))) == 1
        assert opened == ["/a"]
        await stores.close()

    asyncio.run(body())


def test_a_store_that_failed_to_open_is_tried_again_and_named():
    state = {"broken": True}

    def open_blobs(place: Place) -> MemoryBlobs:
        if state["broken"]:
            raise StorageError("no such disk")
        return MemoryBlobs()

    async def body() -> None:
        stores = ArrayStores({"a": Place("/a")}, open=open_blobs)
        for _ in range(2):
            with pytest.raises(UnavailableError, match="'a' cannot be opened by this server: no such disk"):
                await stores.at("a")
        with pytest.raises(UnavailableError, match="'b' is not known"):
            await stores.at("b")
        state["broken"] = False
        await stores.at("a")
        await stores.close()

    asyncio.run(body())


def test_stores_in_memory_are_apart():
    async def body() -> None:
        stores = ArrayStores({"a": Place("memory:"), "b": Place("memory:")})
        await (await stores.at("a")).blobs.replace("k", b"1")
        assert await (await stores.at("b")).blobs.children("") == []
        await stores.close()

    asyncio.run(body())


def test_what_an_admin_added_is_remembered_for_a_while_and_asked_for_when_a_name_is_new(monkeypatch):
    """No question to the metadata store for stores of the configuration, one a while for the others, one for each new name."""
    asked: list[int] = []
    added = [AddedStore("b", "gs://lab/b")]
    clock = [0.0]
    monkeypatch.setattr(stores_module.time, "monotonic", lambda: clock[0])

    async def ask() -> list[AddedStore]:
        asked.append(len(added))
        return list(added)

    async def body() -> None:
        stores = ArrayStores(
            {"a": Place("/a")}, added=ask, roots={"gs://lab": BucketOptions()}, open=lambda _: MemoryBlobs()
        )
        for _ in range(5):
            await stores.at("a")
        assert asked == []
        for _ in range(5):
            await stores.at("b")
        assert asked == [1]
        added.append(AddedStore("c", "gs://lab/c"))
        await stores.at("c")
        assert asked == [1, 2]
        added[0] = AddedStore("b", "gs://lab/moved")
        before = await stores.at("b")
        clock[0] += stores_module.KNOWN_SECONDS + 0.001
        assert await stores.at("b") is not before, "after a while another root is another store"
        await stores.close()

    asyncio.run(body())


def test_an_answer_that_comes_late_is_not_taken_for_the_newest():
    """Two ask; the one that began first is answered last, with what was true before."""
    waiting: list[asyncio.Future] = []

    async def ask() -> list[AddedStore]:
        waiting.append(asyncio.get_running_loop().create_future())
        return await waiting[-1]

    async def body() -> None:
        stores = ArrayStores({}, added=ask, open=lambda _: MemoryBlobs())
        first = asyncio.create_task(stores.names())
        await asyncio.sleep(0.001)
        second = asyncio.create_task(stores.names())
        await asyncio.sleep(0.001)
        waiting[1].set_result([AddedStore("new", "gs://lab/new")])
        assert await second == ["new"]
        waiting[0].set_result([AddedStore("old", "gs://lab/old")])
        assert await first == ["new"]
        assert stores.known() == ["new"]

    asyncio.run(body())


def test_how_an_added_bucket_is_reached_comes_from_the_entry_that_allows_it():
    """The longest that does; a place that no entry allows (any more) is not opened."""
    near, far = BucketOptions(region="near"), BucketOptions(region="far")
    opened: list[Place] = []

    async def ask() -> list[AddedStore]:
        return [AddedStore("b", "s3://lab/x/b"), AddedStore("c", "s3://lab-2"), AddedStore("d", "s3://other")]

    def open_blobs(place: Place) -> MemoryBlobs:
        opened.append(place)
        return MemoryBlobs()

    async def body() -> None:
        stores = ArrayStores({}, added=ask, roots={"s3://lab*": far, "s3://lab/x": near}, open=open_blobs)
        await stores.at("b")
        await stores.at("c")
        with pytest.raises(UnavailableError, match="not among the roots"):
            await stores.at("d")
        assert opened == [Place("s3://lab/x/b", near), Place("s3://lab-2", far)]
        await stores.close()

    asyncio.run(body())


@pytest.mark.parametrize("way", ["at the start", "meanwhile"])
def test_a_folder_whose_disk_is_not_mounted_is_unavailable(tmp_path, way):
    """Nothing is written into the mount point, and nothing is taken for absent; with the disk everything is as before."""
    root, disk = tmp_path / "mount", tmp_path / "disk"

    async def holds(_: str) -> bool:
        return way == "at the start"

    async def body() -> None:
        stores = ArrayStores({"a": Place(str(root))}, holds=holds)
        if way == "meanwhile":
            blobs = (await stores.at("a")).blobs
            await blobs.replace("id/1/x", b"kept")
            root.rename(disk)
            root.mkdir()
            for ask in (
                lambda: blobs.get("id/1/x"),
                lambda: blobs.size("id/1/x"),
                lambda: blobs.children("id"),
                lambda: blobs.replace("id/2/x", b"lost"),
                lambda: blobs.put_many([("id/2/x", lambda: b"lost")]),
                lambda: blobs.copy_many([("id/1/x", "id/2/x")]),
                lambda: blobs.upload("id/2/x"),
                blobs.check,
            ):
                with pytest.raises(UnavailableError, match="mounted"):
                    await ask()
            with pytest.raises(UnavailableError, match="mounted"):
                _ = [entry async for entry in blobs.walk("")]
        else:
            (disk / "id" / "1").mkdir(parents=True)
            (disk / "id" / "1" / "x").write_bytes(b"kept")
            with pytest.raises(UnavailableError, match="mounted"):
                await stores.at("a")
        assert list(root.iterdir()) == []
        root.rmdir()
        disk.rename(root)
        blobs = (await stores.at("a")).blobs
        assert await blobs.get("id/1/x") == b"kept"
        await blobs.check()
        await stores.close()

    asyncio.run(body())
