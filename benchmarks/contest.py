"""The workloads, and the order in which the sides take their turns at them."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import sleep

from benchmarks import machine
from benchmarks.driver_process import DriverError
from benchmarks.measurements import Figures
from benchmarks.server_process import ServerFailedError
from benchmarks.sides import Side

__all__ = ["WORKLOADS", "Results", "Workload", "hold"]

_LOG = logging.getLogger(__name__)
_SETTLE = 1.0
"""Seconds a server is left alone before its memory is read, or a puller is let run before it is measured against."""


@dataclass(frozen=True)
class Workload:
    """One row of the contest: who takes part, and what one turn does."""

    title: str
    sides: tuple[str, ...]
    turn: Callable[[Side, int], Figures]
    """One turn of one side in the round of that number (from 1), which seeds data and places."""
    shown: tuple[str, ...]
    """The figures the table shows, the one that counts first."""


@dataclass
class Results:
    """Figures of every turn, `turns[workload][side][round]`, and what failed."""

    turns: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def hold(names: Sequence[str], sides: dict[str, Side], rounds: int) -> Results:
    """All rounds of one workload, then the next, in the order of `WORKLOADS`.

    In each round every side has one turn. A side that fails sits out the rest of that workload.
    """
    results = Results()
    for name, workload in WORKLOADS.items():
        if name not in names:
            continue
        playing = [side for side in workload.sides if side in sides]
        results.turns[name] = {side: [] for side in playing}
        for number in range(1, rounds + 1):
            for side in tuple(playing):
                try:
                    figures = workload.turn(sides[side], number)
                except (DriverError, ServerFailedError) as error:
                    _LOG.exception("%s %s failed", name, side)
                    results.errors.append(f"{name} {side}, round {number}: {error}")
                    sides[side].stop_drivers()
                    playing.remove(side)
                    continue
                figures = {key: value for key, value in figures.items() if math.isfinite(value)}
                results.turns[name][side].append(figures)
                shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
                _LOG.info("%-6s round %d %-11s %s", name, number, side, shown)
                _write_back()
    return results


def _write_back() -> None:
    """Dirty pages reach the disk now, so that nobody's turn is slowed by what another side left unwritten."""
    os.sync()


def _start(side: Side, _number: int) -> Figures:
    server = side.new_server()
    try:
        seconds = server.start()
        sleep(_SETTLE)
        return {"start_s": seconds, "idle_mb": machine.resident_megabytes(server.pid)}
    finally:
        server.stop()


def _save_files(side: Side, number: int) -> Figures:
    return side.save_files(seed=number)


def _save_array(side: Side, number: int) -> Figures:
    return side.save_array(seed=number)


def _read_whole(side: Side, _number: int) -> Figures:
    figures: Figures = side.driver().ask("read_whole", array=side.large_array())
    return figures


def _read_boxes(side: Side, number: int) -> Figures:
    array = side.large_array()
    figures: Figures = side.driver().ask("read_boxes", array=array, count=side.scale.boxes, seed=number)
    return figures


def _read_strided(side: Side, _number: int) -> Figures:
    array, scale = side.large_array(), side.scale
    figures: Figures = side.driver().ask("read_strided", array=array, stride=scale.stride, count=scale.strided_reads)
    return figures


def _read_together(side: Side, number: int) -> Figures:
    figures: Figures = side.driver().ask(
        "read_pieces",
        arrays=side.small_arrays(),
        count=side.scale.pieces,
        seed=number,
        clients=side.scale.clients,
    )
    return figures


def _read_disturbed(side: Side, number: int) -> Figures:
    """Small reads alone, then the same while the second driver pulls slabs without pause."""
    small = {"arrays": side.small_arrays(), "count": side.scale.lone_reads, "seed": number, "clients": 1}
    large = side.large_array()
    puller = side.driver(1)
    alone: Figures = side.driver().ask("read_pieces", **small)
    puller.tell("pull_slabs", array=large, rows=side.scale.slab_rows)
    sleep(_SETTLE)
    disturbed: Figures = side.driver().ask("read_pieces", **small)
    puller.tell("rest")
    try:
        pulled: Figures = puller.answer()
    finally:
        puller.answer()
    return {
        "p99_ratio": disturbed["p99_ms"] / alone["p99_ms"],
        "alone_median_ms": alone["median_ms"],
        "alone_p99_ms": alone["p99_ms"],
        **disturbed,
        **pulled,
    }


def _append_rows(side: Side, number: int) -> Figures:
    scale = side.scale
    figures: Figures = side.driver().ask("append_rows", count=scale.rows, width=scale.points, seed=number, at_once=False)
    return figures


