"""Measuring through the client: what was written is read back while the sweep grows, after it ended, and by plain Zarr."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
from aq_server import routes
from aq_server.service import folding
from services.deployment import open_zarr

import aq_data
from aq_data.client import arrays
from aq_data.errors import ConflictError, UnavailableError


@pytest.fixture(autouse=True)
def _spool(monkeypatch, tmp_path):
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))


def test_a_grid_that_grows_is_read_at_every_moment(client, tmp_path):
    """Appended rows, a region written over, a gap: the values, the extents and the written map, live and at the end."""
    flux = np.linspace(0, 1, 5)
    expected = np.full((5, 12), complex("nan+nanj"))
    dims = {"flux": (flux, {"units": "Wb"}), "delay": None}
    with client.sweep("T1", dims=dims, variables={"iq": ("complex128", ("flux", "delay"))}, tags=["q3"]) as sweep:
        for i in range(8):
            expected[:, i] = np.arange(5) + 1j * i
            sweep.append(iq=expected[:, i], delay=0.5 * i, dim="delay")
        sweep.write(iq=np.array([9, 8.0]), at={"flux": slice(1, 3), "delay": 2})
        expected[1:3, 2] = [9, 8]
        sweep.write(iq=7.0, at={"flux": -1, "delay": 11})
        expected[4, 11] = 7
        sweep.flush()
        file = client.get(sweep.id)
        assert file.state == "open"
        np.testing.assert_array_equal(file["iq"][...], expected)
        np.testing.assert_array_equal(file.written("iq"), ~np.isnan(expected))
        assert file.open(live=True)["flux"].attrs == {"units": "Wb"}
    file.refresh()
    assert (file.state, file.tags) == ("complete", ["q3"])
    np.testing.assert_array_equal(file["iq"][...], expected)
    np.testing.assert_array_equal(file.written("iq"), ~np.isnan(expected))
    with open_zarr(file.path) as plain:
        np.testing.assert_array_equal(plain["iq"].values, expected)
        np.testing.assert_array_equal(plain["flux"].values, flux)
    assert not list((tmp_path / "spool").iterdir())


def test_an_exception_abandons_the_sweep_with_its_reason(client):
    """What was written before it stays readable."""
    with pytest.raises(ZeroDivisionError), client.sweep("x", dims={"x": None}, variables={"y": ("f8", "x")}) as sweep:
        sweep.append(y=1.5, x=2.0)
        _ = 1 / 0
    file = client.get(sweep.id)
    assert (file.state, file.sweep["reason"]) == ("abandoned", "ZeroDivisionError: division by zero")
    assert file["y"][...].tolist() == [1.5]


def test_followers_get_every_block_and_the_end(client):
    """Each event once and in order; going on behind one gives the rest."""
    with client.sweep("x", dims={"x": None}, variables={"y": ("f8", "x")}) as sweep:
        for i in range(5):
            sweep.append(y=float(i), x=float(i))
            sweep.flush()
        client.update(sweep.id, {"comment": "good"})
    events = list(client.follow(sweep.id))
    assert [event.kind for event in events] == ["block"] * 5 + ["metadata", "finished"]
    assert [event.data["seq"] for event in events[:5]] == [1, 2, 3, 4, 5]
    assert list(client.follow(sweep.id, after=events[2].id)) == events[3:]
    assert isinstance(events[0], aq_data.Event)


def test_events_have_one_order_and_one_id_for_every_follower(client):
    """One that watches live, one that comes late, and one that goes on from any event: the same events with the same ids."""
    sweep = client.sweep("x", dims={"x": None}, variables={"y": ("f8", "x")})
    live: list[aq_data.Event] = []
    follower = threading.Thread(target=lambda: live.extend(client.follow(sweep.id)))
    follower.start()
    for i in range(12):
        sweep.append(y=float(i), x=float(i))
        sweep.flush()
        if i % 3 == 0:
            client.update(sweep.id, {"comment": f"at {i}"})
    sweep.finish()
    follower.join()
    late = list(client.follow(sweep.id))
    assert live == late
    kinds = "".join(event.kind[0] for event in late)
    assert kinds == "bmbbbmbbbmbbbmbbf"
    for i, event in enumerate(late[:-1]):
        assert list(client.follow(sweep.id, after=event.id)) == late[i + 1 :]


def test_load_is_one_moment_of_all_variables(client, monkeypatch):
    """Beside a writer that writes all of three variables over in each block, and eager folding: they always agree."""
    monkeypatch.setattr(folding, "FOLD_BLOCKS", 7)
    monkeypatch.setattr(folding, "LOOK_SECONDS", 0.02)
    variables = {"a": ("i8", "x"), "b": ("i8", ("x", "k")), "c": ("i8", ())}
    with client.sweep("over", dims={"x": 50, "k": 3}, variables=variables) as sweep:
        stop = threading.Event()

        def write() -> None:
            n = 0
            while not stop.wait(0.003):
                n += 1
                sweep.write(a=np.full(50, n), b=np.full((50, 3), n), c=n)

        writer = threading.Thread(target=write)
        writer.start()
        seen = []
        try:
            while len(seen) < 25 or len(set(seen)) < 12:  # the test's own time limit ends it
                try:
                    data = client.get(sweep.id).load()
                except UnavailableError:
                    continue
                values = {*data.a.values.tolist(), *data.b.values.reshape(-1).tolist(), data.c.item()}
                assert len(values) == 1
                seen.append(values.pop())
        finally:
            stop.set()
            writer.join()
    assert seen == sorted(seen)


READS = {
    "a list": lambda file: file["a"][np.arange(0, 20_000, 7)],
    "a lazy list": lambda file: file.open()["a"][np.arange(0, 20_000, 7)].values,
    "texts": lambda file: file["t"][:],
    "lazy texts": lambda file: file.open()["t"].values,
    "long texts": lambda file: file["long"][:],
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("is_gone", [False, True], ids=["kept", "gone"])
def test_a_read_in_several_requests_is_of_one_moment(client, monkeypatch, read, is_gone):
    """All of the sweep is written over between two of them; when the first moment is gone, it is of a later one."""
    monkeypatch.setattr(arrays, "TEXTS", 8)
    monkeypatch.setattr(routes.arrays, "TEXT_FORM_BYTES", 1000)
    variables = {"a": ("i8", "x"), "t": ("string", "y"), "long": ("string", "z")}
    with client.sweep("over", dims={"x": 20_000, "y": 20, "z": 4}, variables=variables) as sweep:

        def write(n: int) -> None:
            sweep.write(a=np.full(20_000, n), t=[str(n)] * 20, long=[str(n) * 600] * 4)
            sweep.flush()

        write(1)
        requests = []

        def counted(real, *args):
            values = real(*args)
            requests.append(1)
            if len(requests) == 1:
                write(2)
                if is_gone:
                    raise ConflictError("cannot be read as of block 1 any more", code="illegal_state")
            return values

        file = client.get(sweep.id)
        with monkeypatch.context() as patched:
            for name in ("_read_raw", "_read_text"):
                patched.setattr(arrays, name, functools.partial(counted, getattr(arrays, name)))
            values = READS[read](file)
        whole = file["long" if "long" in read else "t" if "text" in read else "a"]
        assert {str(value)[0] for value in values} == {"2" if is_gone else "1"}
        assert {str(value)[0] for value in whole[:]} == {"2"}
        assert len(requests) > 1


def test_a_sweep_too_fast_to_be_read_in_parts_says_so(client, monkeypatch):
    """Rather than giving parts of several moments."""
    with client.sweep("fast", dims={"x": 20_000}, variables={"a": ("i8", "x")}) as sweep:
        sweep.write(a=np.ones(20_000, int))

        def gone(*_):
            raise ConflictError("cannot be read as of block 1 any more", code="illegal_state")

        monkeypatch.setattr(arrays, "_read_raw", gone)
        with pytest.raises(UnavailableError, match="read less"):
            client.get(sweep.id)["a"][np.arange(0, 20_000, 7)]
