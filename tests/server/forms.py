"""Saves as a foreign program would send them: multipart forms put together by httpx, not by our own client."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from services.deployment import PRODUCTION, blobs

from aq_data.models.datafile import make_id

DATAFILES = "/api/v1/datafiles"
RAW = "application/octet-stream"


def new_id() -> str:
    return make_id(time.time_ns() // 1_000_000, os.urandom(10))


def declared(name: str, array: np.ndarray, **more: Any) -> dict[str, Any]:
    """An array as the document declares it."""
    return {"name": name, "dtype": array.dtype.str, "shape": list(array.shape), **more}


def document_part(document: Any) -> tuple[str, tuple]:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return ("document", (None, content, "application/json"))


def array_part(index: int | str, content: bytes) -> tuple[str, tuple]:
    return (f"array:{index}", (None, content, RAW))


def file_part(index: int, name: str, content: bytes, content_type: str = "text/plain") -> tuple[str, tuple]:
    return (f"file:{index}", (name, content, content_type))


def post(http: httpx.Client, *parts: tuple[str, tuple]) -> httpx.Response:
    return http.post(DATAFILES, files=list(parts))


def save(
    http: httpx.Client, arrays: dict[str, np.ndarray] | None = None, files: Iterable[tuple] = (), **fields: Any
) -> dict[str, Any]:
    """Save and give the document; every array under its name with default dims."""
    arrays = arrays or {}
    infos = [declared(name, array) for name, array in arrays.items()]
    parts = [document_part({**fields, "arrays": [*infos, *fields.get("arrays", [])]})]
    parts += [array_part(i, np.ascontiguousarray(array).tobytes()) for i, array in enumerate(arrays.values())]
    parts += [file_part(i, *entry) for i, entry in enumerate(files)]
    answer = post(http, *parts)
    assert answer.status_code == 201, answer.text
    return answer.json()


def kept(data: Path) -> set[str]:
    """Every blob of the deployment at a folder, and every folder of blobs where there are folders."""
    return {str(path.relative_to(blobs(data))) for path in _tree(blobs(data)) if not PRODUCTION or path.is_file()}


def around(data: Path) -> set[Path]:
    """Everything that a path which breaks out could reach first: beside the deployment, and in its whole bucket."""
    return _tree(data.parent) | ({path for path in _tree(blobs(data).parent) if path.is_file()} if PRODUCTION else set())


def _tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != ".ready"}
