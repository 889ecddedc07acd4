"""aq-data beside Tiled and beside the floors, on this machine, in one run: `python -m benchmarks`.

Absolute figures mean little on a shared machine, so every workload is run by all sides in turn (A, B, A, B), each
ratio is taken inside one round, and the median of those ratios stands next to its target. The sides:

- `aq`: `python -m aq_server serve` as a process, driven through `aq_data.connect(url)` in another;
- `tiled`: Tiled with its default settings (SQLite catalogue, local files, a single-user key), as a server process and
  a client process of an environment of its own, which the first run creates under `.cache/`;
- `tiled-tuned`: the same server, the arrays written in chunks that suit partial reads;
- `zarr`: zarr-python in one process, without a server (and without fsync): the floor of the array workloads;
- `route`: a bare Litestar route that answers as many bytes as one W4 slice: the floor of a request.

One loop per workload (`measurements.py`) times all of them; what differs is a `Peer`. Everything read is compared with
what was saved, outside the timed part.
"""
