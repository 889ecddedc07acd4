"""The conformance suite of `BlobStore`: a backend supplies `open_store`, which opens a store on an empty place."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from itertools import groupby
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aq_data.errors import NotFoundError
from aq_data.storage.arrays.blobs import BlobStore

T = TypeVar("T")
OpenStore = Callable[[], BlobStore]

KEYS = [
    "a/1/arrays.zarr/zarr.json",
    "a/1/arrays.zarr/x/c/0/0",
    "a/1/arrays.zarr/x/c/0/1",
    "a/1/files/k",
    "a/2/files/k",
    "ab/1/files/k",
]


class OwnError(Exception):
    """Raised by what a caller hands in; no store knows it."""


def within(open_store: OpenStore, body: Callable[[BlobStore], Awaitable[T]]) -> T:
    """What `body` returns for a store that is closed afterwards."""

    async def run() -> T:
        store = open_store()
        try:
            return await body(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def put(store: BlobStore, blobs: dict[str, bytes]) -> None:
    await store.put_many([(key, lambda data=data: data) for key, data in blobs.items()])


async def keys_under(store: BlobStore, prefix: str) -> list[str]:
    return sorted([entry.key async for entry in store.walk(prefix)])


class BlobStoreTests:
    """What a blob store promises."""

    keeps_targets = True
    """Whether a copy leaves what stands under its target, rather than putting the same bytes there once more."""

    # --- writing and reading ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 64, 65, 200])
    def test_what_is_put_is_got_whatever_the_number(self, open_store, count):
        blobs = {f"id/1/x/c/{i // 7}/{i}": bytes([i % 251]) * (i * 37 % 1000) for i in range(count)}

        async def body(store):
            await put(store, blobs)
            await store.settle("id/1")
            found: dict[str, bytes] = {}
            keys = list(blobs)
            await store.get_many(keys, lambda i, data: found.__setitem__(keys[i], data))
            assert found == blobs
            for key in keys[:5]:
                assert await store.get(key) == blobs[key]

        if count:
            within(open_store, body)
        else:
            within(open_store, lambda store: put(store, {}))

    @pytest.mark.parametrize(
        "data", [b"", b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4], memoryview(b"abcabc").cast("H")]
    )
    def test_any_buffer_is_stored_as_its_bytes(self, open_store, data):
        async def body(store):
            await store.put_many([("k/put", lambda: data)])
            await store.replace("k/replace", data)
            upload = await store.upload("k/upload")
            await upload.write(data)
            await upload.finish()
            for key in ("k/put", "k/replace", "k/upload"):
                assert await store.get(key) == bytes(data)
                assert await store.size(key) == len(bytes(data))

        within(open_store, body)

    @settings(max_examples=settings().max_examples // 5)
    @given(
        data=st.binary(max_size=20),
        ranges=st.lists(st.tuples(st.integers(0, 25), st.none() | st.integers(0, 25)), min_size=1, max_size=10),
    )
    def test_a_range_is_what_slicing_gives(self, open_store, data, ranges):
        async def body(store):
            await put(store, {"k/range": data})
            for start, stop in ranges:
                assert await store.get("k/range", start, stop) == data[start:stop]

        within(open_store, body)

    def test_a_large_blob_is_read_whole(self, open_store):
        data = bytes(range(256)) * (20 << 12)

        async def body(store):
            await put(store, {"k/large": data})
            assert await store.get("k/large") == data
            assert await store.get("k/large", 1 << 20, (1 << 20) + 10) == data[1 << 20 : (1 << 20) + 10]

        within(open_store, body)

    def test_putting_again_leaves_the_new_bytes_and_no_rest_of_the_old(self, open_store):
        async def body(store):
            await put(store, {"k/x": b"long before"})
            await put(store, {"k/x": b"now"})
            assert await store.get("k/x") == b"now"

        within(open_store, body)

    def test_produce_and_consume_run_in_worker_threads(self, open_store):
        threads = set()

        def produce():
            threads.add(threading.get_ident())
            return b"x"

        async def body(store):
            await store.put_many([(f"k/{i}", produce) for i in range(9)])
            await store.get_many([f"k/{i}" for i in range(9)], lambda i, data: threads.add(threading.get_ident()))

        within(open_store, body)
        assert threading.get_ident() not in threads

    # --- replace ---------------------------------------------------------------------------------------------------

    def test_a_reader_sees_all_of_one_blob_or_all_of_the_other_while_it_is_replaced(self, open_store):
        versions = [bytes([65 + i]) * (1 + 9973 * i) for i in range(8)]

        async def body(store):
            await store.replace("k/copy", versions[0])
            writing = True

            async def read():
                while writing:
                    assert await store.get("k/copy") in versions
                    await asyncio.sleep(0)  # a store in memory need not give way

            async def read_many():
                def consume(i, data):
                    assert data in versions

                while writing:
                    await store.get_many(["k/copy"] * 6, consume)

            readers = [asyncio.create_task(read()) for _ in range(3)] + [asyncio.create_task(read_many())]
            for i in range(60):
                await store.replace("k/copy", versions[i % len(versions)])
            await asyncio.gather(*(store.replace("k/copy", version) for version in versions))
            writing = False
            await asyncio.gather(*readers)
            assert await store.get("k/copy") in versions
            assert await keys_under(store, "k") == ["k/copy"], "nothing temporary is left"

        within(open_store, body)

    def test_replace_makes_a_blob_that_was_not_there(self, open_store):
        async def body(store):
            await store.replace("new/place/k", b"x")
            assert await store.get("new/place/k") == b"x"

        within(open_store, body)

    # --- copying ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("count", [0, 1, 5, 200])
    def test_copies_have_the_bytes_of_their_sources_and_both_stand(self, open_store, count):
        """In folders that were not there before, several of one source, of any size; an empty list is nothing."""

        async def body(store):
            blobs = {f"id/1/open/5-1/{i}": bytes([i % 251]) * (i * 37 % 1000) for i in range(count)}
            await put(store, blobs)
            pairs = [(key, f"id/1/arrays.zarr/x/c/{i % 7}/{i}") for i, key in enumerate(blobs)]
            pairs += [(key, f"id/1/again/{i}") for i, key in enumerate(blobs)]
            await store.copy_many(pairs)
            if pairs:
                await store.settle("id/1")
            for source, target in pairs:
                assert await store.get(target) == blobs[source] == await store.get(source)
                assert await store.size(target) == len(blobs[source])
            assert await keys_under(store, "id") == sorted([*blobs, *(target for _, target in pairs)])

        within(open_store, body)

    def test_what_stands_under_a_target_stays(self, open_store):
        """A copy that is repeated, or made twice at once, never changes what was published."""

        async def body(store):
            await put(store, {"k/a": b"first", "k/b": b"second" if self.keeps_targets else b"first"})
            await store.copy_many([("k/a", "out/x")])
            await store.copy_many([("k/b", "out/x"), ("k/b", "out/y")])
            assert await store.get("out/x") == b"first"
            assert await store.get("out/y") == await store.get("k/b")
            await asyncio.gather(*(store.copy_many([(f"k/{source}", f"out/z{i}") for i in range(9)]) for source in "abab"))
            for i in range(9):
                assert await store.get(f"out/z{i}") in (b"first", b"second")
            assert await keys_under(store, "k") == ["k/a", "k/b"]
            assert len(await keys_under(store, "out")) == 11, "nothing temporary is left"

        within(open_store, body)

    def test_a_copy_outlives_its_source_and_what_replaces_the_one_leaves_the_other(self, open_store):
        """The chunks of the open phase are removed once the finished ones are named."""

        async def body(store):
            await put(store, {"k/a": b"first"})
            await store.copy_many([("k/a", "out/x"), ("k/a", "out/y")])
            await store.replace("out/y", b"other")
            assert (await store.get("k/a"), await store.get("out/x")) == (b"first", b"first")
            await store.replace("k/a", b"new")
            assert await store.get("out/x") == b"first"
            await store.remove("k")
            assert await store.get("out/x") == b"first"
            await put(store, {"k/a": b"third"})
            assert await store.get("out/x") == b"first"

        within(open_store, body)

    @pytest.mark.parametrize("source", ["absent", "k", "k/a/below", "k/absent"])
    @pytest.mark.parametrize("target", ["out/x", "k/b"])
    def test_a_source_that_is_absent_is_not_found_by_name(self, open_store, source, target):
        """Also where only a blob above or below has such a name; nothing comes to stand under the target."""

        async def body(store):
            await put(store, {"k/a": b"first"})
            with pytest.raises(NotFoundError) as failure:
                await store.copy_many([(source, target)])
            assert source in str(failure.value)
            assert await keys_under(store, "k") == ["k/a"]
            assert await keys_under(store, "out") == []

        within(open_store, body)

    # --- uploads ---------------------------------------------------------------------------------------------------

    def test_nothing_stands_under_the_key_of_an_upload_until_it_is_finished(self, open_store):
        async def body(store):
            upload = await store.upload("id/1/files/k")
            try:
                for piece in (b"one ", b"", b"two"):
                    await upload.write(piece)
                    with pytest.raises(NotFoundError):
                        await store.get("id/1/files/k")
                    with pytest.raises(NotFoundError):
                        await store.size("id/1/files/k")
                await upload.finish()
            finally:
                await upload.discard()
            assert await store.get("id/1/files/k") == b"one two", "discard after finish does nothing"

        within(open_store, body)

    def test_a_discarded_upload_leaves_nothing(self, open_store):
        async def body(store):
            upload = await store.upload("id/1/files/k")
            await upload.write(b"x")
            await upload.discard()
            await upload.discard()
            with pytest.raises(NotFoundError):
                await store.get("id/1/files/k")
            assert await keys_under(store, "id") == []

        within(open_store, body)

    def test_uploads_at_once_do_not_mix(self, open_store):
        async def send(store, i):
            upload = await store.upload(f"id/1/files/{i}")
            for _ in range(20):
                await upload.write(bytes([i]) * 100)
            await upload.finish()

        async def body(store):
            await asyncio.gather(*(send(store, i) for i in range(8)))
            for i in range(8):
                assert await store.get(f"id/1/files/{i}") == bytes([i]) * 2000

        within(open_store, body)

    # --- names -----------------------------------------------------------------------------------------------------

    def test_children_are_the_names_directly_below_sorted(self, open_store):
        async def body(store):
            assert await store.children("") == []
            await put(store, dict.fromkeys(KEYS, b"x"))
            assert await store.children("") == ["a", "ab"]
            assert await store.children("a") == ["1", "2"]
            assert await store.children("a/1/arrays.zarr") == ["x", "zarr.json"]
            assert await store.children("a/1/files/k") == []
            assert await store.children("absent") == []
            assert await store.children("a/absent/deep") == []

        within(open_store, body)

    def test_walk_gives_every_blob_below_with_its_size(self, open_store):
        async def body(store):
            await put(store, {key: b"x" * i for i, key in enumerate(KEYS)})
            entries = {entry.key: entry async for entry in store.walk("a")}
            assert {key: entry.size for key, entry in entries.items()} == {
                key: i for i, key in enumerate(KEYS) if key.startswith("a/")
            }
            assert all(entry.modified > 1.7e9 for entry in entries.values())
            assert await keys_under(store, "a/1/arrays.zarr/x") == KEYS[1:3]
            assert await keys_under(store, "absent") == []

        within(open_store, body)

    @settings(max_examples=settings().max_examples // 5)
    @given(keys=st.sets(st.lists(st.sampled_from(["a", "a-", "a.b", "b", "c0"]), min_size=4, max_size=4).map("/".join)))
    def test_walking_keeps_together_what_lies_together(self, open_store, keys):
        """Also where one name begins as another: whoever groups a listing by folders meets each once."""

        async def body(store):
            await put(store, {f"k/{key}": b"x" for key in keys})
            found = [entry.key async for entry in store.walk("k")]
            assert sorted(found) == sorted(f"k/{key}" for key in keys)
            for depth in (2, 3, 4):
                folders = [tuple(key.split("/")[:depth]) for key in found]
                assert len(list(groupby(folders))) == len(set(folders))
            await store.remove("k")

        within(open_store, body)

    def test_walking_the_root_gives_everything(self, open_store):
        async def body(store):
            await put(store, dict.fromkeys(KEYS, b"x"))
            assert await keys_under(store, "") == sorted(KEYS)

        within(open_store, body)

    def test_remove_takes_everything_below_and_nothing_else(self, open_store):
        async def body(store):
            await put(store, dict.fromkeys(KEYS, b"x"))
            await store.remove("a/1")
            assert await keys_under(store, "a") == ["a/2/files/k"]
            assert await keys_under(store, "ab") == ["ab/1/files/k"]
            await store.remove("a/1")
            await store.remove("absent/deep")
            await store.remove("a/2/files/k")
            assert await keys_under(store, "a") == []
            assert await store.children("a/2") == []
            await put(store, {"a/1/files/k": b"again"})
            assert await store.get("a/1/files/k") == b"again"

        within(open_store, body)

    # --- absence and failure ---------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", ["absent", "id/1/absent", "id/1/x/c/0/0/below", "id/1/x", "id"])
    def test_absence_is_not_found_naming_the_key(self, open_store, key):
        """Also where only a blob above or below has such a name."""

        async def body(store):
            await put(store, {"id/1/x/c/0/0": b"x"})
            for ask in (
                lambda: store.get(key),
                lambda: store.get(key, 1, 2),
                lambda: store.size(key),
                lambda: store.get_many([key], lambda i, data: None),
                lambda: store.get_many(["id/1/x/c/0/0"] * 9 + [key], lambda i, data: None),
            ):
                with pytest.raises(NotFoundError) as caught:
                    await ask()
                assert key in str(caught.value)
                assert caught.value.code == "not_found"

        within(open_store, body)

    @pytest.mark.parametrize("count", [3, 300])
    def test_what_consume_raises_comes_out_and_stops_the_rest(self, open_store, count):
        consumed = []

        def consume(i, data):
            consumed.append(i)
            raise OwnError

        async def body(store):
            await put(store, {f"k/{i}": b"x" for i in range(count)})
            with pytest.raises(OwnError):
                await store.get_many([f"k/{i}" for i in range(count)], consume)
            seen = len(consumed)
            assert seen < max(2, count / 2)
            await store.get("k/0")
            assert len(consumed) == seen, "nothing runs on after the answer"

        within(open_store, body)

    @pytest.mark.parametrize("count", [3, 300])
    def test_what_produce_raises_comes_out_and_stops_the_rest(self, open_store, count):
        produced = []

        def produce():
            produced.append(1)
            raise OwnError

        async def body(store):
            with pytest.raises(OwnError):
                await store.put_many([(f"k/{i}", produce) for i in range(count)])
            assert len(produced) < max(2, count / 2)
            assert await keys_under(store, "k") == []
            await put(store, {"k/0": b"x"})
            assert await store.get("k/0") == b"x"

        within(open_store, body)

    @pytest.mark.parametrize("error", [NotFoundError("theirs"), FileNotFoundError(2, "theirs"), KeyError("theirs")])
    def test_an_error_of_the_caller_is_not_mistaken_for_one_of_the_store(self, open_store, error):
        def fail(*_):
            raise error

        async def body(store):
            await put(store, {"k/0": b"x"})
            for ask in (lambda: store.get_many(["k/0"], fail), lambda: store.put_many([("k/1", fail)])):
                with pytest.raises(type(error)) as caught:
                    await ask()
                assert caught.value is error

        within(open_store, body)

    @pytest.mark.parametrize("count", [1, 40], ids=["few", "many"])
    @pytest.mark.parametrize("word", ["read", "write"])
    def test_a_cancelled_call_returns_only_when_no_thread_works_for_it_any_more(self, open_store, word, count):
        """Else a thread would go on in buffers and descriptors that are let go, and may be somebody else's by then."""
        working = 0
        lock = threading.Lock()
        begun, release = threading.Event(), threading.Event()

        def work(*_):
            nonlocal working
            with lock:
                working += 1
            begun.set()
            release.wait(10)
            with lock:
                working -= 1
            return b"x"

        async def body(store):
            keys = [f"k/{i}" for i in range(count)]
            await put(store, dict.fromkeys(keys, b"x"))
            call = store.get_many(keys, work) if word == "read" else store.put_many([(key, work) for key in keys])
            task = asyncio.create_task(call)
            await asyncio.to_thread(begun.wait, 10)
            task.cancel()
            asyncio.get_running_loop().call_later(0.05, release.set)
            with pytest.raises(asyncio.CancelledError):
                await task
            still_working = working
            release.set()
            assert still_working == 0

        within(open_store, body)

    def test_a_healthy_store_says_so(self, open_store):
        async def body(store):
            assert await store.check() is None
            await store.settle("")
            assert await store.children("absent") == []

        within(open_store, body)
