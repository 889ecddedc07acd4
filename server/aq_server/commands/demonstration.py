"""The main job in one page: a resonator measured against flux, saved, found by a setting, read lazily."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import numpy as np

import aq_data

__all__ = ["demonstrate", "simulated_settings", "simulated_sweep"]


def simulated_sweep(flux_points: int = 121, frequency_points: int = 401) -> Any:
    """An `xarray.Dataset`: transmission of a notch resonator tuned by a qubit's flux, with noise of a real amplifier.

    `s21 (flux, frequency)` complex128; flux in volts at the coil, frequency in Hz.
    """
    import xarray as xr

    rng = np.random.default_rng(7)
    flux = np.linspace(-0.6, 0.6, flux_points)
    frequency = np.linspace(6.995e9, 7.030e9, frequency_points)
    qubit = 9.2e9 * np.sqrt(np.abs(np.cos(np.pi * flux))) - 0.25e9
    dressed = 7.008e9 + (55e6) ** 2 / (7.008e9 - qubit) * -1.0
    loaded, coupling = 9_000.0, 11_000.0 * np.exp(0.15j)
    detuning = frequency[None, :] / dressed[:, None] - 1
    s21 = 1 - loaded / coupling / (1 + 2j * loaded * detuning)
    cable = np.exp(-2j * np.pi * (frequency - frequency[0]) * 42e-9)[None, :]
    noise = rng.normal(scale=0.012, size=s21.shape) + 1j * rng.normal(scale=0.012, size=s21.shape)
    return xr.Dataset(
        {"s21": (("flux", "frequency"), 0.031 * (s21 * cable + noise), {"units": "V", "long_name": "Transmission"})},
        coords={
            "flux": ("flux", flux, {"units": "V", "long_name": "Coil voltage"}),
            "frequency": ("frequency", frequency, {"units": "Hz", "long_name": "Probe frequency"}),
        },
        attrs={"title": "Resonator spectroscopy against flux"},
    )


def simulated_settings() -> dict[str, Any]:
    """The typed fields and metadata that a measurement framework would send along."""

    def settings(**values: tuple[Any, str]) -> dict[str, Any]:
        return {name: {"name": name, "value": value, "unit": unit} for name, (value, unit) in values.items()}

    return {
        "name": "Resonator against flux",
        "station": "cryostat-2",
        "user": "demo",
        "tags": ["q3", "resonator"],
        "comment": "Simulated: one period of the flux map, avoided crossing near 0.3 V",
        "measured_at": datetime.now(UTC),
        "device": {"device_info": {"model": "atlantic", "mask": "M12", "wafer": "W3", "chip": "C7", "die": "D1"}},
        "instruments": {
            "vna": {
                "hardware": "ZNB20",
                "serial": "100932",
                "connection": {"interface": "TCPIP", "address": "192.0.2.17"},
                "settings": settings(power=(-32.0, "dBm"), bandwidth=(1e3, "Hz"), averages=(16, ""), output=(True, "")),
            },
            "coil": {
                "hardware": "QDAC-II",
                "serial": "0041",
                "settings": settings(range=(2.0, "V"), filter=("low", ""), slew_rate=(0.1, "V/s")),
            },
            "fridge": {"hardware": "LD400", "settings": settings(mxc_temperature=(0.0121, "K"), still_power=(0.009, "W"))},
        },
        "metadata": {"chip": "C7", "qubit": "q3", "attenuation_db": 60, "calibration": {"cable_delay_ns": 42.0}},
    }


def demonstrate(client: aq_data.Client, url: str, target: str) -> None:
    """Do it once and say in plain words what was done; `target` is what a reader connects to afterwards."""
    dataset = simulated_sweep()
    print(f"A server runs at {url}. Documentation: {url}/docs")
    started = time.perf_counter()
    file = client.save(dataset, files={"notes.txt": b"Cooldown 14, after thermal cycle.\n"}, **simulated_settings())
    print(
        f"\nSaved   a simulated sweep: s21 {dict(dataset.sizes)} complex, coordinates with units, "
        f"{len(file.instruments)} instruments\n        as {file.id}, on disk after {_ms(started)}."
    )
    started = time.perf_counter()
    question = {"instruments.vna.settings.power.value": {"$lt": -30}, "chip": "C7"}
    hits = client.search(question)
    print(
        f"\nFound   {hits.total} measurement(s) on chip C7 with the VNA below -30 dBm in {_ms(started)}:\n        {question}"
    )
    started = time.perf_counter()
    lazy = hits[0].open()
    trace = lazy.s21.sel(flux=0.2, method="nearest")
    dip = float(trace.frequency[int(np.argmin(np.abs(trace.values)))])
    print(
        f"\nRead    one trace of {trace.size} points at {float(trace.flux):.2f} V out of {dataset.s21.nbytes / 1e6:.1f} MB "
        f"in {_ms(started)};\n        the resonator is at {dip / 1e9:.4f} GHz there."
    )
    print(f"\nStored  as plain Zarr: xarray.open_zarr({file.path!r})")
    print(
        "\nTo repeat it:\n\n"
        "    import aq_data\n"
        f'    hits = aq_data.connect("{target}").search({{"chip": "C7"}})\n'
        '    hits[0].open().s21.sel(flux=0.2, method="nearest")'
    )


def _ms(started: float) -> str:
    return f"{(time.perf_counter() - started) * 1e3:.0f} ms"
