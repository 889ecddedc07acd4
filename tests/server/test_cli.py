"""Every command as a user types it, on a folder and against a server; and what the operator's commands find and mend."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from aq_server.__main__ import main, make_parser
from forms import kept, new_id
from services.deployment import blobs, left, lose_database, opened, overwrite

import aq_data

CUBE = np.arange(24.0).reshape(2, 3, 4)


@pytest.fixture
def run(capfd, request):
    """Runs a command in this process; its exit status, output and complaints."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exc:
            status = int(exc.code or 0)
        said = capfd.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def cube_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "cube.npy", CUBE)
    return tmp_path / "cube.npy"


def parsed(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


# --- commands of a user --------------------------------------------------------------------------------------------


def test_a_day_with_the_command_line(run, where, cube_file, tmp_path):
    """save, ls, search, show, get and export, each in words and as JSON."""
    note = tmp_path / "note.txt"
    note.write_text("hello")
    flags = ["--name", "T1", "--tag", "q3", "--tag", "good", "--station", "cryo", "--attach", note]
    meta = ["--meta", "chip=C7", "--meta", "power=-30.5", "--meta", "vna.averages=16", "--meta", "on=true"]
    status, out, _ = run("save", cube_file, *flags, *meta, *where, "--json")
    assert status == 0
    (document,) = parsed(out)
    id = document["id"]
    assert (document["name"], document["tags"], document["station"]) == ("T1", ["q3", "good"], "cryo")
    assert document["metadata"] == {"chip": "C7", "power": -30.5, "vna": {"averages": 16}, "on": True}
    status, out, _ = run("save", "--name", "words only", *where)
    assert (status, out.split()[1:]) == (0, ["words", "only"])

    status, out, _ = run("ls", *where, "--json")
    assert (status, {item["name"] for item in parsed(out)}) == (0, {"T1", "words only"})
    status, out, _ = run("ls", *where, "--limit", 1, "--sort", "name")
    assert status == 0
    assert id in out
    assert "cube(2, 3, 4)" in out
    assert "1 of 2" in out

    status, out, _ = run("search", '{"chip": "C7", "power": {"$lt": -20}}', *where, "--json")
    assert (status, [item["id"] for item in parsed(out)]) == (0, [id])
    assert run("search", '{"chip": "C8"}', *where)[:2] == (0, "")

    for flag in ([], ["--json"]):
        status, out, _ = run("show", id, *where, *flag)
        assert (status, json.loads(out)["id"]) == (0, id)

    status, out, _ = run("get", id, "cube", "--sel", "0,1,::2", *where)
    assert (status, out.strip()) == (0, "[4. 6.]")
    status, out, _ = run("get", id, "cube", "--sel", "-1", *where, "--json")
    assert (status, json.loads(out)) == (0, CUBE[-1].tolist())
    status, _, _ = run("get", id, "cube", *where, "-o", tmp_path / "out.npy")
    assert status == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), CUBE)
    assert run("get", id, "note.txt", *where)[:2] == (0, "hello")
    assert run("get", id, "note.txt", *where, "-o", tmp_path / "copy.txt")[0] == 0
    assert (tmp_path / "copy.txt").read_text() == "hello"

    for name in ("out.nc", "out.zarr"):
        mine = tmp_path / f"{name}.part"  # of somebody else, whatever it is called
        mine.mkdir() if name == "out.zarr" else mine.write_text("mine")
        status, out, _ = run("export", id, tmp_path / name, *where)
        assert (status, out.strip()) == (0, str(tmp_path / name))
        assert mine.exists()
        engine = "netcdf4" if name.endswith(".nc") else "zarr"
        with xr.open_dataset(tmp_path / name, engine=engine) as opened:
            np.testing.assert_array_equal(opened["cube"].values, CUBE)
        status, _, err = run("export", id, tmp_path / name, *where)
        assert status == 1
        assert "exists" in err


