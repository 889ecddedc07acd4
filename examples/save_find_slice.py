"""The main job, without a server: save a measurement, find it by a setting, read a slice with xarray."""

import tempfile

import numpy as np
import xarray as xr

import aq_data

flux = np.linspace(-0.5, 0.5, 51)
delay = np.linspace(0, 80e-6, 101)
decay = np.exp(-delay[None, :] / (20e-6 + 10e-6 * np.cos(2 * np.pi * flux[:, None])))
measurement = xr.Dataset(
    {"population": (("flux", "delay"), decay, {"long_name": "Excited state"})},
    coords={"flux": ("flux", flux, {"units": "V"}), "delay": ("delay", delay, {"units": "s"})},
)

with tempfile.TemporaryDirectory() as folder, aq_data.connect(folder) as client:
    file = client.save(
        measurement,
        name="T1 vs flux",
        tags=["q3"],
        instruments={"vna": {"model": "ZNB20", "settings": {"power": {"value": -32.0, "unit": "dBm"}}}},
        metadata={"chip": "C7"},
    )
    print(file)

    hits = client.search({"chip": "C7", "instruments.vna.settings.power.value": {"$lt": -30}})
    print(hits.table(["name", "chip", "instruments.vna.settings.power.value"]))

    trace = hits[0].open().population.sel(flux=0.25, method="nearest")
    print(trace.values[:5])
