"""Tiled in an environment of its own, made on first use: its packages would not suit ours, nor ours its."""

import hashlib
import logging
import subprocess
import sys
from pathlib import Path

__all__ = ["TILED", "ensure_tiled"]

TILED = "tiled[client,server]==0.2.20"
_CONSTRAINTS = Path(__file__).with_name("tiled-constraints.txt")
_LOG = logging.getLogger(__name__)


def ensure_tiled(folder: Path) -> Path:
    """Return the interpreter of the environment in `folder`, after making it (1.2 GB, a minute) if it is not there.

    Every package is pinned by name and version in `tiled-constraints.txt`; pip finds them where it is configured to.
    A changed pin makes the environment anew. An interrupted attempt leaves no mark, so the next one starts over.
    """
    python = folder / "bin" / "python"
    mark = folder / "aq-benchmarks-pins"
    pins = hashlib.sha256(TILED.encode() + _CONSTRAINTS.read_bytes()).hexdigest()
    if mark.exists() and mark.read_text() == pins:
        return python
    _LOG.info("installing %s under %s", TILED, folder)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(_CONSTRAINTS), TILED]
    subprocess.run(install, check=True)
    mark.write_text(pins)
    return python
