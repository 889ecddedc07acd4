"""What the documentation says is run, loaded and compared here."""

import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import aq_server
import msgspec
import pytest
from aq_server.config import ClientConfig, ServerConfig, load_config

import aq_data

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AQ_DATA_SPOOL", str(tmp_path / "spool"))
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    exec(compile("\n".join(blocks), "README.md", "exec"), namespace)
    assert namespace["hits"].total == 1
    namespace["client"].close()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("save_find_slice.py", "T1 vs flux"),
        ("live_sweep.py", "watching: the sweep is complete"),
        ("adaptive.py", "the dip is at 7.008"),
    ],
)
def test_an_example_runs(script, says, tmp_path):
    command = [sys.executable, "-W", "error", ROOT / "examples" / script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_the_launcher_takes_the_flags_of_serve(tmp_path):
    command = [sys.executable, ROOT / "examples" / "launch.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for flag in ("--host", "--port", "--config", "--data", "--memory"):
        assert flag in done.stdout


@pytest.mark.parametrize("sample", sorted((ROOT / "config-samples").rglob("*.[jt]*")), ids=lambda path: path.name)
def test_every_sample_loads_with_the_real_loader(sample):
    load_config(sample, {}, {})


def test_every_configuration_key_is_documented_with_its_default():
    text = (ROOT / "docs" / "configuration.md").read_text()
    for field in (*msgspec.structs.fields(ServerConfig), *msgspec.structs.fields(ClientConfig)):
        assert f"| `{field.name}` |" in text


def test_every_command_of_the_readme_exists():
    from aq_server.__main__ import make_parser

    known = make_parser().format_help()
    for command in set(re.findall(r"^aq-data (\w+)", README, re.MULTILINE)):
        assert f"    {command} " in known or f"    {command}\n" in known


def test_every_make_target_of_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_decisions_have_their_four_parts():
    pages = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert pages
    for page in pages:
        text = page.read_text()
        assert re.match(r"# \d{4} ", text)
        assert "Status: " in text
        for part in ("## Context", "## Decision", "## Consequences"):
            assert part in text, (page.name, part)


def _modules():
    for package in (aq_data, aq_server):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                yield importlib.import_module(info.name)


def test_every_module_says_what_it_is_and_exports_only_what_it_has():
    for module in _modules():
        if not hasattr(module, "__path__"):
            assert module.__doc__, module.__name__
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"{module.__name__}.{name}"


def test_importing_the_library_loads_neither_server_nor_xarray():
    check = (
        "import sys, aq_data; aq_data.errors; from aq_data.models import query, datafile; "
        "print(sorted({'litestar', 'xarray', 'pandas', 'zarr', 'httpx', 'aq_server'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_server_loads_neither_xarray_nor_pandas():
    check = "import sys, aq_server.app; print(sorted({'xarray', 'pandas', 'zarr', 'aq_data.client'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_struct_is_resolved_when_its_module_is_imported():
    """In two threads at once that crashes the interpreter: see `models/structs.py`."""
    check = (
        "import importlib, pkgutil, msgspec, msgspec._utils, aq_data, aq_server\n"
        "for package in (aq_data, aq_server):\n"
        "    for info in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        if not info.name.endswith('__main__'):\n"
        "            importlib.import_module(info.name)\n"
        "late = []\n"
        "def tell(frame, event, _):\n"
        "    if event == 'call' and frame.f_code.co_name == 'get_class_annotations':\n"
        "        late.append(frame.f_locals['obj'].__name__)\n"
        "def every(cls):\n"
        "    for child in cls.__subclasses__():\n"
        "        yield child\n"
        "        yield from every(child)\n"
        "found = [cls for cls in every(msgspec.Struct) if cls.__module__.startswith(('aq_data', 'aq_server'))]\n"
        "import sys\n"
        "sys.setprofile(tell)\n"
        "for cls in found:\n"
        "    msgspec.json.Decoder(cls)\n"
        "sys.setprofile(None)\n"
        "print(len(found), late)\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    count, _, late = done.stdout.strip().partition(" ")
    assert int(count) > 20
    assert late == "[]"