def test_import_saves_each_file_and_tells_of_those_it_could_not(run, where, tmp_path, cube_file):
    """Exit 1 when one failed, and the others are saved; folders are walked."""
    folder = tmp_path / "many"
    folder.mkdir()
    np.savez(folder / "two.npz", a=np.arange(3), b=CUBE)
    xr.Dataset({"v": ("x", [1.0, 2.0])}, {"x": [10, 20]}, {"title": "t"}).to_netcdf(folder / "set.nc", engine="netcdf4")
    xr.Dataset({"z": ("x", [1, 2])}).to_zarr(folder / "store.zarr", zarr_format=2)
    (folder / "broken.npy").write_bytes(b"no array")
    (folder / "ignored.txt").write_text("x")
    status, out, err = run("import", folder, cube_file, "--tag", "batch", *where, "--json")
    names = {item["name"]: {array["name"] for array in item["arrays"]} for item in parsed(out)}
    assert names == {"two": {"a", "b"}, "set": {"v", "x"}, "store": {"z"}, "cube": {"cube"}}
    assert status == 1
    assert "broken.npy" in err
    assert "Traceback" not in err
    assert len(parsed(run("search", '{"tags": "batch"}', *where, "--json")[1])) == 4


def _npz_of_damaged_bytes(path: Path) -> None:
    np.savez_compressed(path, x=np.arange(1000))
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)


def _zarr_of_a_damaged_chunk(path: Path) -> None:
    xr.Dataset({"v": ("x", np.arange(3.0))}).to_zarr(path, zarr_format=2)
    next(file for file in (path / "v").iterdir() if not file.name.startswith(".")).write_bytes(b"no chunk")


