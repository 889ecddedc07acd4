"""Adaptive measurement: where to measure next follows from what was measured; the axis is written with the values.

Each step bisects the interval across which the signal changes most. What comes out is ordered by choice, not along the axis:
sort it when you look at it.
"""

import tempfile

import numpy as np

import aq_data

STEPS = 40


def transmission(frequency: float) -> float:
    """A narrow resonance that an even grid of as many points would miss."""
    return float(1 - 1 / (1 + ((frequency - 7.00813) / 2e-4) ** 2))


def next_frequency(known: dict[float, float]) -> float:
    """The middle of the interval with the largest step in signal and frequency together."""
    x = np.array(sorted(known))
    y = np.array([known[value] for value in x])
    steps = np.hypot(np.diff(x) / (x[-1] - x[0]), np.diff(y))
    widest = int(np.argmax(steps))
    return float((x[widest] + x[widest + 1]) / 2)


with tempfile.TemporaryDirectory() as folder, aq_data.connect(folder) as client:
    with client.sweep(
        "resonance, adaptive",
        dims={"frequency": None},
        variables={
            "frequency": ("float64", ("frequency",), {"units": "GHz"}),
            "transmission": ("float64", ("frequency",)),
        },
        metadata={"chip": "C7", "strategy": "bisect the largest step"},
    ) as sweep:
        known: dict[float, float] = {}
        for first in np.linspace(7.0, 7.02, 9):
            known[float(first)] = transmission(float(first))
            sweep.append(frequency=float(first), transmission=known[float(first)])
        for _ in range(STEPS):
            chosen = next_frequency(known)
            known[chosen] = transmission(chosen)
            sweep.append(frequency=chosen, transmission=known[chosen])  # one atomic block: the value and where it is

    measured = client.get(sweep.id).load().sortby("frequency")
    dip = measured.transmission.idxmin("frequency").item()
    print(f"{measured.sizes['frequency']} points; the dip is at {dip:.5f} GHz")
    near = int((abs(measured.frequency - dip) < 1e-3).sum())
    print(f"{near} of them within 1 MHz of it")
