"""A measurement that colleagues watch: rows are written as they are measured, a follower sees them, the end is Zarr."""

import os
import tempfile
import threading
import time

import numpy as np
import xarray as xr

import aq_data

flux = np.linspace(-0.5, 0.5, 21)
rng = np.random.default_rng(0)


def measure(flux_value: float, delay: float) -> complex:
    """What the instruments would answer."""
    return complex(np.exp(-delay / (20 + 10 * np.cos(2 * np.pi * flux_value))) + rng.normal(0, 0.01), rng.normal(0, 0.01))


def watch(target: str, id: str) -> None:
    """A colleague's script, on any computer that reaches the server."""
    with aq_data.connect(target) as client:
        for event in client.follow(id):
            if event.kind == "block" and any(region["name"] == "iq" for region in event.data["variables"]):
                live = client.get(id).open(live=True)
                print(f"watching: {live.sizes['delay']} delays so far, the newest at {live.delay.values[-1]:.0f} us")
        print(f"watching: the sweep is {client.get(id).state}")


with tempfile.TemporaryDirectory() as folder:
    target = os.environ.get("AQ_DATA_URL", folder)
    with aq_data.connect(target) as client:
        with client.sweep(
            "T1 vs flux",
            dims={"flux": (flux, {"units": "V"}), "delay": None},  # None grows
            variables={
                "iq": ("complex128", ("flux", "delay"), {"units": "V"}),
                "delay": ("float64", ("delay",), {"units": "us"}),
            },
            planned={"delay": 40},
            tags=["q3"],
            metadata={"chip": "C7"},
        ) as sweep:
            watcher = threading.Thread(target=watch, args=(target, sweep.id))
            watcher.start()
            for delay in np.arange(40.0):
                time.sleep(0.02)  # the instruments at work
                row = np.array([measure(value, delay) for value in flux])
                sweep.append(iq=row, delay=delay, dim="delay")  # returns at once: the spool has it, a thread delivers it
            sweep.write(iq=measure(flux[3], 7.0), at={"flux": 3, "delay": 7})  # measured again: the later value counts
            sweep.flush()  # everything so far is on the server's disk
            print(f"measured: {sweep.lag.blocks} blocks behind")
        watcher.join()  # leaving the block finished the sweep

        file = client.get(sweep.id)
        print(file)
        trace = file["iq"].preview("3", pixels=10)  # minimum and maximum of each bin, for a plot
        print(f"preview: {trace.values.shape[0]} bins of {trace.steps[0]} points")
        if target == folder:
            with xr.open_zarr(file.path) as plain:  # no aq-data needed
                print(f"plain Zarr: {dict(plain.sizes)}")
