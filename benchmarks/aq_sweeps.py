"""What no peer can be timed at: the sweep writer's call, its cost far into a sweep, readers beside it, events, previews."""

from __future__ import annotations

import threading
import time
from time import perf_counter

import numpy as np

import aq_data
from benchmarks.measurements import Figures, WrongAnswerError
from benchmarks.workloads import array_of

__all__ = ["events", "far_rows", "large_block", "points", "polled", "preview"]


def _rows(client: aq_data.Client, width: int) -> aq_data.Sweep:
    return client.sweep("rows", dims={"row": None, "column": width}, variables={"y": ("f8", ("row", "column"))})


def points(url: str, count: int) -> Figures:
    """Scalars one by one through the writer: what the call costs, how many are accepted per second, and the finish."""
    with aq_data.connect(url) as client:
        sweep = client.sweep("points", dims={"x": None}, variables={"y": ("f8", "x")})
        seconds = np.empty(count)
        start = perf_counter()
        for i in range(count):
            before = perf_counter()
            sweep.append(y=1.5 * i, x=float(i), dim="x")
            seconds[i] = perf_counter() - before
        accepted = perf_counter() - start
        sweep.flush()
        flushed = perf_counter() - start
        before = perf_counter()
        sweep.finish()
        finish = perf_counter() - before
        values = client.get(sweep.id)["y"][...]
        if not np.array_equal(values, 1.5 * np.arange(count)):
            raise WrongAnswerError("the points are not those that were written")
    call = np.percentile(seconds * 1e6, [50, 99])
    return {
        "points_per_s": count / accepted,
        "durable_points_per_s": count / flushed,
        "call_us": float(call[0]),
        "call_p99_us": float(call[1]),
        "finish_s": finish,
    }


def _one_by_one(sweep: aq_data.Sweep, rows: np.ndarray, count: int) -> list[float]:
    seconds = []
    for k in range(count):
        before = perf_counter()
        sweep.append(y=rows[k % len(rows)])
        sweep.flush()
        seconds.append(perf_counter() - before)
    return seconds


def far_rows(url: str, far: int, window: int, width: int) -> Figures:
    """What an acknowledged row costs near row 1,000 and near row `far`; two sweeps take turns, so that drift hits both."""
    rows = array_of((64, width), 7)
    with aq_data.connect(url) as client:
        near, distant = _rows(client, width), _rows(client, width)
        for sweep, start in ((near, 1000), (distant, far)):
            for k in range(start):
                sweep.append(y=rows[k % len(rows)])
            sweep.flush()
        first: list[float] = []
        last: list[float] = []
        for _ in range(10):
            first += _one_by_one(near, rows, window // 10)
            last += _one_by_one(distant, rows, window // 10)
        near.finish()
        before = perf_counter()
        distant.finish()
        finish = perf_counter() - before
    early, late = float(np.median(first)) * 1e3, float(np.median(last)) * 1e3
    return {"cost_ratio": late / early, "near_ms": early, "far_ms": late, "finish_s": finish}


def polled(url: str, count: int, width: int) -> Figures:
    """Acknowledged rows per second alone, and while a reader takes a slice every 50 ms; in turns, within one run."""
    rows = array_of((64, width), 8)
    alone: list[float] = []
    beside: list[float] = []
    with aq_data.connect(url) as client, aq_data.connect(url) as other:
        sweep = _rows(client, width)
        _one_by_one(sweep, rows, 200)
        stopped, reading = threading.Event(), threading.Event()
        reads = []

        def poll() -> None:
            while not stopped.is_set():
                if reading.is_set():
                    before = perf_counter()
                    file = other.get(sweep.id)
                    file["y"][-10:, ::10]
                    reads.append(perf_counter() - before)
                time.sleep(0.05)

        thread = threading.Thread(target=poll)
        thread.start()
        try:
            for _ in range(10):
                reading.clear()
                alone += _one_by_one(sweep, rows, count // 10)
                reading.set()
                beside += _one_by_one(sweep, rows, count // 10)
        finally:
            stopped.set()
            thread.join()
        sweep.finish()
    return {
        "kept": float(np.sum(alone) / np.sum(beside)),
        "kept_median": float(np.median(alone) / np.median(beside)),
        "alone_ms": float(np.median(alone) * 1e3),
        "beside_ms": float(np.median(beside) * 1e3),
        "read_ms": float(np.median(reads) * 1e3),
    }


def events(url: str, count: int) -> Figures:
    """From the beginning of the writer's call to the event at a follower in another thread."""
    with aq_data.connect(url) as client, aq_data.connect(url) as other:
        sweep = client.sweep("events", dims={"x": None}, variables={"y": ("f8", "x")})
        came: list[float] = []

        def follow() -> None:
            came.extend(perf_counter() for event in other.follow(sweep.id) if event.kind == "block")

        thread = threading.Thread(target=follow)
        thread.start()
        time.sleep(0.5)
        wrote = []
        for i in range(count):
            wrote.append(perf_counter())
            sweep.append(y=float(i), x=float(i), dim="x")
            sweep.flush()
            time.sleep(0.02)
        sweep.finish()
        thread.join()
    if len(came) != count:
        raise WrongAnswerError(f"{len(came)} events of {count} blocks")
    median, p99 = np.percentile((np.array(came) - np.array(wrote)) * 1e3, [50, 99])
    return {"median_ms": float(median), "p99_ms": float(p99)}


def large_block(url: str, rows: int, width: int) -> Figures:
    """One block of `rows` x `width` numbers, from the call until it is durable; then the finish."""
    data = array_of((rows, width), 10)
    with aq_data.connect(url) as client:
        sweep = _rows(client, width)
        before = perf_counter()
        sweep.append(y=data)
        sweep.flush()
        seconds = perf_counter() - before
        before = perf_counter()
        sweep.finish()
        finish = perf_counter() - before
        if not np.array_equal(client.get(sweep.id)["y"][::50], data[::50]):
            raise WrongAnswerError("the block is not the one that was written")
    return {"mb_per_s": data.nbytes / seconds / 1e6, "finish_s": finish}


def preview(url: str, count: int, pixels: int) -> Figures:
    """`count` points as the minimum and maximum of each of `pixels` bins."""
    data = array_of((count,), 9)
    with aq_data.connect(url) as client:
        array = client.save({"y": data})["y"]
        seconds = []
        for _ in range(7):
            before = perf_counter()
            shown = array.preview(pixels=pixels)
            seconds.append(perf_counter() - before)
        step = shown.steps[0]
        if not np.array_equal(shown.values[0], [data[:step].min(), data[:step].max()]):
            raise WrongAnswerError("the preview is not that of the data")
    return {"seconds": float(np.median(seconds)), "first_s": seconds[0]}
