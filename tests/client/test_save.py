"""A first round trip over both deployments."""

import numpy as np
import xarray as xr


def test_a_dataset_comes_back_identical(client):
    dataset = xr.Dataset(
        {"iq": (("flux", "f"), np.ones((3, 4)) + 1j, {"units": "V"})},
        coords={"flux": ("flux", [0.0, 0.5, 1.0], {"units": "V"}), "f": np.arange(4.0)},
    )
    file = client.save(dataset, name="T1", metadata={"chip": "C7"})
    xr.testing.assert_identical(client.search({"chip": "C7"})[0].load(), dataset)
    assert (file["iq"][1, ::2] == dataset.iq.values[1, ::2]).all()
