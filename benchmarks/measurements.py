"""The timed loops, one per workload, the same for every side.

All run inside a driver process. The clock covers the calls into the side's client and nothing else: making the data,
opening handles and comparing what came back with what was stored stay outside.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.peer import ArrayHandle, Peer
from benchmarks.workloads import (
    FILE_ARRAYS,
    PIECE,
    Selection,
    Stored,
    array_of,
    box_selections,
    holds,
    metadata_of,
)

__all__ = [
    "Figures",
    "WrongAnswerError",
    "append_all_rows",
    "append_rows",
    "pull_slabs",
    "read_boxes",
    "read_pieces",
    "read_pieces_together",
    "read_strided",
    "read_whole",
    "save_array",
    "save_files",
]

Figures: TypeAlias = dict[str, float]
"""Figure name, with its unit as the ending (`median_ms`, `mb_per_s`), to value. MB are 10^6 bytes."""

Read: TypeAlias = tuple[Stored, ArrayHandle, Selection]


class WrongAnswerError(AssertionError):
    """A side returned numbers that are not the ones it was given."""


def save_files(peer: Peer, *, count: int, points: int, seed: int) -> tuple[Figures, list[Stored]]:
    """W1: `count` files one after the other. Returns one array of each file besides the figures."""
    stored = []
    seconds = []
    for number in range(seed * count, (seed + 1) * count):
        arrays = {name: array_of((points,), 3 * number + k) for k, name in enumerate(FILE_ARRAYS)}
        metadata = metadata_of(number)
        start = perf_counter()
        file = peer.save_file(f"file-{number}", arrays, metadata)
        seconds.append(perf_counter() - start)
        stored.append(Stored(f"{file}/{FILE_ARRAYS[0]}", (points,), 3 * number))
    return {"files_per_s": count / sum(seconds), **_latency(seconds)}, stored


def save_array(peer: Peer, *, shape: tuple[int, ...], seed: int) -> tuple[Figures, Stored]:
    """W2: one large array, until the client says it is saved."""
    data = array_of(shape, seed)
    start = perf_counter()
    path = peer.save_array(f"array-{seed}", data)
    seconds = perf_counter() - start
    return {"mb_per_s": data.nbytes / seconds / 1e6, "seconds": seconds}, Stored(path, shape, seed)


def append_rows(peer: Peer, *, count: int, width: int, seed: int) -> Figures:
    """W6: rows one after the other, each durable before the next."""
    data = array_of((count, width), seed)
    rows = peer.begin_rows(f"rows-{seed}", width)
    rows.append(data[0])
    seconds = []
    for row in data[1:]:
        start = perf_counter()
        rows.append(row)
        seconds.append(perf_counter() - start)
    if not np.array_equal(rows.read(), data):
        raise WrongAnswerError("the rows are not those that were appended")
    return {"rows_per_s": (count - 1) / sum(seconds), **_latency(seconds)}


def append_all_rows(peer: Peer, *, count: int, width: int, seed: int) -> Figures:
    """W6 in the side's fastest way, all durable at the end."""
    data = array_of((count, width), seed)
    rows = peer.begin_rows(f"all-rows-{seed}", width)
    rows.append(data[0])
    start = perf_counter()
    rows.append_all(list(data[1:]))
    seconds = perf_counter() - start
    if not np.array_equal(rows.read(), data):
        raise WrongAnswerError("the rows are not those that were appended")
    return {"rows_per_s": (count - 1) / seconds}


def read_whole(peer: Peer, stored: Stored) -> Figures:
    """W3: everything into one NumPy array, the memory for it included."""
    handle = peer.open_array(stored.path)
    start = perf_counter()
    data = handle[...]
    seconds = perf_counter() - start
    for row in range(0, stored.shape[0], 50):
        slab: Selection = (slice(row, row + 50), *(slice(None) for _ in stored.shape[1:]))
        _compare(data[slab], stored, slab)
    return {"mb_per_s": data.nbytes / seconds / 1e6, "seconds": seconds}


