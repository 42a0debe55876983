"""The report as one HTML file: its pictures are embedded, and it asks for nothing from outside."""

import base64
from collections.abc import Sequence
from html import escape

from training.claims.results import Finding
from training.claims.summary import COMPARISON_HEAD, Entry, Report, comparison_cells, facts, figure_lines, intro, made

WIDE_PIXELS = 800  # above it, the writing in a picture is too small on a card of the usual width
_CLASSES = {"CONFIRMED": "yes", "WEAKER": "partly", "NOT CONFIRMED": "no"}
_STYLE = """
:root { color-scheme: light; --ink: #1c2430; --faint: #5b6673; --line: #d9dee5; --ground: #f6f7f9 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 30px; line-height: 1.2; margin: 8px 0 12px } h2 { font-size: 22px; margin: 0 0 8px }
p { max-width: 78ch } a { color: inherit }
.tally { display: flex; flex-wrap: wrap; gap: 10px; margin: 18px 0 22px; padding: 0; list-style: none }
.verdict { display: inline-block; padding: 3px 10px; border-radius: 999px; font-size: 13px; font-weight: 700;
  letter-spacing: .03em; background: #e3e6ea; color: #46505c; white-space: nowrap }
.yes { background: #d5efdd; color: #14562d } .partly { background: #fdeec7; color: #6a4a00 }
.no { background: #f8d9d6; color: #7d1a12 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 16px;
  grid-auto-flow: dense }
.card, section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 16px }
.card { display: flex; flex-direction: column; gap: 8px; text-decoration: none }
.card h3 { font-size: 17px; margin: 0; line-height: 1.3 } .card p { margin: 0; font-size: 15px }
.card .said { color: var(--faint) } .card img { margin-top: auto }
@media (min-width: 760px) { .card.wide { grid-column: span 2 } }
img { max-width: 100%; height: auto; display: block } figure { margin: 14px 0 } figcaption { color: var(--faint) }
section { margin-top: 22px; padding: 22px } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; margin: 10px 0 } th, td { border-bottom: 1px solid var(--line);
  padding: 6px 12px 6px 0; text-align: left; vertical-align: top } th { font-weight: 600 } td { max-width: 70ch }
.numbers td:nth-child(n + 4), .numbers th { white-space: nowrap }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 14px; font-size: 15px } dt { color: var(--faint) }
dd { margin: 0; max-width: 80ch }
@media (max-width: 560px) { dl { grid-template-columns: 1fr } dd { margin-bottom: 6px }
  .cards { grid-template-columns: 1fr } }
"""


def html_page(report: Report) -> str:
    """Return the report as an HTML document."""
    tally = "".join(f"<li>{_badge(verdict)} {count}</li>" for verdict, count in report.tally.items())
    opening, words, _ = intro(report)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Claims made for capsule networks</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>Sixteen claims made for capsule networks, measured</h1><p>{escape(opening)}</p>"
        f'<p>{escape(words)}</p><ul class="tally">{tally}</ul></header>'
        f'<main><div class="cards">{"".join(map(_card, report.entries))}</div>'
        f"{''.join(map(_section, report.entries))}"
        f"<section><h2>How this was made</h2><ul>{''.join(f'<li>{escape(one)}</li>' for one in made(report))}</ul>"
        "</section></main></body></html>\n"
    )


def _card(entry: Entry) -> str:
    pictures = list(entry.finding.pictures.items()) if isinstance(entry.finding, Finding) else []
    wide = " wide" if pictures and _width(pictures[0][1]) > WIDE_PIXELS else ""
    return (
        f'<a class="card{wide}" href="#row-{entry.claim.number}"><div>{_badge(entry.verdict)}</div>'
        f'<h3>{entry.claim.number}. {escape(entry.claim.sentence)}</h3><p class="said">{escape(entry.said)}</p>'
        f"{_picture(*pictures[0]) if pictures else ''}</a>"
    )


def _section(entry: Entry) -> str:
    claim = entry.claim
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts(entry))
    begin = (
        f'<section id="row-{claim.number}"><h2>{claim.number}. {escape(claim.title)} {_badge(entry.verdict)}</h2>'
        f"<p>{escape(claim.sentence)}</p><dl>{told}</dl>"
    )
    finding = entry.finding
    if not isinstance(finding, Finding):
        return f"{begin}</section>"
    compared = _table(COMPARISON_HEAD, [[[cell] for cell in cells] for cells in comparison_cells(finding)], "numbers")
    figures = _table(["figure", "value"], [[[name], figure_lines(value)] for name, value in finding.figures.items()])
    pictures = "".join(
        f"<figure>{_picture(title, content)}<figcaption>{escape(title)}</figcaption></figure>"
        for title, content in finding.pictures.items()
    )
    return f"{begin}{compared}{figures if finding.figures else ''}{pictures}</section>"


def _badge(verdict: str) -> str:
    return f'<span class="verdict {_CLASSES.get(verdict, "")}">{escape(verdict)}</span>'


def _table(head: Sequence[str], rows: Sequence[Sequence[Sequence[str]]], kind: str = "") -> str:
    """Return a table of rows of cells, each of some lines of text. kind: its class in the style."""
    top = "".join(f"<th>{escape(one)}</th>" for one in head)
    body = "".join(f"<tr>{''.join(map(_table_cell, cells))}</tr>" for cells in rows)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _table_cell(lines: Sequence[str]) -> str:
    return f"<td>{'<br>'.join(map(escape, lines))}</td>"


def _width(png: bytes) -> int:
    """Return the width of a PNG file in pixels, which its header has; 0 for another file."""
    return int.from_bytes(png[16:20], "big") if png.startswith(b"\x89PNG") else 0


def _picture(title: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(title, quote=True)}" src="data:image/png;base64,{data}">'
