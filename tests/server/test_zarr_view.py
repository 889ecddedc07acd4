"""The Zarr view: any Zarr v3 reader gets equal values over HTTP, and never a fill value in place of a lost chunk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import xarray as xr
import zarr
from forms import DATAFILES, save
from services.deployment import at, blobs, overwrite
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

VALUES = np.random.default_rng(3).random((1400, 300))  # 3.4 MB: several chunks, in a bucket too
KINDS = {
    "f": VALUES,
    "c": (VALUES[:5, :4] + 1j).astype("<c8"),
    "i": np.arange(-5, 5, dtype="<i2"),
    "flag": np.array([True, False, True]),
    "when": np.array(["2026-01-31T08:00", "NaT"], "<M8[us]"),
    "span": np.array([1, -3], "<m8[ns]"),
    "label": np.array(["a", "äöü"], "<U4"),
    "scalar": np.float32(2.5),
    "empty": np.empty((0, 3)),
    "odd name": np.arange(3.0),
}


class HttpStore(Store):
    """The least a foreign reader does: GET with Range, absence is 404, anything else that is no success raises."""

    def __init__(self, base: str) -> None:
        super().__init__(read_only=True)
        self.base = base.rstrip("/")
        self._is_open = True

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        headers = {}
        if isinstance(byte_range, RangeByteRequest):
            headers["Range"] = f"bytes={byte_range.start}-{byte_range.end - 1}"
        elif isinstance(byte_range, OffsetByteRequest):
            headers["Range"] = f"bytes={byte_range.offset}-"
        elif isinstance(byte_range, SuffixByteRequest):
            headers["Range"] = f"bytes=-{byte_range.suffix}"
        answer = await asyncio.to_thread(httpx.get, f"{self.base}/{quote(key)}", headers=headers)
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        assert answer.status_code == (206 if headers else 200)
        return prototype.buffer.from_bytes(answer.content)

    async def get_partial_values(self, prototype, key_ranges):
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return (await asyncio.to_thread(httpx.head, f"{self.base}/{quote(key)}")).status_code == 200

    async def set(self, key: str, value: Buffer) -> None:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        raise NotImplementedError

    async def list(self) -> AsyncIterator[str]:
        raise NotImplementedError
        yield

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        return self.list()

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        return self.list()

    supports_writes = supports_deletes = supports_listing = supports_partial_writes = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HttpStore) and other.base == self.base

    __hash__ = None


def view(url: str, id: str) -> str:
    return f"{url}{DATAFILES}/{id}/zarr"


@pytest.fixture
def stored(wire):
    """A DataFile with an array of every kind, as this test's own."""
    return save(wire, KINDS, name="kinds", attrs={"title": "kinds"})


@pytest.fixture(scope="module")
def read_only(shared):
    """The address of the view of a DataFile that tests only read, and its document."""
    with httpx.Client(base_url=shared, verify=False) as http:
        document = save(http, KINDS, name="kinds", attrs={"title": "kinds"})
    return view(shared, document["id"]), document


@pytest.mark.filterwarnings("ignore:.*(V3 specification|vlen|consolidated).*")
@pytest.mark.parametrize("consolidated", [True, False])
def test_zarr_python_reads_equal_values(read_only, consolidated):
    """With consolidated metadata and array by array: every dtype, scalars and empty arrays included."""
    address, _ = read_only
    group = zarr.open_group(HttpStore(address), mode="r", zarr_format=3, use_consolidated=consolidated)
    assert group.attrs["title"] == "kinds"
    for name, expected in KINDS.items():
        array = group[name]
        assert array.dtype == np.asarray(expected).dtype, name
        np.testing.assert_array_equal(array[...], expected, err_msg=name)
    np.testing.assert_array_equal(group["f"][690:, ::7], VALUES[690:, ::7])
    if consolidated:
        assert set(group.array_keys()) == set(KINDS)


