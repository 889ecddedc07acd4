"""What the promise tests send: DataFiles of mixed sizes that can be made again from a number, and checked against it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from services.deployment import PATIENCE, PRODUCTION, at, blobs, environment, open_zarr

import aq_data
from aq_data.models.datafile import make_id
from aq_data.models.snapshots import SNAPSHOT_BYTES

KINDS = ("note", "small", "files", "small", "large", "small", "note", "small")
"""Metadata only; 3 x 1001 numbers; a small array with files; 5 MB in several chunks. The notes have large instruments."""


@dataclass(frozen=True)
class Shipment:
    """One DataFile to save, made from `seed` and `number` alone, so that nothing has to be remembered to check it."""

    seed: int
    number: int
    kind: str

    @classmethod
    def make(cls, seed: int, number: int) -> Shipment:
        return cls(seed, number, KINDS[number % len(KINDS)])

    @cached_property
    def id(self) -> str:
        return make_id(time.time_ns() // 1_000_000, np.random.default_rng([self.seed, self.number]).bytes(10))

    def content(self) -> dict[str, Any]:
        """Arguments of `save`."""
        random = np.random.default_rng([self.seed, self.number, 1])
        saved: dict[str, Any] = {
            "name": f"{self.kind} {self.number}",
            "tags": [self.kind],
            "metadata": {"number": self.number, "values": random.random(5).tolist()},
        }
        if self.kind == "note":  # one of two snapshots, which are stored once
            settings = {f"setting {i}": {"value": i / 7, "unit": "mV"} for i in range(600)}
            saved["instruments"] = {"vna": {"number": self.number % 16 // 8, "settings": settings}}
        if self.kind in ("small", "files"):
            saved["dataset"] = {"iq": (("rep", "f"), random.random((3, 1001)), {"units": "V"}), "f": ("f", np.arange(1001))}
        if self.kind == "files":
            saved["files"] = {"raw ü.bin": random.bytes(200_000), "empty": b""}
        if self.kind == "large":
            saved["dataset"] = {"z": (("y", "x"), random.random((640, 1024)))}
        return saved

    def save(self, client: aq_data.Client) -> aq_data.DataFile:
        return client.save(**self.content(), id=self.id)

    def assert_complete(self, file: aq_data.DataFile) -> None:
        """Everything that was sent is there, bit for bit."""
        sent = self.content()
        assert (file.id, file.state, file.name, file.tags) == (self.id, "complete", sent["name"], sent["tags"])
        assert file.metadata == sent["metadata"]
        assert file.instruments == sent.get("instruments", {})
        arrays = sent.get("dataset", {})
        assert sorted(file) == sorted(arrays)
        for name, (dims, values, *_) in arrays.items():
            assert file[name].dims == ((dims,) if isinstance(dims, str) else dims)
            assert file[name][...].tobytes() == values.tobytes(), f"{name} of {sent['name']}"
        files = sent.get("files", {})
        assert sorted(file.files) == sorted(files)
        for name, content in files.items():
            assert file.read_file(name) == content, f"{name} of {sent['name']}"

    def assert_opens_as_zarr(self, path: str) -> None:
        """A reader without aq-data sees it whole: metadata, arrays, values."""
        sent = self.content()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zarr, about consolidated metadata in version 3
            plain = open_zarr(path, chunks=None)
            assert plain.attrs["aq_data"]["document"]["metadata"] == sent["metadata"]
            for name, (_, values, *_) in sent.get("dataset", {}).items():
                assert plain[name].values.tobytes() == values.tobytes()


def operate(data: Path, *words: str) -> list[dict[str, Any]]:
    """Lines of an operator's command (`verify`, `gc`…) on a folder; its exit status, 0 or 3, must agree with `verify`."""
    command = [sys.executable, "-m", "aq_server", *words, "--data", str(data), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120 * PATIENCE, env={**os.environ, **environment(data)}
    )
    assert done.returncode in (0, 3), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def unexplained(data: Path, client: aq_data.Client) -> list[str]:
    """Blobs, and empty folders where there are folders, that no document accounts for."""
    root = blobs(data)
    known: set[Path] = {root / ".ready"}
    for file in client.search(limit=None, include_deleted=True):
        document = file.to_json()
        group = at(file.path)
        instruments = msgspec.json.encode(document["instruments"])
        if len(instruments) >= SNAPSHOT_BYTES:
            known.add(root / "snapshots" / f"{hashlib.sha256(instruments).hexdigest()}.json")
        if file.state == "deleted":
            known |= set((root / file.id).glob("tombstone-*"))
            continue
        known.add(group / "zarr.json")
        known |= {group.parent / "files" / info["key"] for info in document["files"]}
        for info in document["arrays"]:
            known.add(group / info["name"] / "zarr.json")
            grid = [-(-n // c) for n, c in zip(info["shape"], info["chunks"], strict=True)]
            known |= {group.joinpath(info["name"], "c", *map(str, index)) for index in np.ndindex(*grid)}
    found = [path for path in root.rglob("*") if path.is_file() or not (PRODUCTION or any(path.iterdir()))]
    return [str(path.relative_to(root)) for path in found if path not in known] + [
        f"missing: {path.relative_to(root)}" for path in known if path.name != ".ready" and not path.exists()
    ]