def read_boxes(peer: Peer, stored: Stored, *, count: int, seed: int) -> Figures:
    """W4: random boxes, one after the other; the first read of the handle is not timed."""
    handle = peer.open_array(stored.path)
    handle[next(box_selections(stored, 1, seed + 1))]
    return _latency(_time_reads((stored, handle, box) for box in box_selections(stored, count, seed)))


def read_strided(peer: Peer, stored: Stored, *, stride: int, count: int) -> Figures:
    """W5: every `stride`-th number of two axes, one index of the third."""
    handle = peer.open_array(stored.path)
    selection: Selection = (slice(None, None, stride), slice(None, None, stride), 0)
    return _latency(_time_reads([(stored, handle, selection)] * count))


def read_pieces(peer: Peer, stored: Sequence[Stored], *, count: int, seed: int) -> Figures:
    """X2: small reads of small arrays in turn, one after the other."""
    return _latency(_time_reads(_piece_reads(peer, stored, count, seed)))


def read_pieces_together(peers: Sequence[Peer], stored: Sequence[Stored], *, count: int, seed: int) -> Figures:
    """W8: all clients at once, a thread and a connection each; the rate runs from the first start to the last end."""
    reads = [list(_piece_reads(peer, stored, count, seed + number)) for number, peer in enumerate(peers)]
    ready = threading.Barrier(len(peers))

    def one_client(own: list[Read]) -> tuple[float, list[float], float]:
        ready.wait()
        start = perf_counter()
        seconds = _time_reads(own)
        return start, seconds, perf_counter()

    with ThreadPoolExecutor(len(peers)) as threads:
        starts, seconds, ends = zip(*threads.map(one_client, reads), strict=True)
    elapsed = max(ends) - min(starts)
    return {"requests_per_s": count * len(peers) / elapsed, **_latency([each for own in seconds for each in own])}


def pull_slabs(peer: Peer, stored: Stored, *, rows: int, stopped: Callable[[], bool]) -> Figures:
    """X2, the other client: slabs of `rows` again and again until `stopped`, at least one."""
    handle = peer.open_array(stored.path)
    pulled = 0
    start = perf_counter()
    while not pulled or not stopped():
        first = pulled * rows % stored.shape[0]
        slab = handle[(slice(first, first + rows), slice(None), slice(None))]
        pulled += 1
    return {"slabs": pulled, "slab_mb_per_s": pulled * slab.nbytes / (perf_counter() - start) / 1e6}


def _piece_reads(peer: Peer, stored: Sequence[Stored], count: int, seed: int) -> Iterator[Read]:
    """Pieces at random places of the arrays in turn; every handle is opened and read once before the first."""
    handles = [peer.open_array(array.path) for array in stored]
    for array, handle in zip(stored, handles, strict=True):
        _compare(handle[(slice(0, PIECE),)], array, (slice(0, PIECE),))
    places = np.random.default_rng(seed)
    for number in range(count):
        array, handle = stored[number % len(stored)], handles[number % len(stored)]
        first = int(places.integers(array.shape[0] - PIECE))
        yield array, handle, (slice(first, first + PIECE),)


def _time_reads(reads: Iterator[Read] | Sequence[Read]) -> list[float]:
    """Seconds of each read; each answer is compared after its clock has stopped."""
    seconds = []
    for stored, handle, selection in reads:
        start = perf_counter()
        data = handle[selection]
        seconds.append(perf_counter() - start)
        _compare(data, stored, selection)
    return seconds


def _compare(data: NDArray[np.float64], stored: Stored, selection: Selection) -> None:
    if not holds(stored, selection, data):
        raise WrongAnswerError(f"{stored.path}{selection} does not hold what was saved")


def _latency(seconds: Any) -> Figures:
    median, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 99])
    return {"median_ms": float(median), "p99_ms": float(p99)}