@pytest.mark.filterwarnings("ignore:.*(V3 specification|vlen|consolidated).*")
def test_xarray_opens_the_view_without_aq_data(shared, tmp_path):
    """Dims, coordinates and attributes are those of the saved dataset."""
    import aq_data

    dataset = xr.Dataset(
        {"iq": (("flux", "f"), np.ones((3, 4)) + 1j, {"units": "V"})},
        coords={"flux": ("flux", [0.0, 0.5, 1.0], {"units": "V"}), "f": np.arange(4.0)},
        attrs={"title": "T1"},
    )
    with aq_data.connect(shared) as client:
        file = client.save(dataset, name="T1")
    with xr.open_dataset(HttpStore(view(shared, file.id)), engine="zarr", zarr_format=3, consolidated=True) as opened:
        assert opened.attrs.pop("aq_data")["document"]["name"] == "T1"
        xr.testing.assert_identical(opened.load(), dataset)


def test_text_of_any_length_is_readable(wire, shared):
    import aq_data

    words = np.array(["ä", "", "long " * 50], dtype=object)
    with aq_data.connect(shared) as client:
        file = client.save({"words": words})
    array = zarr.open_array(HttpStore(f"{view(shared, file.id)}/words"), mode="r", zarr_format=3)
    assert list(array[...]) == list(words)


@pytest.mark.parametrize(
    "key",
    [
        *(".zmetadata", ".zgroup", ".zattrs", "zarr.json.aux.xml", "nothing/zarr.json", "f/.zarray", "f/.zattrs", "f", ""),
        *("f/c", "f/c/0", "f/c/0/0/0", "f/c/99/0", "f/c/-1/0", "f/c/0/x", "f/c/0/", "f/0/0", "f/0.0", "c/0"),
        *("scalar/c/0", "empty/c/0/0", "f/c/00/0", "f/c/%D9%A3/0", "f/c/0/" + "1" * 6000, "f/c/" + "0" * 6000 + "/0"),
        *(
            "../zarr.json",
            "%2E%2E/zarr.json",
            "%2e%2e%2fzarr.json",
            "f/%2E%2E/zarr.json",
            "f%2Fzarr.json%00",
            "f\\zarr.json",
        ),
        *("f/c/../../../../g/zarr.json", "%2Fetc%2Fpasswd", "f/c/0/0%00", "f/c/0/0%2F..", "~", "files", "__aq__/zarr.json"),
    ],
)
def test_what_does_not_exist_is_404(shared, wire, read_only, key):
    """The probes of Zarr v2 readers, chunks outside the grid, other spellings, ways out of the DataFile: all absent."""
    address, _ = read_only
    # As it stands, without the normalisation a client library would do.
    target = f"{address.removeprefix(shared)}/{key}".encode("ascii")
    answer = wire.get("/x", extensions={"target": target})
    assert answer.status_code == 404, answer.text[:200]
    assert answer.json()["code"] == "not_found"


def test_a_lost_chunk_is_never_absence(wire, stored, shared, shared_data):
    """A reader takes 404 for fill values: the loss of a recorded chunk is 500 corrupt, for one key and for a slice."""
    (folder,) = (blobs(shared_data) / stored["id"]).glob("*/arrays.zarr")
    (folder / "f" / "c" / "0" / "0").unlink()
    address = f"{DATAFILES}/{stored['id']}"
    for lost in (f"{address}/zarr/f/c/0/0", f"{address}/arrays/f?sel=0,0"):
        answer = wire.get(lost)
        assert (answer.status_code, answer.json()["code"]) == (500, "corrupt")
        assert wire.head(lost).status_code == 500
    array = zarr.open_array(HttpStore(f"{view(shared, stored['id'])}/f"), mode="r", zarr_format=3)
    with pytest.raises(httpx.HTTPStatusError):
        array[0, 0]
    rows = array.chunks[0]
    np.testing.assert_array_equal(array[rows:], VALUES[rows:])


def test_a_lost_group_folder_is_never_absence(wire, stored, shared_data):
    """Every key that the record promises stays promised when the whole folder is gone."""
    (folder,) = (blobs(shared_data) / stored["id"]).glob("*/arrays.zarr")
    folder.rename(folder.with_name("elsewhere"))
    for key in ("f/c/0/0", "scalar/c", "odd%20name/c/0"):
        answer = wire.get(f"{DATAFILES}/{stored['id']}/zarr/{key}")
        assert (answer.status_code, answer.json()["code"]) == (500, "corrupt")


