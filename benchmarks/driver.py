"""The process that holds a side's client and times it: `python -m benchmarks.driver PEER`.

One JSON command a line on stdin, `{"do": …, "with": {…}}`; one JSON answer a line on stdout, `{"ok": …}` or
`{"error": traceback}`. Whatever the libraries print goes to stderr. It imports nothing but numpy and its peer, since it
also runs in Tiled's environment.
"""

import importlib
import json
import os
import queue
import sys
import threading
import traceback
from dataclasses import asdict
from typing import Any

from benchmarks import measurements
from benchmarks.asking import ask_family
from benchmarks.peer import Options, Peer
from benchmarks.questions import Truth
from benchmarks.workloads import Stored, array_of

PEERS = {
    "aq": "benchmarks.aq_peer",
    "tiled": "benchmarks.tiled_peer",
    "zarr": "benchmarks.zarr_floor",
    "route": "benchmarks.route_floor",
    "tiled-catalogue": "benchmarks.tiled_asker",
}
"""Modules with a function `connect(options)` that gives a Peer, the last a TiledAsker for W7; imported by name because each
needs its own packages."""


class Driver:
    """The commands, by name. `seed` makes a turn's data and places its own, the same on every side."""

    def __init__(self, peer: str, commands: "queue.SimpleQueue[str]") -> None:
        self._connect = importlib.import_module(PEERS[peer]).connect
        self._commands = commands
        self._peers: list[Peer] = []
        self._options: Options = {}

    def connect(self, options: Options) -> None:
        self._options = options
        self._clients(1)

    def warm_up(self) -> None:
        """Save and read something small, so that imports on first use and first connections are never timed."""
        peer = self._clients(1)[0]
        file = peer.save_file("warm-up", {"x": array_of((10,), 0)}, {"warm": "up"})
        peer.open_array(f"{file}/x")[(slice(2, 5),)]

    def save_files(self, count: int, points: int, seed: int) -> dict[str, Any]:
        figures, stored = measurements.save_files(self._clients(1)[0], count=count, points=points, seed=seed)
        return {"figures": figures, "stored": [array.to_json() for array in stored]}

    def save_array(self, shape: list[int], seed: int) -> dict[str, Any]:
        figures, stored = measurements.save_array(self._clients(1)[0], shape=tuple(shape), seed=seed)
        return {"figures": figures, "stored": stored.to_json()}

    def discard_array(self, path: str) -> None:
        self._clients(1)[0].discard_array(path)

    def read_whole(self, array: dict[str, Any]) -> measurements.Figures:
        return measurements.read_whole(self._clients(1)[0], Stored.from_json(array))

    def read_boxes(self, array: dict[str, Any], count: int, seed: int) -> measurements.Figures:
        return measurements.read_boxes(self._clients(1)[0], Stored.from_json(array), count=count, seed=seed)

    def read_strided(self, array: dict[str, Any], stride: int, count: int) -> measurements.Figures:
        return measurements.read_strided(self._clients(1)[0], Stored.from_json(array), stride=stride, count=count)

    def read_pieces(self, arrays: list[dict[str, Any]], count: int, seed: int, clients: int) -> measurements.Figures:
        stored = [Stored.from_json(array) for array in arrays]
        peers = self._clients(clients)
        if clients == 1:
            return measurements.read_pieces(peers[0], stored, count=count, seed=seed)
        return measurements.read_pieces_together(peers, stored, count=count, seed=seed)

    def pull_slabs(self, array: dict[str, Any], rows: int) -> measurements.Figures:
        """Until the next command arrives."""
        peer = self._clients(1)[0]
        return measurements.pull_slabs(peer, Stored.from_json(array), rows=rows, stopped=self._another_waits)

    def append_rows(self, count: int, width: int, seed: int, at_once: bool) -> measurements.Figures:
        loop = measurements.append_all_rows if at_once else measurements.append_rows
        return loop(self._clients(1)[0], count=count, width=width, seed=seed)

    def sweep(self, loop: str, **sizes: int) -> measurements.Figures:
        """One of aq-data's own loops."""
        figures: measurements.Figures = getattr(importlib.import_module("benchmarks.aq_sweeps"), loop)(
            self._options["url"], **sizes
        )
        return figures

    def load_catalogue(self, count: int) -> None:
        self._asker().load(count)

    def ask_family(self, side: str, name: str, count: int, values: int, repeats: int) -> dict[str, Any]:
        return asdict(ask_family(self._asker(), side, name, Truth(count), values, repeats))

    def _asker(self) -> Any:
        return self._clients(1)[0]

    def rest(self) -> None:
        """Nothing: ends `pull_slabs`."""

    def _another_waits(self) -> bool:
        return not self._commands.empty()

    def _clients(self, count: int) -> list[Peer]:
        while len(self._peers) < count:
            self._peers.append(self._connect(self._options))
        return self._peers[:count]


def _read_commands(commands: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        commands.put(line)
    commands.put("")


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read_commands, args=(commands,), daemon=True).start()
    driver = Driver(sys.argv[1], commands)
    while line := commands.get():
        command = json.loads(line)
        try:
            answer = {"ok": getattr(driver, command["do"])(**command["with"])}
        except Exception:  # noqa: BLE001  (told to the other process)
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