UNREADABLE = {
    "empty.npy": lambda path: path.write_bytes(b""),
    "header.npy": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((  "),
    "empty.npz": lambda path: path.write_bytes(b""),
    "damaged.npz": _npz_of_damaged_bytes,
    "folder.zarr": lambda path: path.mkdir(),
    "file.zarr": lambda path: path.write_bytes(b"x"),
    "json.zarr": lambda path: path.mkdir() or (path / "zarr.json").write_text("{"),
    "chunk.zarr": _zarr_of_a_damaged_chunk,
    "empty.nc": lambda path: path.write_bytes(b""),
    "junk.h5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)),
}


def test_a_file_that_cannot_be_read_hinders_no_other(run, where, tmp_path, cube_file):
    """Whatever is wrong with it and whichever library meets it: one line that names it, and how many at the end."""
    for name, make in UNREADABLE.items():
        make(tmp_path / name)
    status, out, err = run("import", *(tmp_path / name for name in UNREADABLE), cube_file, *where)
    assert (status, out.split()[1:]) == (1, ["cube"])
    lines = err.splitlines()
    assert len(lines) == len(UNREADABLE) + 1
    for name, line in zip(UNREADABLE, lines, strict=False):
        assert line.startswith(f"aq-data: {tmp_path / name}: ")
    assert lines[-1] == f"aq-data: {len(UNREADABLE)} of {len(UNREADABLE) + 1} files could not be saved"
    status, out, err = run("save", tmp_path / "empty.npy", *where)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "empty.npy" in err


def test_mistakes_are_told_in_one_line(run, where, cube_file, tmp_path):
    """Exit 1, what was wrong and no traceback; nothing on standard output."""
    run("save", cube_file, *where)
    (tmp_path / "x.doc").write_text("x")
    for arguments, word in [
        (["show", new_id()], "no DataFile"),
        (["show", "x"], "no DataFile"),
        (["get", new_id(), "a"], "no DataFile"),
        (["search", "{"], "JSON"),
        (["search", "[]"], "JSON"),
        (["search", '{"x": {"$where": 1}}'], "$where"),
        (["search", '{"x": {"$float": "nan"}}'], "filter.x: $float"),
        (["search", '{"x": {"$bytes": 5}}'], "filter.x: $bytes"),
        (["search", '{"x": [{"$complex": [1]}]}'], "filter.x[0]: $complex"),
        (["search", '{"x": {"$date": 3}}', "--fields", "name"], "filter.x: $date"),
        (["search", '{"$date": "2026-01-01"}'], "no object"),
        (["search", '{"x":' * 5000 + "1" + "}" * 5000], "JSON"),
        (["ls", "--sort", ""], "path"),
        (["save", tmp_path / "nothing.npy"], "nothing.npy"),
        (["save", tmp_path / "x.doc"], "x.doc"),
        (["save", "--meta", "novalue"], "KEY=VALUE"),
        (["save", "--meta", "a=1", "--meta", "a.b=2"], "a"),
        (["save", "--attach", tmp_path / "nothing"], "nothing"),
        (["export", new_id(), tmp_path / "out.csv"], ".nc"),
    ]:
        status, out, err = run(*arguments, *where)
        assert (status, out) == (1, ""), arguments
        assert err.startswith("aq-data: "), arguments
        assert err.count("\n") == 1, err
        assert word in err, arguments


def test_what_cannot_be_written_is_told_in_one_line(run, where, tmp_path):
    """Exit 1, the name of what is at fault and no traceback; nothing is left where it should have stood."""
    with aq_data.connect(where[1]) as client:
        attrs = {"none": None, "deep": {"a": 1}}
        zarr_has_it = client.save(xr.Dataset({"a": ("x", [1.0, 2.0])}, attrs=attrs), files={"n.txt": b"x"}).id
        neither_has_it = client.save({"a": ("x", [1.0, 2.0], {"gain": 1j})}).id
        half = client.save({"a": np.zeros(2, "f2")}).id
    nowhere = tmp_path / "nowhere"
    for arguments, words in [
        (["get", zarr_has_it, "a", "-o", nowhere / "a.npy"], [nowhere]),
        (["get", zarr_has_it, "n.txt", "-o", nowhere / "n.txt"], [nowhere]),
        (["get", zarr_has_it, "a", "-o", tmp_path], [tmp_path]),
        (["export", zarr_has_it, nowhere / "x.nc"], [nowhere]),
        (["export", zarr_has_it, nowhere / "x.zarr"], [nowhere]),
        (["export", zarr_has_it, tmp_path / "x.nc"], ["'none'", "dataset", "None", ".zarr"]),
        (["export", neither_has_it, tmp_path / "x.nc"], ["'gain'", "'a'", "1j", "load()"]),
        (["export", neither_has_it, tmp_path / "x.zarr"], ["'gain'", "'a'", "1j", "load()"]),
        (["export", half, tmp_path / "x.nc"], ["x.nc", "NetCDF"]),
    ]:
        status, out, err = run(*arguments, *where)
        assert (status, out) == (1, ""), arguments
        assert err.startswith("aq-data: "), arguments
        assert err.count("\n") == 1, err
        assert all(str(word) in err for word in words), err
    assert not nowhere.exists()
    assert not list(tmp_path.glob("x.*"))
    assert run("export", zarr_has_it, tmp_path / "x.zarr", *where)[0] == 0
    with xr.open_zarr(tmp_path / "x.zarr") as dataset:
        assert dataset.attrs == attrs


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_finds_no_room_is_told_in_one_line(where, cube_file):
    """Also when it is so little that it is written at the very end."""
    for count in (1, 100):
        with aq_data.connect(where[1]) as client:
            client.save_many([{"name": "x" * 1000} for _ in range(count)])
        with open("/dev/full", "w") as full:
            command = [sys.executable, "-m", "aq_server", "ls", "--limit", "100", *where]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (1, "aq-data: [Errno 28] No space left on device\n")


def test_values_as_json_are_those_of_http(run, where):
    """Durations as ticks, instants as text with all their digits, what JSON lacks tagged."""
    with aq_data.connect(where[1]) as client:
        values = {
            "dt": np.array([1, "NaT", 3], "m8[s]"),
            "at": np.array(["2026-01-01T00:00:00.123456789"], "M8[ns]"),
            "z": np.array([1 + 2j]),
        }
        id = client.save(values).id
    shown = {name: json.loads(run("get", id, name, "--json", *where)[1]) for name in values}
    assert shown == {"dt": [1, None, 3], "at": ["2026-01-01T00:00:00.123456789"], "z": [{"$complex": [1.0, 2.0]}]}
    assert run("get", id, "dt", "--sel", "2", "--json", *where)[1] == "3\n"


def test_fields_make_a_table(run, where):
    """Every match unless limited, as aligned text, one JSON list, JSON lines or CSV; `--json` is for programs, too."""
    with aq_data.connect(where[1]) as client:
        client.save_many([{"name": f"n{i:02}", "metadata": {"i": i}} for i in range(25)])
    table = ["search", "{}", "--fields", "name,metadata.i,nothing", "--sort", "i", *where]
    status, out, _ = run(*table)
    assert status == 0
    assert [line.split() for line in out.splitlines()] == [
        ["name", "metadata.i", "nothing"],
        *([f"n{i:02}", str(i)] for i in range(25)),
    ]
    assert run(*table, "--format", "csv")[1].startswith("name,metadata.i,nothing\r\nn00,0,\r\n")
    first = {"metadata.i": 0, "name": "n00", "nothing": None}
    assert parsed(run(*table, "--format", "ndjson", "--limit", "1")[1]) == [first]
    assert parsed(run(*table, "--json", "--limit", "1")[1]) == [first]
    spaced = ["search", "{}", "--fields", " name, metadata.i ", "--format", "csv", "--limit", "1", "--sort", "i", *where]
    assert run(*spaced)[1] == "name,metadata.i\r\nn00,0\r\n"
    rows = json.loads(run(*table, "--format", "json")[1])
    assert (rows[0], len(rows)) == (first, 25)
    status, _, err = run("search", "{}", "--format", "csv", *where)
    assert status == 1
    assert "--fields" in err
    assert len(run("search", "{}", *where)[1].splitlines()) == 20 + 1


def test_values_may_begin_with_a_dash(run, where, cube_file):
    """A descending order and a position from the end, behind a space as the help shows them, or behind `=`."""
    with aq_data.connect(where[1]) as client:
        client.save_many([{"name": name} for name in ("b", "c", "a")])
    for sort in (["--sort", "-name"], ["--sort=-name"]):
        for command in ("ls", "search"):
            status, out, _ = run(command, *sort, "--json", *where)
            assert (status, [item["name"] for item in parsed(out)]) == (0, ["c", "b", "a"])
    (document,) = parsed(run("save", cube_file, *where, "--json")[1])
    for sel in (["--sel", "-1:,0,-2:"], ["--sel=-1:,0,-2:"]):
        status, out, _ = run("get", document["id"], "cube", *sel, "--json", *where)
        assert (status, json.loads(out)) == (0, CUBE[-1:, 0, -2:].tolist())
    command = [sys.executable, "-m", "aq_server", "ls", *where, "--limit", "1", "--sort", "-name"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()[2]) == (0, "cube")


def test_wrong_usage_is_exit_2_and_shows_how(run):
    for arguments in (
        [],
        ["nothing"],
        ["show"],
        ["save", "--nothing"],
        ["ls", "--limit", "many"],
        ["ls", "--sort"],
        ["ls", "--sort", "--json"],
        ["token"],
        ["gc", "--data"],
    ):
        status, _, err = run(*arguments)
        assert status == 2, arguments
        assert "usage: aq-data" in err
    status, _, err = run("ls", "--url", "http://x", "--data", "x")
    assert status == 2
    assert "not allowed with" in err


def test_help_and_version(run):
    """`--help` of the program and of each command; every flag says what it is for."""
    status, out, _ = run("--help")
    commands = {
        "serve",
        "demo",
        "save",
        "ls",
        "show",
        "get",
        "search",
        "import",
        "export",
        "gc",
        "reindex",
        "verify",
        "token",
    }
    assert status == 0
    assert commands <= set(re.findall(r"^    (\w+)", out, re.MULTILINE))
    for command in commands:
        status, out, _ = run(command, "--help")
        assert (status, out[:6]) == (0, "usage:")
    status, out, _ = run("--version")
    assert (status, out.split()[0]) == (0, "aq-data")
    assert make_parser().prog == "aq-data"


def test_no_server_is_told_with_the_way_out(run, monkeypatch):
    monkeypatch.setattr("aq_data.client.http._pause", lambda *_: None)
    status, out, err = run("ls", "--url", "http://127.0.0.1:9")
    assert (status, out) == (1, "")
    assert "http://127.0.0.1:9" in err
    assert err.count("\n") == 1


def test_a_mistyped_target_is_told_and_not_made(run, tmp_path, cube_file, monkeypatch):
    """Of every command that looks at what is there; one that saves may be the first, and makes the folder."""
    typo = tmp_path / "typo"
    monkeypatch.chdir(tmp_path)
    commands = [
        ["ls"],
        ["search", "{}"],
        ["search", "{}", "--fields", "name"],
        ["show", new_id()],
        ["get", new_id(), "a"],
        ["export", new_id(), "out.nc"],
        ["diff", new_id(), new_id()],
        ["history", new_id()],
        ["revert", new_id(), "1"],
        ["store", "ls"],
        ["store", "rm", "x"],
    ]
    for command in commands:
        status, out, err = run(*command, "--data", typo)
        assert (status, out, err.count("\n")) == (1, "", 1), command
        assert f"{typo} holds no aq-data" in err
        assert "--url" in err
    for command in [*commands, ["save", cube_file], ["import", cube_file], ["store", "add", "x", "y"]]:
        for url in ("localhost", "localhost:5000", ""):
            status, out, err = run(*command, "--url", url)
            assert (status, out, err.count("\n")) == (1, "", 1), command
            assert f"{url!r}" in err
            assert "http://" in err
    monkeypatch.setenv("AQ_DATA_URL", "typo")
    status, out, err = run("ls")
    assert (status, out) == (1, "")
    assert f"{typo} holds no aq-data" in err
    assert [path.name for path in tmp_path.iterdir()] == ["cube.npy"]
    assert run("save", cube_file, "--data", typo)[0] == 0
    assert "cube" in run("ls", "--data", typo)[1]
    assert "cube" in run("ls")[1]


def test_a_failure_of_the_store_is_one_line_too(run, where, data, cube_file):
    """Damage met by a command is told in words: no traceback runs over the user's screen."""
    (document,) = parsed(run("save", cube_file, *where, "--json")[1])
    for chunk in (blobs(data) / document["id"]).glob("*/arrays.zarr/cube/c/**/*"):
        if chunk.is_file():
            chunk.unlink()
    status, out, err = run("get", document["id"], "cube", *where)
    assert (status, out) == (1, "")
    assert "lost" in err
    assert "Traceback" not in err


def test_a_closed_pipe_ends_quietly(where):
    """`aq-data ls | head -1` is no failure to report."""
    with aq_data.connect(where[1]) as client:
        for i in range(300):
            client.save(None, name=f"{i} " + "x" * 1000)
    command = f"{sys.executable} -m aq_server ls --json --limit 300 {' '.join(where)} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["name"].startswith("299")
    assert done.stderr == ""


def test_a_table_of_which_a_pipe_takes_the_head_ends_at_once(where):
    """`aq-data search --fields … | head -1`: what was not read of it is waited for by nobody."""
    with aq_data.connect(where[1]) as client:
        client.save_many([{"name": f"{i} " + "x" * 1000} for i in range(300)])
    for form in ("csv", "ndjson"):
        command = f"{sys.executable} -m aq_server search --fields name --format {form} {' '.join(where)} | head -1"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=40)
        assert (done.stdout[:4], done.stderr) == ({"csv": "name", "ndjson": '{"na'}[form], "")


def test_the_demo_runs_and_what_it_shows_can_be_repeated(tmp_path):
    """As a process, as a user would: it ends by itself without a terminal, and its last lines work as they stand."""
    command = [sys.executable, "-m", "aq_server", "demo", "--data", str(tmp_path / "demo"), "--port", "15000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("Saved", "Found", "Read", "Stored", "To repeat it"):
        assert word in done.stdout
    recipe = [line.strip() for line in done.stdout.split("To repeat it:")[1].splitlines() if line.startswith("    ")]
    assert len(recipe) == 3
    repeated = subprocess.run(
        [sys.executable, "-c", "\n".join([*recipe[:-1], f"print({recipe[-1]}.size)"])],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert (repeated.returncode, repeated.stdout.strip()) == (0, "401"), repeated.stderr


# --- commands of an operator ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(data: Path) -> dict[str, str]:
    """Three DataFiles by name: with arrays and a file, with words only, and a deleted one."""
    with opened(data) as client:
        full = client.save(
            {"cube": (("x", "y", "z"), CUBE, {"units": "V"}), "t": np.array("2026-01-31", "M8[D]")},
            name="full",
            metadata={"chip": "C7"},
            files={"n.txt": b"note" * 100},
            attrs={"title": "t"},
        )
        words = client.save(None, name="words", metadata={"chip": "C8"})
        gone = client.save({"a": CUBE}, name="gone", metadata={"chip": "C7"})
        client.update(full.id, {"comment": "patched"})
        client.delete(gone.id)
    return {"full": full.id, "words": words.id, "gone": gone.id}


def group(data: Path, id: str) -> Path:
    (folder,) = (blobs(data) / id).glob("*/arrays.zarr")
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(path, bytes(content))


def verify(run, data: Path, *flags: str) -> tuple[int, list[tuple[str, str]]]:
    status, out, err = run("verify", "--data", data, "--json", *flags)
    assert "Traceback" not in err
    return status, sorted((finding["kind"], finding["id"]) for finding in parsed(out))


def test_an_unharmed_folder_verifies(run, data, saved):
    """Exit 0; the blobs of the deleted DataFile are told of as an orphan, which is no damage."""
    assert verify(run, data) == (0, [("orphan", saved["gone"])])
    status, out, _ = run("verify", "--data", data)
    assert (status, "orphan" in out) == (0, True)
    run("gc", "--data", data, "--delete", "--older-than", "0s")
    status, out, _ = run("verify", "--data", data)
    assert (status, out.strip()) == (0, "everything is there and unharmed")


DAMAGE = {
    "flipped byte in a chunk": ("damaged_chunk", lambda folder: flip(folder / "cube/c/0/0/0")),
    "flipped byte in a scalar's chunk": ("damaged_chunk", lambda folder: flip(folder / "t/c")),
    "chunk cut short": ("damaged_chunk", lambda folder: (folder / "cube/c/0/0/0").write_bytes(b"")),
    "chunk missing": ("missing_chunk", lambda folder: (folder / "cube/c/0/0/0").unlink()),
    "group description missing": ("missing_group", lambda folder: (folder / "zarr.json").unlink()),
    "group description no JSON": ("missing_group", lambda folder: (folder / "zarr.json").write_text("{")),
    "array description missing": ("missing_array", lambda folder: (folder / "cube/zarr.json").unlink()),
    "array description changed": (
        "missing_array",
        lambda folder: (
            (folder / "cube/zarr.json").write_text((folder / "cube/zarr.json").read_text().replace("24", "25", 1))
            and (folder / "t/zarr.json").write_text("{}")
        ),
    ),
    "flipped byte in a file": ("damaged_file", lambda folder: flip(next((folder.parent / "files").iterdir()))),
    "file longer than recorded": (
        "damaged_file",
        lambda folder: (lambda path: path.write_bytes(path.read_bytes() + b"x"))(next((folder.parent / "files").iterdir())),
    ),
    "file missing": ("missing_file", lambda folder: next((folder.parent / "files").iterdir()).unlink()),
    "no blobs at all": ("no_blobs", lambda folder: shutil.rmtree(folder.parent.parent)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_named(run, data, saved, kind):
    """Each is its own kind, with the id it is found at; exit 3; every other DataFile is left in peace."""
    run("gc", "--data", data, "--delete", "--older-than", "0s")
    expected, harm = DAMAGE[kind]
    harm(group(data, saved["full"]))
    assert verify(run, data) == (3, [(expected, saved["full"])])
    status, out, _ = run("verify", "--data", data)
    assert status == 3
    assert expected in out
    assert saved["full"] in out


def test_a_stale_copy_is_found_and_repaired(run, data, saved):
    """What a crash between commit and copy leaves: exit 3, then `--repair` mends it, then all is well."""
    run("gc", "--data", data, "--delete", "--older-than", "0s")
    copy = group(data, saved["full"]) / "zarr.json"
    before = copy.read_bytes()
    with opened(data) as client:
        client.update(saved["full"], {"comment": "newer"})
    overwrite(copy, before)
    assert verify(run, data) == (3, [("stale_copy", saved["full"])])
    assert verify(run, data, "--repair") == (0, [("stale_copy", saved["full"])])
    assert verify(run, data) == (0, [])
    assert b"newer" in copy.read_bytes()


def test_blobs_without_a_record_are_orphans_and_collected_only_when_told(run, data, saved):
    """`gc` reports first, spares the young, and removes with --delete; what a record names is never touched."""
    run("gc", "--data", data, "--delete", "--older-than", "0s")
    id = new_id()
    for path in list((blobs(data) / saved["full"]).rglob("*")):
        if path.is_file():
            overwrite(blobs(data) / id / path.relative_to(blobs(data) / saved["full"]), path.read_bytes())
    (attempt,) = [path for path in (blobs(data) / saved["full"]).iterdir() if path.is_dir()]
    overwrite(attempt / "files" / ("0" * 16), b"never attached")
    before = kept(data)
    assert verify(run, data) == (0, sorted([("orphan", id), ("orphan", saved["full"])]))
    status, out, _ = run("gc", "--data", data)
    assert (status, out.strip()) == (0, "no orphans"), "an hour old at least, unless told otherwise"
    for age in ("0s", "0m", "0d"):
        status, out, _ = run("gc", "--data", data, "--older-than", age, "--json")
        orphans = parsed(out)
        assert status == 0
        assert {orphan["prefix"].split("/")[0] for orphan in orphans} == {id, saved["full"]}
        assert not any(orphan["removed"] for orphan in orphans)
        assert sum(orphan["size"] for orphan in orphans) > 400
    assert "--delete" in run("gc", "--data", data, "--older-than", "0s")[1]
    assert kept(data) == before
    status, out, _ = run("gc", "--data", data, "--older-than", "0s", "--delete")
    assert status == 0
    assert "2 orphans" in out
    assert left(data, id) == []
    assert verify(run, data) == (0, [])
    assert run("gc", "--data", data, "--older-than", "0s")[1].strip() == "no orphans"
    with opened(data) as client:
        np.testing.assert_array_equal(client.get(saved["full"])["cube"][...], CUBE)


def test_ages_are_checked(run, data, saved):
    for age in ("soon", "-1s", "1", "1w", "١s", ""):
        status, _, err = run("gc", "--data", data, f"--older-than={age}")
        assert status == 1, age
        assert "30m" in err


@pytest.mark.parametrize("command", ["gc", "verify", "reindex"])
def test_a_folder_without_data_is_told_and_not_made(run, tmp_path, command):
    """A mistyped folder must not look like an empty one."""
    status, out, err = run(command, "--data", tmp_path / "mistyped")
    assert (status, out) == (1, "")
    assert "--data" in err
    assert not (tmp_path / "mistyped").exists()


def test_reindex_rebuilds_the_database_from_blobs_alone(run, data, saved):
    """Documents, values, files and search are as before; the dead stay dead; a second run changes nothing."""

    def state() -> dict:
        with opened(data) as client:
            found = client.search({"chip": "C7"}, sort="name")
            everything = client.search({}, sort="name")
            return {
                "found": [file.id for file in found],
                "documents": [file.to_json() for file in everything],
                "values": [file.load() for file in everything],
                "file": client.get(saved["full"]).read_file("n.txt"),
                "distinct": client.distinct("chip"),
            }

    before = state()
    lose_database(data)
    status, out, _ = run("reindex", "--data", data, "--json")
    assert status == 0
    outcomes = {entry["id"]: entry["outcome"] for entry in parsed(out)}
    assert outcomes == {saved["full"]: "restored", saved["words"]: "restored", saved["gone"]: "tombstone"}
    after = state()
    assert after["documents"] == before["documents"]
    assert (after["found"], after["file"], after["distinct"]) == (before["found"], before["file"], before["distinct"])
    for one, other in zip(before["values"], after["values"], strict=True):
        xr.testing.assert_identical(one, other)
    with opened(data) as client:
        with pytest.raises(aq_data.errors.NotFoundError) as failure:
            client.get(saved["gone"])
        assert failure.value.code == "deleted"
        with pytest.raises(aq_data.errors.ConflictError):
            client.save(None, id=saved["gone"], name="risen")
        again = client.save({"a": CUBE}, id=new_id(), name="after")
        assert client.update(saved["full"], {"comment": "on"}, revision=2).revision == 3
    status, out, _ = run("reindex", "--data", data, "--json")
    assert {entry["outcome"] for entry in parsed(out)} == {"known"}
    assert verify(run, data) == (0, [("orphan", saved["gone"])])
    assert again.name == "after"


def test_an_honest_retry_after_reindex_is_still_the_same_save(run, data):
    """The digest is kept beside the blobs: the same content is known, other content is refused."""
    id = new_id()
    with opened(data) as client:
        client.save({"a": CUBE}, id=id, name="once")
    lose_database(data)
    run("reindex", "--data", data)
    with opened(data) as client:
        assert client.save({"a": CUBE}, id=id, name="once").revision == 1
        with pytest.raises(aq_data.errors.ConflictError):
            client.save({"a": CUBE}, id=id, name="twice")


def test_reindex_leaves_out_what_is_not_whole(run, data, saved):
    """An interrupted save or a lost chunk is told of and not restored as if it were complete."""
    (group(data, saved["full"]) / "cube/c/0/0/0").unlink()
    overwrite(blobs(data) / new_id() / "0123456789abcdef" / "arrays.zarr" / "a" / "c" / "0", b"interrupted")
    lose_database(data)
    status, out, _ = run("reindex", "--data", data, "--json")
    outcomes = sorted(entry["outcome"] for entry in parsed(out))
    assert (status, outcomes) == (0, ["incomplete", "incomplete", "restored", "tombstone"])


def test_tokens_are_made_listed_and_revoked(run, data):
    status, out, _ = run("token", "create", "lab", "--scope", "read", "--scope", "write", "--expires", "30d", "--data", data)
    assert status == 0
    assert out.startswith("aqd_")
    assert "shown this once" in out
    made = json.loads(run("token", "create", "other", "--data", data, "--json")[1])
    assert made["scopes"] == ["write"]
    listed = parsed(run("token", "list", "--data", data, "--json")[1])
    assert {(token["name"], bool(token["expires_at"])) for token in listed} == {("lab", True), ("other", False)}
    assert run("token", "revoke", made["id"], "--data", data)[0] == 0
    assert "revoked" in run("token", "list", "--data", data)[1]
    status, _, err = run("token", "revoke", "nothing", "--data", data)
    assert status == 1
    assert "token list" in err
    assert run("token", "create", "x", "--scope", "root", "--data", data)[0] == 2


def test_every_command_runs_as_a_process(where, data, cube_file):
    """`python -m aq_server` is the same program: exit status and streams included."""
    command = [sys.executable, "-m", "aq_server", "save", str(cube_file), *where, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["name"] == "cube"
    flip(group(data, json.loads(done.stdout)["id"]) / "cube/c/0/0/0")
    command = [sys.executable, "-m", "aq_server", "verify", "--data", str(data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (3, "")
    assert "damaged_chunk" in done.stdout


def test_commands_of_a_client_need_no_server_library():
    """They answer fast: neither litestar nor zarr is imported to look something up."""
    code = "import sys, aq_server.__main__ as m; m.main(['ls', '--url', 'http://127.0.0.1:9']); print(*sys.modules)"
    program = f"import aq_data.client.http as h; h._pause = lambda *_: None\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    modules = {name.split(".")[0] for name in done.stdout.split()}
    assert "aq_data" in modules
    assert modules.isdisjoint({"litestar", "zarr", "uvicorn", "numcodecs"})


@pytest.fixture
def left_behind(where, tmp_path, monkeypatch):
    """The ids of sweeps of a process that is gone, of each of which one block waits in the spool of this test."""
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    code = (
        "import aq_data, os, sys\n"
        "client = aq_data.connect(sys.argv[1])\n"
        "variables = {'y': ('f8', 'x')}\n"
        "sweeps = [client.sweep('T1', dims={'x': None}, variables=variables) for _ in range(int(sys.argv[2]))]\n"
        "for sweep in sweeps:\n"
        "    sweep.append(y=1.0, x=1.0)\n"
        "    sweep.flush()\n"
        "client.close()\n"
        "for sweep in sweeps:\n"
        "    sweep._wake.set = lambda: None\n"
        "    sweep.append(y=2.0, x=2.0)\n"
        "    print(sweep.id, flush=True)\n"
        "os._exit(1)\n"
    )

    def make(count: int = 1) -> list[str]:
        command = [sys.executable, "-c", code, where[1], str(count)]
        return subprocess.run(command, capture_output=True, text=True).stdout.split()

    return make


def test_what_waits_in_the_spool_is_listed_delivered_or_dropped(run, where, left_behind):
    """Of processes that are gone: `spool ls` shows it, `push` delivers it to where it belongs, `drop` gives it up."""
    assert "nothing waits" in run("spool", "ls")[1]
    (pushed,) = left_behind()
    waiting = [json.loads(line) for line in run("spool", "ls", "--json")[1].splitlines()]
    assert [(info["sweep"], info["blocks"], info["live"]) for info in waiting] == [(pushed, 1, False)]
    status, said, _ = run("spool", "push")
    assert (status, said.split()[:2]) == (0, ["delivered", "1"])
    (dropped,) = left_behind()
    assert run("spool", "drop", dropped)[0] == 0
    assert run("spool", "drop", dropped)[0] == 1  # nothing of it is left
    with aq_data.connect(where[1]) as client:
        assert client.get(pushed)["y"][...].tolist() == [1, 2]
        assert client.get(dropped)["y"][...].tolist() == [1]


def test_push_of_one_sweep_delivers_that_one(run, left_behind):
    """The others of its target wait on; of a sweep that left nothing this is said."""
    one, other = left_behind(2)
    status, said, _ = run("spool", "push", one.upper(), "--json")
    assert (status, parsed(said)) == (0, [{"sweep": one, "blocks": 1}])
    assert [info["sweep"] for info in parsed(run("spool", "ls", "--json")[1])] == [other]
    for gone in (one, new_id(), "x"):
        status, said, err = run("spool", "push", gone)
        assert (status, said) == (1, "")
        assert gone in err
    assert [info["sweep"] for info in parsed(run("spool", "ls", "--json")[1])] == [other]
