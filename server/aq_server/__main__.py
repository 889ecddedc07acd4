"""The command line: `aq-data <command>`. Each command's code is imported when it runs: client commands stay light."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from importlib.metadata import version

from aq_data.errors import AqDataError

__all__ = ["main", "make_parser"]

_EXIT_ERROR = 1
_MAY_BEGIN_WITH_A_DASH = ("--sort", "--sel")
"""Options whose values do so when the order is descending, or a position counts from the end."""


def _server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="configuration file (default ~/.aq_config/data_server.json)")
    parser.add_argument("--data", metavar="DIR", help="folder of the database and the blobs")


def _client_flags(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", metavar="URL", help="address of a server (default AQ_DATA_URL, then the configuration)")
    where.add_argument("--data", metavar="DIR", help="a folder, without a server")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _typed_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="name of the DataFile")
    parser.add_argument("--tag", action="append", default=[], help="a tag; may be repeated")
    parser.add_argument("--station", help="where it was measured")
    parser.add_argument("--store", help="name of the store to keep it in (`aq-data store ls`)")
    parser.add_argument(
        "--meta", action="append", default=[], metavar="KEY=VALUE", help="free metadata; dots nest, JSON values"
    )
    parser.add_argument("--attach", action="append", default=[], metavar="FILE", help="a file to attach; may be repeated")


def make_parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line."""
    parser = argparse.ArgumentParser(prog="aq-data", description="The data server of a measurement lab.")
    parser.add_argument("--version", action="version", version=f"aq-data {version('aq-data')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, module: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(module=module, function=name)
        return command

    serve = add("serve", "serving", "start the server")
    _server_flags(serve)
    serve.add_argument("--host", help="address to bind (default 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port (default 5000; 0 takes any free one)")
    serve.add_argument("--memory", action="store_const", const=True, help="keep everything in memory, forget it at the end")
    demo = add("demo", "serving", "start a server, save a simulated sweep, find it and read a slice")
    demo.add_argument("--data", metavar="DIR", default="demo-data", help="folder to use (default demo-data)")
    demo.add_argument("--port", type=int, default=5000, help="first port to try (default 5000)")

    save = add("save", "client", "save arrays from .npy, .npz, NetCDF, HDF5 or Zarr, or metadata alone")
    save.add_argument("file", nargs="?", help="file with the arrays")
    _typed_flags(save)
    _client_flags(save)
    imports = add("import", "client", "save each of several files or folders as a DataFile of its own")
    imports.add_argument("files", nargs="+", metavar="FILE")
    _typed_flags(imports)
    _client_flags(imports)
    for name, help in (("ls", "list the newest DataFiles"), ("search", "find DataFiles by a filter")):
        command = add(name, "client", help)
        if name == "search":
            command.add_argument(
                "filter", nargs="?", default="{}", help='JSON, as in \'{"chip": "C7", "power": {"$lt": -20}}\''
            )
            command.add_argument("--text", help="words to be found in names, comments, tags, settings and other texts")
        command.add_argument("--sort", default="-created_at", help="path to order by, - before it for descending")
        command.add_argument("--limit", type=int, help="default 20; with --fields every match")
        if name == "search":
            command.add_argument("--fields", metavar="A,B", help="print what stands at these paths, as a table")
            command.add_argument("--format", choices=("table", "json", "ndjson", "csv"), help="of the table (default table)")
        _client_flags(command)
    show = add("show", "client", "show the document of a DataFile")
    show.add_argument("id")
    _client_flags(show)
    diff = add("diff", "comparing", "tell which settings and fields differ between two DataFiles")
    diff.add_argument("before", metavar="A", help="id of the first")
    diff.add_argument("after", metavar="B", help="id of the second")
    _client_flags(diff)
    history = add("history", "comparing", "tell who changed a DataFile, when, and what")
    history.add_argument("id")
    _client_flags(history)
    revert = add("revert", "comparing", "go back to the fields and metadata of an old revision, as a new one")
    revert.add_argument("id")
    revert.add_argument("revision", type=int)
    _client_flags(revert)
    get = add("get", "client", "read a slice of an array, or an attached file")
    get.add_argument("id")
    get.add_argument("array", help="name of an array or an attached file")
    get.add_argument("--sel", default="", help="selection, as in 0:10,::2,-1")
    get.add_argument("-o", "--output", metavar="FILE", help="write .npy (or the attached file) instead of printing")
    _client_flags(get)
    export = add("export", "exporting", "write a DataFile as NetCDF (.nc) or Zarr (.zarr)")
    export.add_argument("id")
    export.add_argument("output", help="path ending in .nc or .zarr")
    _client_flags(export)

    spool = add("spool", "client", "see and deliver what sweeps of this computer wrote and no server has yet")
    actions = spool.add_subparsers(dest="action", required=True, metavar="ls|push|drop")
    for name, help in (
        ("ls", "list what waits, and where"),
        ("push", "deliver what processes that are gone left behind"),
        ("drop", "delete it without delivering: the measured values are lost"),
    ):
        action = actions.add_parser(name, help=help)
        if name != "ls":
            action.add_argument("sweep", nargs="?" if name == "push" else None, help="id of the sweep")
        action.add_argument("--json", action="store_true", help="print JSON lines")

    stores = add("store", "stores", "see the places in which a server keeps arrays, add one, take one away")
    actions = stores.add_subparsers(dest="action", required=True, metavar="ls|add|rm")
    for name, help in (
        ("ls", "list them, with their state and use"),
        ("add", "add one, or give one in which nothing lies another root"),
        ("rm", "take one away in which nothing lies"),
    ):
        action = actions.add_parser(name, help=help)
        if name != "ls":
            action.add_argument("name")
        if name == "add":
            action.add_argument("root", help="a folder of the server's, gs://bucket/prefix or s3://bucket/prefix")
        _client_flags(action)

    collect = add("gc", "operator", "report blobs that no record names; remove them with --delete")
    _server_flags(collect)
    collect.add_argument("--delete", action="store_true", help="remove what is reported")
    collect.add_argument("--older-than", default="1h", metavar="AGE", help="as in 0s, 30m, 1h, 7d (default 1h)")
    collect.add_argument(
        "--force",
        action="store_true",
        help="also many that look whole though the database knows nothing of them",
    )
    collect.add_argument("--json", action="store_true", help="print JSON lines")
    verify = add("verify", "operator", "read every byte and compare it with its checksum and record")
    _server_flags(verify)
    verify.add_argument("--repair", action="store_true", help="bring metadata copies beside the blobs up to date")
    verify.add_argument("--json", action="store_true", help="print JSON lines")
    reindex = add("reindex", "operator", "rebuild a lost database from the blobs")
    _server_flags(reindex)
    reindex.add_argument("--json", action="store_true", help="print JSON lines")
    migrate = add("migrate", "operator", "bring the database of an older version up to this one; makes a backup first")
    _server_flags(migrate)
    migrate.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    migrate.add_argument("--json", action="store_true", help="print JSON")
    _add_token(add("token", "operator", "create, list and revoke access tokens"))
    return parser


def _add_token(token: argparse.ArgumentParser) -> None:
    actions = token.add_subparsers(dest="action", required=True, metavar="create|list|revoke")
    create = actions.add_parser("create", help="make a token and print its secret, once")
    create.add_argument("name", help="who or what it is for; stands as `user` on what it saves")
    create.add_argument("--scope", action="append", choices=("read", "write", "admin"), help="default: write")
    create.add_argument("--expires", metavar="AGE", help="as in 30d; default never")
    listing = actions.add_parser("list", help="show all tokens, without their secrets")
    revoke = actions.add_parser("revoke", help="refuse a token from now on")
    revoke.add_argument("id", help="as `token list` shows it")
    for action in (create, listing, revoke):
        _server_flags(action)
        action.add_argument("--json", action="store_true", help="print JSON lines")


def _joined(arguments: list[str]) -> list[str]:
    """`--sort -name` as `--sort=-name`: else argparse takes the value for an option."""
    joined: list[str] = []
    for argument in arguments:
        is_value = argument.startswith("-") and not argument.startswith("--")
        if is_value and joined and joined[-1] in _MAY_BEGIN_WITH_A_DASH and "--" not in joined:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def main(arguments: list[str] | None = None) -> int:
    """Run one command. 0 for success, 1 for an error that was explained, 2 for wrong usage, 3 when `verify` found damage."""
    options = make_parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    try:
        module = importlib.import_module(f"aq_server.commands.{options.module}")
        status = int(getattr(module, f"run_{options.function}")(options))
        sys.stdout.flush()  # here it is told if that fails
        return status
    except AqDataError as exc:
        print(f"aq-data: {exc}", file=sys.stderr)
        return _EXIT_ERROR
    except ModuleNotFoundError as exc:
        if exc.name is None or exc.name.startswith(("aq_data", "aq_server")):
            raise
        print(f"aq-data: {exc.name} is not installed; pip install 'aq-data[server,netcdf]' has everything", file=sys.stderr)
        return _EXIT_ERROR
    except BrokenPipeError:
        sys.stderr.close()
        return _EXIT_ERROR
    except OSError as exc:  # of a file that was named, or of standard output
        what = f"{exc.filename}: {exc.strerror}" if exc.filename is not None else exc
        print(f"aq-data: {what}", file=sys.stderr)
        _drop_output()
        return _EXIT_ERROR
    except KeyboardInterrupt:
        return 130


def _drop_output() -> None:
    """What standard output did not take is not tried again when Python ends, which would say so a second time."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
