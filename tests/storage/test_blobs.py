"""Folders and memory keep the contract of a blob store; of the operating system's errors none comes out as absence."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from blob_suite import BlobStoreTests, keys_under, put, within

from aq_data.errors import AqDataError, NotFoundError, StorageError, UnavailableError, ValidationError
from aq_data.storage.arrays import _files
from aq_data.storage.arrays.folder import FolderBlobs, translate
from aq_data.storage.arrays.memory import MemoryBlobs


class TestFolder(BlobStoreTests):
    """Blobs as files."""

    @pytest.fixture
    def open_store(self, tmp_path):
        return lambda: FolderBlobs(tmp_path / "blobs")


class TestMemory(BlobStoreTests):
    """Blobs in a dict."""

    @pytest.fixture
    def open_store(self):
        return MemoryBlobs


@pytest.fixture
def root(tmp_path):
    return tmp_path / "blobs"


@pytest.fixture
def open_store(root):
    return lambda: FolderBlobs(root)


# --- the table of errors -------------------------------------------------------------------------------------------

ABSENCE = {"ENOENT", "ENOTDIR", "EISDIR"}
PASSING = {"ENOSPC", "EIO", "EDQUOT", "EMFILE", "ENFILE", "EROFS", "ESTALE", "ETIMEDOUT", "EBUSY", "EAGAIN"}
LASTING = {"EACCES", "EPERM", "ENAMETOOLONG", "ELOOP", "EINVAL", "EFBIG", "ENOTEMPTY", "EXDEV"}


@pytest.mark.parametrize("code", sorted(errno.errorcode), ids=errno.errorcode.get)
def test_every_error_number_has_one_error_of_ours_and_only_absence_is_not_found(code):
    name = errno.errorcode[code]
    ours = translate(OSError(code, os.strerror(code)), "some/key")
    assert type(ours) in (NotFoundError, UnavailableError, StorageError)
    assert (type(ours) is NotFoundError) == (name in ABSENCE)
    if name in PASSING:
        assert type(ours) is UnavailableError
    if name in LASTING:
        assert type(ours) is StorageError
    assert "some/key" in str(ours)


@pytest.mark.parametrize(
    "exc", [OSError(), OSError("no number"), PermissionError(), TimeoutError(), OSError(9999, "unheard of")]
)
def test_an_error_without_a_known_number_is_never_absence(exc):
    assert isinstance(translate(exc, "some/key"), (StorageError, UnavailableError))


# --- real failures of a folder -------------------------------------------------------------------------------------


def test_a_full_disk_is_unavailable(root, open_store):
    """`/dev/full` is a disk without room."""

    async def body(store):
        (root / "k").mkdir()
        for name in ("put", "upload.part"):
            (root / "k" / name).symlink_to("/dev/full")
        with pytest.raises(UnavailableError, match="ENOSPC"):
            await put(store, {"k/put": b"x"})
        upload = await store.upload("k/upload")
        with pytest.raises(UnavailableError, match="ENOSPC"):
            await upload.write(b"x")
        await upload.discard()

    within(open_store, body)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_bytes_that_cannot_be_flushed_are_not_acknowledged(open_store, monkeypatch, code):
    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    async def body(store):
        upload = await store.upload("k/upload")
        await put(store, {"k/settled": b"x"})
        await store.replace("k/replaced", b"old")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            for ask in (
                lambda: put(store, {"k/put": b"x"}),
                lambda: put(store, {f"k/{i}": b"x" for i in range(9)}),
                lambda: store.replace("k/replaced", b"new"),
                lambda: store.settle("k"),
                lambda: store.check(),
                upload.finish,
            ):
                with pytest.raises(UnavailableError, match=errno.errorcode[code]):
                    await ask()
        await upload.discard()
        assert await store.get("k/replaced") == b"old"
        assert not [key for key in await keys_under(store, "") if key.endswith(".tmp")]

    within(open_store, body)


def test_reading_that_fails_is_no_absence(root, open_store):
    """A loop of links and a name too long exist as little as a blob does, but nobody can tell."""

    async def body(store):
        (root / "loop").symlink_to("loop")
        for key, name in [("loop", "ELOOP"), ("x" * 300, "ENAMETOOLONG")]:
            for ask in (
                lambda key=key: store.get(key),
                lambda key=key: store.size(key),
                lambda key=key: store.get_many([key], lambda i, data: None),
                lambda key=key: store.children(key),
                lambda key=key: put(store, {key: b"x"}),
            ):
                with pytest.raises(StorageError, match=name):
                    await ask()
        (root / "broken").symlink_to("/proc/self/mem")
        with pytest.raises(UnavailableError, match="EIO"):
            await store.get("broken", 0, 10)

    within(open_store, body)


def test_writing_where_another_blob_stands_in_the_way_is_no_absence(open_store):
    async def body(store):
        await put(store, {"k/file": b"x", "k/folder/file": b"x"})
        for key in ("k/file/below", "k/folder"):
            for ask in (
                lambda key=key: put(store, {key: b"x"}),
                lambda key=key: store.replace(key, b"x"),
                lambda key=key: store.upload(key),
            ):
                with pytest.raises(AqDataError) as caught:
                    await ask()
                assert not isinstance(caught.value, NotFoundError), key
        assert await store.get("k/file") == b"x"
        assert await keys_under(store, "k") == ["k/file", "k/folder/file"]

    within(open_store, body)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_folder_that_cannot_be_listed_is_not_empty(open_store, monkeypatch, code):
    """Who collects orphans or verifies chunks must not take a failing disk for an empty one."""

    def fail(path="."):
        raise OSError(code, os.strerror(code), path)

    async def body(store):
        await put(store, {"k/1/file": b"x"})
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", fail)
            patch.setattr(os, "listdir", fail)
            for ask in (lambda: keys_under(store, "k"), lambda: store.children("k"), lambda: store.settle("k")):
                with pytest.raises((StorageError, UnavailableError)):
                    await ask()
        assert await keys_under(store, "k") == ["k/1/file"]

    within(open_store, body)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_blob_that_cannot_be_examined_is_an_error_of_ours(open_store, monkeypatch, code):
    def fail(path, **_):
        raise OSError(code, os.strerror(code), path)

    async def body(store):
        await put(store, {"k/1/file": b"x"})
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", fail)
            outcomes = []
            for ask in (lambda: keys_under(store, "k"), lambda: store.size("k/1/file")):
                try:
                    outcomes.append(await ask())
                except (AqDataError, OSError) as exc:
                    outcomes.append(type(exc))
        assert set(outcomes) <= {StorageError, UnavailableError}

    within(open_store, body)


def test_a_place_where_no_folder_can_be_made_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AqDataError):
        FolderBlobs(tmp_path / "file" / "blobs")


# --- durability ----------------------------------------------------------------------------------------------------


def test_every_file_and_every_folder_above_it_is_flushed(root, open_store, monkeypatch):
    """What is acknowledged survives power loss: each file and each directory entry up to the root has been fsynced."""
    flushed = set()
    real = os.fsync

    def fsync(descriptor):
        flushed.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)

    async def body(store):
        await put(store, {f"id/1/x/c/{i}": b"x" for i in range(9)})
        upload = await store.upload("id/1/files/k")
        await upload.write(b"x")
        await upload.finish()
        await store.settle("id/1")

    within(open_store, body)
    directories = {str(path) for path in root.rglob("*") if path.is_dir()} | {str(root)}
    assert directories <= flushed
    assert len([path for path in flushed if path not in directories]) == 10


def test_a_location_is_a_path_that_other_programs_can_open(root, open_store):
    async def body(store):
        await put(store, {"k/file": b"x"})
        with open(store.location("k/file"), "rb") as file:
            assert file.read() == b"x"

    within(open_store, body)


def test_what_was_put_is_there_for_a_store_opened_later(open_store):
    within(open_store, lambda store: put(store, {"k/file": b"x"}))
    assert within(open_store, lambda store: store.get("k/file")) == b"x"


def test_names_that_a_file_system_takes_for_one_are_refused(tmp_path, monkeypatch):
    """As macOS and Windows do: `T` and `t` would lie in one file, each with a checksum that is right."""
    store = FolderBlobs(tmp_path / "tells")
    store.check_names(["T", "t", "\u00e9", "e\u0301"])
    assert list((tmp_path / "tells").iterdir()) == []
    monkeypatch.setattr(_files, "folds_names", lambda _: True)
    store = FolderBlobs(tmp_path / "folds")
    store.check_names(["T", "s", "flux"])
    for names in (["T", "s", "t"], ["\u00e9", "e\u0301"], ["Straße", "STRASSE"]):
        with pytest.raises(ValidationError, match="rename one"):
            store.check_names(names)
