"""The constants of the workloads, and data that any process can rebuild from a seed.

Every number is a hash of its flat index, so that a reader can check the slice it got without holding the array.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FULL",
    "SMALL",
    "Scale",
    "Selection",
    "Stored",
    "array_of",
    "box_selections",
    "holds",
    "metadata_of",
    "numbers_at",
]

Selection: TypeAlias = tuple[slice | int, ...]

FILE_ARRAYS = ("current", "phase", "power")
BOX = 10
"""W4 reads `[i:i+BOX, j:j+BOX, :]`."""
PIECE = 100
"""W8 and X2 read this many numbers of a small array."""

_HASH_BLOCK = 1 << 17
"""Numbers hashed at a time: the temporaries (1 MB each) stay in the cache."""


@dataclass(frozen=True)
class Scale:
    """How much of everything; both sides always get the same."""

    files: int
    """W1: DataFiles saved one after the other."""
    points: int
    """W1: length of each of the three arrays of a file."""
    cube: tuple[int, int, int]
    """W2 to W5: shape of the large float64 array."""
    tuned_chunks: tuple[int, int, int]
    """Chunks of `tiled-tuned`."""
    boxes: int
    """W4: random reads in one turn."""
    stride: int
    """W5 reads `[::stride, ::stride, 0]`."""
    strided_reads: int
    """W5: reads in one turn."""
    clients: int
    """W8: clients at the same time."""
    pieces: int
    """W8: reads of each client."""
    lone_reads: int
    """X2: small reads in one turn, undisturbed and again disturbed."""
    slab_rows: int
    """X2: first-axis length of the slabs the other client pulls (250 of the full cube = 80 MB)."""
    rows: int
    """W6: rows appended one by one (and, at once, ten times as many)."""
    sweep_points: int
    """Scalars written point by point through a sweep."""
    far_row: int
    """How far into a sweep the cost of a row is looked at again."""
    window: int
    """Rows timed at each place, and acknowledged rows beside a reader."""
    preview_points: int
    """Points of the array that is previewed."""
    warm_bytes: int
    """Memory touched once before anything is timed, at most (see `machine.warm_memory`)."""


FULL = Scale(
    files=200,
    points=1001,
    cube=(2000, 2000, 20),
    tuned_chunks=(250, 250, 20),
    boxes=200,
    stride=100,
    strided_reads=5,
    clients=8,
    pieces=100,
    lone_reads=200,
    slab_rows=250,
    rows=1000,
    sweep_points=100_000,
    far_row=100_000,
    window=1000,
    preview_points=10_000_000,
    warm_bytes=12 << 30,
)
SMALL = Scale(
    files=5,
    points=301,
    cube=(200, 200, 20),
    tuned_chunks=(50, 50, 20),
    boxes=10,
    stride=100,
    strided_reads=2,
    clients=2,
    pieces=5,
    lone_reads=10,
    slab_rows=50,
    rows=20,
    sweep_points=500,
    far_row=1500,
    window=50,
    preview_points=100_000,
    warm_bytes=256 << 20,
)


@dataclass(frozen=True)
class Stored:
    """An array some side keeps: enough to open it again and to know every number in it."""

    path: str
    """The side's own address of the array."""
    shape: tuple[int, ...]
    seed: int | None
    """None: any numbers of the right shape will do (the bare route keeps nothing)."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        return cls(path=fields["path"], shape=tuple(fields["shape"]), seed=fields["seed"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def numbers_at(flat_index: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """Uniform in [0, 1) with 53 random bits each (splitmix64), so that no codec gains more than the exponents."""
    bits = flat_index * np.uint64(0x9E3779B97F4A7C15)
    bits += np.uint64((seed + 1) * 0xD1342543DE82EF95 % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def array_of(shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """The whole array of that seed, C-ordered."""
    flat = np.empty(math.prod(shape), dtype=np.float64)
    for start in range(0, flat.size, _HASH_BLOCK):
        stop = min(start + _HASH_BLOCK, flat.size)
        flat[start:stop] = numbers_at(np.arange(start, stop, dtype=np.uint64), seed)
    return flat.reshape(shape)


def holds(stored: Stored, selection: Selection, data: NDArray[np.float64]) -> bool:
    """Whether `data` is `array_of(stored.shape, stored.seed)[selection]`; costs no more than the selection."""
    flat: NDArray[np.uint64] = np.zeros((), dtype=np.uint64)
    for axis, (length, part) in enumerate(zip(stored.shape, selection, strict=True)):
        step = math.prod(stored.shape[axis + 1 :])
        flat = np.add.outer(flat, np.arange(length, dtype=np.uint64)[part] * np.uint64(step))
    if stored.seed is None:
        return data.shape == flat.shape
    return np.array_equal(data, numbers_at(flat, stored.seed))


def box_selections(stored: Stored, count: int, seed: int) -> Iterator[Selection]:
    """W4: boxes at random places, the same places for the same seed."""
    places = np.random.default_rng(seed)
    for _ in range(count):
        i, j = (int(places.integers(length - BOX)) for length in stored.shape[:2])
        yield slice(i, i + BOX), slice(j, j + BOX), slice(None)


def metadata_of(seed: int) -> dict[str, Any]:
    """About 10 kB of JSON in the way labs nest it: instruments, their settings, value and unit of each."""
    values = np.random.default_rng(seed)
    instruments = {
        f"source_{number}": {
            "model": "SGS100A",
            "address": f"TCPIP::10.0.0.{number}::INSTR",
            "settings": {
                f"channel_{channel:02d}_level": {"value": float(values.random()), "unit": "V"} for channel in range(24)
            },
        }
        for number in range(6)
    }
    return {
        "chip": f"C{seed % 7}",
        "run": seed,
        "temperature": {"value": 0.012, "unit": "K"},
        "instruments": instruments,
    }
