"""How a DataFile, a list of hits and other tables look in a notebook. Everything that comes from a document is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import msgspec

__all__ = ["datafile_html", "hits_html", "table_html"]


def _cells(*values: Any, tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag} style='text-align:left'>{escape(str(v))}</{tag}>" for v in values) + "</tr>"


def _short(document: Mapping[str, Any]) -> str:
    when = document.get("measured_at") or document.get("created_at") or ""
    return str(when)[:19].replace("T", " ")


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def datafile_html(document: Mapping[str, Any]) -> str:
    """Name, when and where, the arrays with units, the settings folded away."""
    rows = [_cells("array", "dims", "dtype", "units", "size", tag="th")]
    for info in document.get("arrays", []):
        dims = ", ".join(f"{dim}: {n}" for dim, n in zip(info["dims"], info["shape"], strict=True))
        units = info.get("attrs", {}).get("units", "")
        rows.append(_cells(info["name"], dims, info["dtype"], units, _bytes(info["nbytes"])))
    facts = [
        document.get("station"),
        document.get("user"),
        _short(document),
        document.get("state"),
        *document.get("tags", []),
    ]
    settings = {key: document[key] for key in ("metadata", "instruments", "device") if document.get(key)}
    shown = msgspec.json.format(msgspec.json.encode(settings), indent=2).decode()
    files = ", ".join(escape(info["name"]) for info in document.get("files", []))
    return (
        f"<div><b>{escape(document.get('name') or 'unnamed')}</b> <code>{escape(document['id'])}</code><br>"
        f"{escape(' · '.join(str(fact) for fact in facts if fact))}<br>{escape(document.get('comment') or '')}"
        f"<table>{''.join(rows)}</table>{'files: ' + files if files else ''}"
        f"<details><summary>settings</summary><pre>{escape(shown)}</pre></details></div>"
    )


def hits_html(documents: Sequence[Mapping[str, Any]], total: int, is_exact: bool) -> str:
    """One row per hit."""
    rows = [_cells("name", "when", "station", "tags", "arrays", "id", tag="th")]
    for document in documents[:50]:
        arrays = ", ".join(info["name"] for info in document.get("arrays", []))
        tags = ", ".join(document.get("tags", []))
        rows.append(
            _cells(document.get("name", ""), _short(document), document.get("station", ""), tags, arrays, document["id"])
        )
    more = "" if is_exact else "+"
    return f"<div>{len(documents)} of {total}{more} DataFiles<table>{''.join(rows)}</table></div>"


def table_html(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], more: str) -> str:
    """A table under its title; `more` tells what it leaves out."""
    lines = [_cells(*heads, tag="th"), *(_cells(*row) for row in rows)]
    return f"<div>{escape(title)}<table>{''.join(lines)}</table>{escape(more)}</div>"