def _append_all(side: Side, number: int) -> Figures:
    """The peer has no faster way: a part of its rows is enough to know its rate."""
    rows = side.scale.rows * 10 if side.name.startswith("aq") else max(2, side.scale.rows // 5)
    figures: Figures = side.driver().ask("append_rows", count=rows, width=side.scale.points, seed=number, at_once=True)
    return figures


def _sweep(loop: str, **sizes: str) -> Callable[[Side, int], Figures]:
    """A turn of one of aq-data's own loops; `sizes` name fields of the scale."""

    def turn(side: Side, _number: int) -> Figures:
        figures: Figures = side.driver().ask("sweep", loop=loop, **{k: getattr(side.scale, f) for k, f in sizes.items()})
        return figures

    return turn


def _large_block(side: Side, _number: int) -> Figures:
    """The size of W2's array as one block, and what it adds to the server's memory at its peak."""
    rows, columns, depth = side.scale.cube
    driver, pid = side.driver(), side.server.pid
    before = machine.resident_megabytes(pid)
    machine.forget_peak(pid)
    figures: Figures = driver.ask("sweep", loop="large_block", rows=rows, width=columns * depth)
    return {**figures, "growth_mb": machine.peak_megabytes(pid) - before}


def _preview(side: Side, _number: int) -> Figures:
    figures: Figures = side.driver().ask("sweep", loop="preview", count=side.scale.preview_points, pixels=1000)
    return figures


def _count_requests(side: Side, _number: int) -> Figures:
    return side.count_requests()


def _serve_whole(side: Side, number: int) -> Figures:
    """Memory of a server started anew on the same data, from after one small read to the peak of serving the whole."""
    array = side.large_array()
    side.server.stop()
    side.server.start()
    driver = side.new_driver()
    try:
        driver.ask("read_boxes", array=array, count=1, seed=number)
        sleep(_SETTLE)
        before = machine.resident_megabytes(side.server.pid)
        machine.forget_peak(side.server.pid)
        driver.ask("read_whole", array=array)
        peak = machine.peak_megabytes(side.server.pid)
    finally:
        driver.stop()
    return {"growth_mb": peak - before, "before_mb": before, "peak_mb": peak}


_DEPLOYMENTS = ("aq", "aq-gcs", "aq-s3")
"""Embedded, and production on two kinds of bucket."""
_WITH_TILED = (*_DEPLOYMENTS, "tiled")
_ARRAY_SIDES = (*_DEPLOYMENTS, "tiled", "tiled-tuned", "zarr")

WORKLOADS = {
    "start": Workload("start to first answer, empty data folder", ("aq", "tiled"), _start, ("start_s", "idle_mb")),
    "W1": Workload("save small files one by one", _WITH_TILED, _save_files, ("files_per_s", "median_ms", "p99_ms")),
    "W2": Workload("save one large array", _ARRAY_SIDES, _save_array, ("mb_per_s", "seconds")),
    "W3": Workload("read it whole", _ARRAY_SIDES, _read_whole, ("mb_per_s", "seconds")),
    "W4": Workload("read [i:i+10, j:j+10, :]", (*_ARRAY_SIDES, "route"), _read_boxes, ("median_ms", "p99_ms")),
    "W5": Workload("read [::100, ::100, 0]", _ARRAY_SIDES, _read_strided, ("median_ms",)),
    "W6": Workload("append rows, each durable", _WITH_TILED, _append_rows, ("rows_per_s", "median_ms", "p99_ms")),
    "W6-writer": Workload("append rows through the writer", _WITH_TILED, _append_all, ("rows_per_s",)),
    "points": Workload(
        "scalars point by point",
        ("aq",),
        _sweep("points", count="sweep_points"),
        ("points_per_s", "call_us", "durable_points_per_s", "finish_s"),
    ),
    "far": Workload(
        "a row at 100,000 against one at 1,000",
        ("aq",),
        _sweep("far_rows", far="far_row", window="window", width="points"),
        ("cost_ratio", "near_ms", "far_ms", "finish_s"),
    ),
    "polled": Workload(
        "rows beside a reader every 50 ms",
        ("aq",),
        _sweep("polled", count="window", width="points"),
        ("kept", "alone_ms", "beside_ms", "read_ms"),
    ),
    "events": Workload("an event at a follower", ("aq",), _sweep("events", count="pieces"), ("median_ms", "p99_ms")),
    "block": Workload("one block of 640 MB", ("aq",), _large_block, ("growth_mb", "mb_per_s", "finish_s")),
    "preview": Workload("preview of 10^7 points", ("aq",), _preview, ("seconds", "first_s")),
    "W8": Workload(
        "small reads of parallel clients",
        ("aq", "aq-gcs", "aq-gcs-two", "tiled"),
        _read_together,
        ("requests_per_s", "median_ms", "p99_ms"),
    ),
    "bucket": Workload(
        "requests to the bucket, and 20 ms at each",
        ("aq-gcs", "aq-s3"),
        _count_requests,
        (
            "save_requests",
            "slice_requests",
            "change_requests",
            "row_requests",
            "save_at_20_ms",
            "slice_at_20_ms",
            "change_at_20_ms",
        ),
    ),
    "X2": Workload(
        "small reads while another pulls slabs",
        ("aq", "tiled-tuned"),
        _read_disturbed,
        ("p99_ratio", "median_ms", "p99_ms", "alone_median_ms", "alone_p99_ms", "slab_mb_per_s"),
    ),
    "growth": Workload(
        "server memory while serving it whole", ("aq", "tiled"), _serve_whole, ("growth_mb", "before_mb", "peak_mb")
    ),
}
"""By id. `growth` restarts servers under the feet of connected drivers, so it stays the last."""
