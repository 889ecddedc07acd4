"""What operations cost in requests to the bucket, and how long they take when each request waits 20 ms more."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import aq_data
from benchmarks.clusters import Cluster
from benchmarks.measurements import Figures
from benchmarks.server_process import ServerProcess
from benchmarks.workloads import array_of, metadata_of

__all__ = ["LATENCY", "count_requests"]

LATENCY = 0.02
"""Seconds, of each request."""
_TIMES = 15


def count_requests(cluster: Cluster, folder: Path, points: int, rows: int) -> Figures:
    """Of one operation each; `*_at_20_ms` are medians of several, `row_requests` the mean of `rows` appended rows."""
    with cluster.behind_proxy() as (proxied, proxy):
        server = ServerProcess(proxied.server, folder)
        server.start()
        try:
            with aq_data.connect(server.url) as client:
                return _figures(client, proxy, points, rows)
        finally:
            server.stop()


def _figures(client: aq_data.Client, proxy: Any, points: int, rows: int) -> Figures:
    arrays = {name: array_of((points,), seed) for seed, name in enumerate(("current", "phase", "power"))}

    def save() -> None:
        client.save(arrays, name="W1", metadata=metadata_of(1))

    save()
    file = client.save(arrays, name="W1", metadata=metadata_of(1))
    array = file["phase"]

    def read() -> None:
        array[10:110]

    read()
    operations = {"save": save, "slice": read, "change": lambda: client.update(file.id, {"comment": "good"})}
    figures: Figures = {}
    for name, operation in operations.items():
        with proxy.recording() as made:
            operation()
        figures[f"{name}_requests"] = len(made)
    with proxy.recording() as made:
        sweep = client.sweep("W6", dims={"row": None, "column": points}, variables={"y": ("float64", ("row", "column"))})
        for _ in range(rows):
            sweep.append(y=arrays["phase"])
        sweep.flush()
    figures["row_requests"] = len(made) / rows
    proxy.latency = LATENCY
    for name, operation in operations.items():
        figures[f"{name}_at_20_ms"] = median(_timed(operation) for _ in range(_TIMES))
    proxy.latency = 0.0
    sweep.finish()
    return figures


def _timed(operation: Callable[[], object]) -> float:
    """Milliseconds."""
    start = perf_counter()
    operation()
    return (perf_counter() - start) * 1e3