def test_a_damaged_chunk_is_refused_as_values(wire, stored, shared_data):
    """A flipped byte is found by the checksum: no slice hands out wrong numbers, whole or streamed."""
    (folder,) = (blobs(shared_data) / stored["id"]).glob("*/arrays.zarr")
    chunk = folder / "f" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(chunk, bytes(content))
    for query in ("sel=0,0", "sel=0&format=json", "sel=0&format=npy"):
        answer = wire.get(f"{DATAFILES}/{stored['id']}/arrays/f?{query}")
        assert (answer.status_code, answer.json()["code"]) == (500, "corrupt")
    # The whole array is over a megabyte and streams: the answer is refused or broken off, never completed.
    try:
        whole = wire.get(f"{DATAFILES}/{stored['id']}/arrays/f")
    except httpx.TransportError:
        return
    assert whole.status_code == 500


@pytest.mark.parametrize("key", ["zarr.json", "f/zarr.json", "f/c/0/0", "scalar/c"])
def test_ranges_of_every_key(wire, read_only, key):
    """First bytes, last bytes by suffix, an open end; 416 outside; never 200 in place of a part."""
    address = f"{read_only[0]}/{key}"
    whole = wire.get(address)
    size = len(whole.content)
    assert whole.headers["accept-ranges"] == "bytes"
    for range, part in (
        ("0-3", whole.content[:4]),
        ("5-", whole.content[5:]),
        ("-4", whole.content[-4:]),
        (f"-{size + 10}", whole.content),
    ):
        answer = wire.get(address, headers={"Range": f"bytes={range}"})
        assert (answer.status_code, answer.content) == (206, part), range
        start = size - len(part) if range.startswith("-") else int(range.split("-")[0])
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(part) - 1}/{size}"
        assert "content-encoding" not in answer.headers
    outside = wire.get(address, headers={"Range": f"bytes={size}-"})
    assert outside.status_code == 416
    assert outside.headers["content-range"] == f"bytes */{size}"


def test_tags_change_exactly_when_the_content_can(wire, stored):
    """A PATCH changes the tag of the root zarr.json, whose copy of the document it changed, and of nothing else."""
    address = f"{DATAFILES}/{stored['id']}"
    keys = ["zarr.json", "f/zarr.json", "f/c/0/0"]
    before = {key: wire.get(f"{address}/zarr/{key}") for key in keys}
    for key, answer in before.items():
        again = wire.get(f"{address}/zarr/{key}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert len({answer.headers["etag"] for answer in before.values()}) == 3
    wire.patch(address, json={"comment": "changed", "attrs": {"title": "new title"}})
    root = wire.get(f"{address}/zarr/zarr.json", headers={"If-None-Match": before["zarr.json"].headers["etag"]})
    assert root.status_code == 200
    assert root.json()["attributes"]["title"] == "new title"
    assert root.json()["attributes"]["aq_data"]["document"]["comment"] == "changed"
    for key in keys[1:]:
        unchanged = wire.get(f"{address}/zarr/{key}", headers={"If-None-Match": before[key].headers["etag"]})
        assert unchanged.status_code == 304


def test_chunks_may_be_kept_forever_and_descriptions_not(wire, read_only):
    address, _ = read_only
    assert "immutable" in wire.get(f"{address}/f/c/0/0").headers["cache-control"]
    assert wire.get(f"{address}/zarr.json").headers["cache-control"] == "no-cache"


def test_the_view_serves_the_bytes_that_rest_in_the_folder(wire, read_only, shared_data):
    """What is served is what is stored: same chunks, and descriptions that say the same."""
    address, document = read_only
    (folder,) = (blobs(shared_data) / document["id"]).glob("*/arrays.zarr")
    assert at(document["path"]) == folder
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 2 * len(KINDS)
    for path in files:
        answer = wire.get(f"{address}/{quote(str(path.relative_to(folder)))}")
        if path.name == "zarr.json":
            assert answer.json() == httpx.Response(200, content=path.read_bytes()).json()
        else:
            assert answer.content == path.read_bytes()
