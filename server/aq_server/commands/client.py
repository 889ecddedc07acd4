"""Commands of a user: they speak to a server, or to a folder."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import aq_data
from aq_data.client.spool import Spool
from aq_data.client.spools import SpoolInfo, found_spools, spool_root
from aq_data.connecting import DEFAULT_URL, open_client, target_of
from aq_data.errors import AqDataError, ConfigError, NotFoundError, ValidationError
from aq_data.models.values import check_value, from_tagged
from aq_server.routes.formats import as_json

__all__ = ["run_get", "run_import", "run_ls", "run_save", "run_search", "run_show", "run_spool"]

_NUMPY = {".npy", ".npz"}
_XARRAY = {".nc", ".nc4", ".cdf", ".h5", ".hdf5", ".zarr"}


def _connect(options: argparse.Namespace) -> aq_data.Client:
    """To what is there: a folder without a catalogue, which may be mistyped, must not look like an empty one."""
    folder = target_of(_target(options))
    if "://" not in folder:
        # Not before: what an address needs is loaded faster. Without a server the catalogue is always a file in the folder.
        from aq_server.deployment import DATABASE

        if not (Path(folder) / DATABASE).is_file():
            raise ConfigError(f"{folder} holds no aq-data; name the folder with --data, or a server with --url")
    return _connect_or_make(options)


def _connect_or_make(options: argparse.Namespace) -> aq_data.Client:
    """The same for a command that may be the first: a folder is made when absent."""
    return aq_data.connect(_target(options))


def _target(options: argparse.Namespace) -> str | None:
    if options.url is not None and "://" not in options.url:
        raise ConfigError(f"--url takes an address such as {DEFAULT_URL}, not {options.url!r}; --data takes a folder")
    target: str | None = options.data if options.url is None else options.url
    return target


def _metadata(pairs: list[str]) -> dict[str, Any]:
    """`a.b=3` as {"a": {"b": 3}}: values are JSON where they parse, else text."""
    metadata: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValidationError(f"--meta takes KEY=VALUE, not {pair!r}")
        *above, last = key.split(".")
        place = metadata
        for segment in above:
            place = place.setdefault(segment, {})
            if not isinstance(place, dict):
                raise ValidationError(f"--meta {pair!r}: {segment!r} already holds a value, not keys")
        try:
            place[last] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            place[last] = text
    return metadata


def _dataset(path: Path) -> Any:
    """The arrays of a file, as `save` takes them, in memory; ValidationError naming the file when they cannot be had."""
    if not path.exists():
        raise ValidationError(f"there is no file {str(path)!r}")
    if path.suffix not in _XARRAY | _NUMPY:
        raise ValidationError(
            f"{path.name}: arrays come from .npy, .npz, {', '.join(sorted(_XARRAY))}; use --attach for others"
        )
    try:
        return _arrays(path) if path.suffix in _NUMPY else _xarray_dataset(path)
    except (AqDataError, ImportError):
        raise
    except Exception as exc:  # a damaged file makes numpy, zarr, zlib and codecs raise errors of any kind
        raise ValidationError(f"{path.name} cannot be read: {_in_one_line(exc)}") from exc


def _arrays(path: Path) -> dict[str, Any]:
    if path.suffix == ".npy":
        return {path.stem: np.load(path, allow_pickle=False)}
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def _xarray_dataset(path: Path) -> Any:
    """As xarray shows it: times and packed values decoded."""
    import xarray as xr

    if path.suffix == ".zarr":
        with xr.open_zarr(path) as dataset:
            dataset.attrs.pop("aq_data", None)
            return dataset.load()
    for engine in ("h5netcdf", "netcdf4", "scipy"):
        try:
            opened = xr.open_dataset(path, engine=engine)
        except Exception:  # noqa: BLE001, S112  (not this engine's kind of file, or the engine is not there)
            continue
        with opened:
            return opened.load()
    raise ValidationError(
        f"{path.name}: none of xarray's engines that are installed can read it; pip install 'aq-data[netcdf]' adds them"
    )


def _in_one_line(what: Exception | str) -> str:
    return " ".join(str(what).split()) or type(what).__name__


def _fields(options: argparse.Namespace, default_name: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"name": options.name or default_name, "tags": options.tag}
    for field in ("station", "store"):
        if getattr(options, field):
            fields[field] = getattr(options, field)
    return fields


def _print(value: Any) -> None:
    sys.stdout.write(msgspec.json.encode(value, order="deterministic").decode() + "\n")


def _say_saved(file: aq_data.DataFile, as_json: bool) -> None:
    if as_json:
        _print(file.to_json())
    else:
        print(f"{file.id}  {file.name}")


def run_save(options: argparse.Namespace) -> int:
    with _connect_or_make(options) as client:
        path = Path(options.file) if options.file else None
        dataset = _dataset(path) if path else None
        fields = _fields(options, path.stem if path else "")
        file = client.save(dataset, metadata=_metadata(options.meta), files=options.attach, **fields)
        _say_saved(file, options.json)
    return 0


def run_import(options: argparse.Namespace) -> int:
    """Every file is tried; one that could not be saved is told of, at the end how many, and the exit status is 1."""
    failed = 0
    paths = _spread(options.files)
    with _connect_or_make(options) as client:
        for path in paths:
            try:
                fields = _fields(options, path.stem)
                file = client.save(_dataset(path), metadata=_metadata(options.meta), files=options.attach, **fields)
            except (AqDataError, OSError) as exc:
                failed += 1
                print(f"aq-data: {path}: {exc}", file=sys.stderr)
            else:
                _say_saved(file, options.json)
    if failed:
        print(f"aq-data: {failed} of {len(paths)} files could not be saved", file=sys.stderr)
    return 1 if failed else 0


def _spread(names: list[str]) -> list[Path]:
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        inside = path.is_dir() and path.suffix != ".zarr"
        paths += sorted(p for p in path.rglob("*") if p.suffix in _XARRAY | _NUMPY) if inside else [path]
    return paths


def run_ls(options: argparse.Namespace) -> int:
    return _list(options, {}, None)


def run_search(options: argparse.Namespace) -> int:
    question = _question(options.filter)
    if options.fields is not None:
        return _tabulate(options, question)
    if options.format is not None:
        raise ValidationError("--format is of the table that --fields makes: --fields name,metadata.chip")
    return _list(options, question, options.text)


def _question(text: str) -> dict[str, Any]:
    try:
        tagged = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as exc:
        raise ValidationError(f"the filter is not a JSON object: {exc}") from exc
    check_value(tagged, "the filter")
    question = from_tagged(tagged)
    if not isinstance(question, dict):
        raise ValidationError(f"the filter is a value, {text}, and no object of conditions")
    return question


def _tabulate(options: argparse.Namespace, question: dict[str, Any]) -> int:
    """CSV and NDJSON pass through as the server streams them, however many rows they have."""
    fields = [field.strip() for field in options.fields.split(",")]
    form = options.format or ("ndjson" if options.json else "table")
    with _connect(options) as client:
        limit = {} if options.limit is None else {"limit": options.limit}
        hits = client.search(question, text=options.text, sort=options.sort, **limit)
        if form == "table":
            table = hits.table(fields).astype(object)
            print(table.where(table.notna(), "").to_string(index=False))
            return 0
        # Closed whatever happens: whoever reads our output may have enough of it, as `head` does.
        with contextlib.closing(hits.lines(fields, "csv" if form == "csv" else "ndjson")) as lines:
            if form == "json":
                _print([msgspec.json.decode(line) for line in b"".join(lines).splitlines()])
                return 0
            for piece in lines:
                sys.stdout.buffer.write(piece)
    return 0


def _list(options: argparse.Namespace, question: dict[str, Any], text: str | None) -> int:
    with _connect(options) as client:
        limit = 20 if options.limit is None else options.limit
        hits = client.search(question, text=text, sort=options.sort, limit=limit)
        for file, shown in zip(hits, hits.highlights, strict=True):
            if options.json:
                _print(file.to_json())
            else:
                arrays = ", ".join(f"{name}{file[name].shape}" for name in file)
                print(f"{file.id}  {file.created_at[:19]}  {file.name or '-':<30}  {arrays}")
                for highlight in shown:
                    print(f"    {' '.join(str(highlight).split())}")
        if not options.json and hits.total > len(hits):
            print(f"{len(hits)} of {hits.total}{'' if hits.total_is_exact else '+'}; --limit shows more")
    return 0


def run_show(options: argparse.Namespace) -> int:
    with _connect(options) as client:
        file = client.get(options.id)
        if options.json:
            _print(file.to_json())
        else:
            sys.stdout.write(msgspec.json.format(msgspec.json.encode(file.to_json()), indent=2).decode() + "\n")
    return 0


def run_get(options: argparse.Namespace) -> int:
    if options.output:
        _check_folder(Path(options.output))
    with _connect(options) as client:
        file = client.get(options.id)
        if options.array not in file and options.array in file.files:
            if options.output:
                print(file.download(options.array, options.output))
            else:
                sys.stdout.buffer.write(file.read_file(options.array))
            return 0
        array = file[options.array]
        values = array.select(options.sel)
        if options.output:
            if array.dtype.kind in "OT":
                values = np.asarray(values, dtype=str)  # .npy has no text of variable length
            with Path(options.output).open("wb") as output:
                np.save(output, values, allow_pickle=False)
        elif options.json:
            sys.stdout.write(as_json(np.asarray(values)).decode() + "\n")
        else:
            print(np.array2string(np.asarray(values), threshold=1000))
    return 0


def _check_folder(path: Path) -> None:
    """Before anything is fetched for it."""
    if not path.parent.is_dir():
        raise ValidationError(f"there is no folder {str(path.parent)!r} to write {path.name} into; make it first")


def run_spool(options: argparse.Namespace) -> int:
    """`ls`, `push`, `drop`: what sweeps of this computer wrote and no server has yet."""
    infos = found_spools(spool_root())
    if options.action == "ls":
        for info in infos:
            if options.json:
                _print(msgspec.to_builtins(info))
            else:
                state = "being written" if info.live else f"refused: {info.refused}" if info.refused else "left behind"
                print(f"{info.sweep}.{info.writer}  {info.blocks} blocks, {info.bytes} bytes, {state}, for {info.target}")
        if not infos and not options.json:
            print(f"nothing waits in {spool_root()}")
        return 0
    sweep = None if options.sweep is None else options.sweep.lower()
    chosen = [info for info in infos if not info.live and sweep in (None, info.sweep)]
    if sweep is not None and not chosen:
        raise NotFoundError(f"no spool of sweep {options.sweep!r} was left behind in {spool_root()}")
    return _drop(chosen) if options.action == "drop" else _push(chosen, sweep, options.json)


def _drop(infos: list[SpoolInfo]) -> int:
    for info in infos:
        spool = Spool.open(Path(info.path))
        if spool is not None:
            spool.remove()
            print(f"dropped {info.blocks} blocks of sweep {info.sweep}")
    return 0


def _push(infos: list[SpoolInfo], sweep: str | None, as_json: bool) -> int:
    """Every target is tried, with the spools of the sweep or with all; 1 when something is still there."""
    failed = 0
    for target in dict.fromkeys(info.target for info in infos):
        try:
            with open_client(target, os.environ.get("AQ_DATA_TOKEN")) as client:
                outcomes = client.deliver(sweep)
        except AqDataError as exc:
            failed += 1
            print(f"aq-data: {target}: {exc}", file=sys.stderr)
            continue
        for outcome in outcomes:
            if outcome.error is not None:
                failed += 1
                print(f"aq-data: sweep {outcome.sweep}: {outcome.error}; it is still in {outcome.path}", file=sys.stderr)
            elif as_json:
                _print({"sweep": outcome.sweep, "blocks": outcome.blocks})
            else:
                print(f"delivered {outcome.blocks} blocks of sweep {outcome.sweep} to {target}")
    return 1 if failed else 0
