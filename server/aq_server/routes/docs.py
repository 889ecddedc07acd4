"""The page at `/docs`: the OpenAPI document as plain HTML, with nothing fetched from anywhere."""

from __future__ import annotations

from html import escape
from typing import Any

from litestar import Request
from litestar.openapi.plugins import OpenAPIRenderPlugin

__all__ = ["ReferencePage"]

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{font-size:1.6rem}h2{margin-top:2.5rem;border-bottom:1px solid #d0d7de}code,pre{font:14px/1.5 ui-monospace,monospace}
pre{background:#f6f8fa;padding:.8rem;border-radius:6px;overflow-x:auto}details{margin:.6rem 0;border:1px solid #d0d7de;
border-radius:6px;padding:.5rem .8rem}summary{cursor:pointer}summary b{display:inline-block;min-width:4.2rem}
table{border-collapse:collapse;width:100%;margin:.4rem 0 1rem}td,th{text-align:left;vertical-align:top;padding:.25rem .8rem
.25rem 0;border-bottom:1px solid #eaeef2}.get{color:#0550ae}.post{color:#116329}.patch,.put{color:#7d4e00}
.delete{color:#a40e26}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}pre{background:#161b22}details,h2,td,th{border-color:#30363d}
.get{color:#79c0ff}.post{color:#7ee787}.patch,.put{color:#e3b341}.delete{color:#ff7b72}a{color:#79c0ff}}
"""

_START = """import aq_data
client = aq_data.connect("{url}")
hits = client.search({{"chip": "C7"}})
part = hits[0]["iq"][3, ::2]"""


class ReferencePage(OpenAPIRenderPlugin):
    """Every address with its parameters, bodies and answers."""

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The page, from the OpenAPI document."""
        info = openapi_schema["info"]
        url = str(request.base_url).rstrip("/")
        sections: dict[str, list[str]] = {}
        for path, item in openapi_schema["paths"].items():
            for method, operation in item.items():
                if isinstance(operation, dict):
                    tag = (operation.get("tags") or ["Other"])[0]
                    sections.setdefault(tag, []).append(_operation(method, path, operation))
        body = "".join(f"<h2>{escape(tag)}</h2>{''.join(parts)}" for tag, parts in sections.items())
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(info["title"])}</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body>'
            f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info.get('description') or '')}</p>"
            f"<p>From Python, with <code>pip install aq-data</code>:</p><pre>{escape(_START.format(url=url))}</pre>"
            f'<p>The same as a document for programs: <a href="/docs/openapi.json">/docs/openapi.json</a>.</p>{body}'
            "</body></html>"
        ).encode()


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = "".join(
        f"<tr><td><code>{escape(p['name'])}</code></td><td>{escape(p['in'])}{', required' if p.get('required') else ''}</td>"
        f"<td>{escape(p.get('description') or '')}</td></tr>"
        for p in operation.get("parameters", [])
    )
    bodies = "".join(
        f"<tr><td><code>{escape(media)}</code></td><td>{escape(content['schema'].get('description') or '')}</td></tr>"
        for media, content in operation.get("requestBody", {}).get("content", {}).items()
    )
    answers = "".join(
        f"<tr><td><code>{escape(status)}</code></td><td>{escape(answer.get('description') or '')}</td>"
        f"<td>{escape(', '.join(answer.get('content', {})))}</td></tr>"
        for status, answer in sorted(operation.get("responses", {}).items())
    )
    return (
        f'<details><summary><b class="{method}">{method.upper()}</b> <code>{escape(path)}</code> '
        f"{escape(operation.get('summary') or '')}</summary><p>{escape(operation.get('description') or '')}</p>"
        + (f"<h4>Parameters</h4><table>{parameters}</table>" if parameters else "")
        + (f"<h4>Body</h4><table>{bodies}</table>" if bodies else "")
        + f"<h4>Answers</h4><table>{answers}</table></details>"
    )
