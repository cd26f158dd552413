"""One self-contained HTML page: tiles with numbers, a picture, tables, texts. No scripts."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple


class Tile(NamedTuple):
    """A number that matters."""

    label: str
    value: str
    note: str


class Section(NamedTuple):
    """A table of names and values; without rows it is left out."""

    title: str
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page shows."""

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    picture: bytes
    """PNG."""
    sections: Sequence[Section]
    texts: Sequence[tuple[str, str]]
    """Title and content of each, shown as it is."""


_STYLE = """
:root { --ink: #1f2933; --muted: #6b7785; --line: #e4e7eb; --paper: #fff; --back: #f5f7fa; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 40px 20px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 13px; margin: 0 0 8px; color: var(--muted); text-transform: uppercase;
  letter-spacing: 0.06em; }
.subtitle { color: var(--muted); margin: 6px 0 24px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 18px 20px; margin-top: 16px; }
.tiles, .tables { display: grid; gap: 16px; }
.tiles { grid-template-columns: repeat(3, 1fr); }
.tables { grid-template-columns: repeat(2, 1fr); align-items: start; margin-top: 16px; }
.tiles .card, .tables .card { margin: 0; }
.label, .note { color: var(--muted); font-size: 13px; }
.value { font-size: 30px; line-height: 1.25; font-weight: 600; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
img { display: block; width: 100%; height: auto; }
table { width: 100%; border-collapse: collapse; }
td { padding: 6px 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child td { border-top: 0; }
td:first-child { color: var(--muted); padding-right: 16px; white-space: nowrap; }
td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
@media (max-width: 720px) { .tiles { grid-template-columns: repeat(2, 1fr); }
  .tables { grid-template-columns: 1fr; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } main { padding: 0; } }
"""


def render(page: Page) -> str:
    """Return the page as HTML."""
    picture = base64.b64encode(page.picture).decode()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(page.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(page.title)}</h1>
<p class="subtitle">{escape(page.subtitle)}</p>
<div class="tiles">
{"".join(map(_tile, page.tiles))}</div>
<div class="card"><img src="data:image/png;base64,{picture}" alt="Loss and learning rate"></div>
<div class="tables">
{"".join(_section(section) for section in page.sections if section.rows)}</div>
{"".join(_text(title, text) for title, text in page.texts)}</main>
</body>
</html>
"""


def _tile(tile: Tile) -> str:
    return (
        f'<div class="card"><div class="label">{escape(tile.label)}</div>'
        f'<div class="value">{escape(tile.value)}</div>'
        f'<div class="note">{escape(tile.note)}</div></div>\n'
    )


def _section(section: Section) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>\n"
        for name, value in section.rows
    )
    return f'<div class="card"><h2>{escape(section.title)}</h2><table>\n{rows}</table></div>\n'


def _text(title: str, text: str) -> str:
    return f'<div class="card"><h2>{escape(title)}</h2><pre>{escape(text.strip())}</pre></div>\n'
