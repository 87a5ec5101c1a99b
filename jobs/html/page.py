"""What the HTML pages share: their look in light and dark, and the elements that they are made of.

All that goes to a page is a Markup: what is formatted or joined into one, and is none itself, is escaped. Ruff's S704
sees to it that only literals are made Markups.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from jobs.html.figure import FILL, GRID, INK, PALE, SOFT, save_figure

# The colours that figures are drawn with; on a page they are those of its style sheet.
_VARIABLES = {INK: "ink", SOFT: "soft", GRID: "line", FILL: "fill", PALE: "pale"}

_NOTHING = Markup()
_STYLE = Markup("""
:root { color-scheme: light dark; --back: #f6f8f9; --card: #fff; --ink: #1f2933; --soft: #66757f; --line: #e3e8eb;
  --fill: #3b7ea1; --pale: #cfe0e8; --warn: #b4541a; --hit: 59 126 161; --miss: 205 92 52; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #11171b; --card: #1a2227; --ink: #e2e8eb;
  --soft: #93a2ac; --line: #2c373e; --fill: #62a6c9; --pale: #2b4757; --warn: #f0a06a; --hit: 82 158 199;
  --miss: 226 118 76; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0 0 14px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0; max-width: 80ch; overflow-wrap: anywhere; }
a { color: var(--fill); }
.soft, th { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 14px; margin: 24px 0; }
.figures div, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.figures div { padding: 14px 16px; }
.figures b { display: block; font-size: 25px; font-weight: 650; line-height: 1.25; white-space: nowrap; }
.figures span { color: var(--soft); font-size: 13px; }
section { padding: 24px 26px; margin: 18px 0; }
section .figures { margin: 0 0 14px; }
section .figures div { border: 0; background: var(--back); padding: 10px 14px; }
section .figures b { font-size: 20px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; font-size: 13px; background: var(--card); position: sticky; top: 0;
  z-index: 1; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: break-word; }
td:last-child, th:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; width: 1%; padding-left: 14px; }
.n + td:not(.n), .n + th:not(.n) { padding-left: 14px; }
.bars { width: 30%; min-width: 90px; vertical-align: middle; }
.bar { display: block; height: 11px; border-radius: 2px; background: var(--pale); min-width: 1px; }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--fill); }
.facts, .narrow table { width: auto; } .narrow td { padding-right: 40px; }
.facts { margin-bottom: 10px; } .facts td { border: 0; padding: 2px 18px 2px 0; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); white-space: nowrap; }
code, pre { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.rank { color: var(--soft); width: 3em; }
.warn { color: var(--warn); font-weight: 600; }
.long { max-height: 760px; overflow-y: auto; border-bottom: 1px solid var(--line); }
svg { display: block; width: 100%; height: auto; margin: 8px 0; }
svg text { font-family: inherit !important; }
@media (max-width: 640px) {
  main { padding: 22px 12px 40px; } h1 { font-size: 25px; } section { padding: 16px 14px; }
  .figures { gap: 8px; margin: 16px 0; } .figures div { padding: 10px 12px; } .figures b { font-size: 20px; }
}
@media print {
  body { background: #fff; font-size: 11px; } th, code, .figures span { font-size: 10px; }
  h1 { font-size: 24px; } h2 { font-size: 15px; } h3 { font-size: 12px; }
  .figures b, section .figures b { font-size: 16px; }
  .figures { gap: 8px; grid-template-columns: repeat(5, 1fr); }
  .figures div, section .figures div { padding: 8px 10px; }
  .screen { display: none; } main { max-width: none; padding: 0; }
  section, .figures div { border-color: #ccc; } section { padding: 12px 14px; margin: 10px 0; }
  th { position: static; } .long { max-height: none; } .scroll { overflow: visible; }
  tr, svg, .figures { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""")
_PAGE = Markup("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
{script}</body>
</html>
""")


def document(title: str, parts: Iterable[Markup], style: Markup = _NOTHING, script: Markup = _NOTHING) -> str:
    """A page that needs nothing but itself; browsers are told to load nothing, and to run no other script.

    style: what is added to the style sheet.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        script = Markup("<script>{}</script>\n").format(script)
    body = Markup("\n").join(parts)
    return str(_PAGE.format(policy=policy, title=title, style=_STYLE + style, body=body, script=script))


def section(title: str, *parts: Markup) -> Markup:
    return Markup("<section>\n<h2>{}</h2>\n{}\n</section>").format(title, Markup("\n").join(parts))


def paragraph(text: str | Markup) -> Markup:
    return Markup("<p>{}</p>").format(text)


def soft(text: str | Markup) -> Markup:
    """A paragraph of what is said by the way."""
    return Markup('<p class="soft">{}</p>').format(text)


def figures(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Cards, each of a value and what it is."""
    cards = Markup().join(Markup("<div><b>{}</b><span>{}</span></div>").format(*pair) for pair in pairs)
    return Markup('<div class="figures">{}</div>').format(cards)


def facts(pairs: Iterable[tuple[str, str | Markup]]) -> Markup:
    """A line for each fact: its name, and what it is."""
    rows = Markup().join(Markup("<tr><td>{}</td><td>{}</td></tr>").format(*pair) for pair in pairs)
    return Markup('<table class="facts">{}</table>').format(rows)


def table(
    head: Sequence[str], rows: Iterable[Sequence[Markup]], *, foot: Iterable[Sequence[Markup]] = (), css: str = ""
) -> Markup:
    """In a box of its own, in which it scrolls where it is too wide.

    head: titles, with :n behind those of numbers. rows, foot: finished cells. css: classes of the box; in a `long` one
    it scrolls down too.
    """
    titles = Markup().join(
        Markup('<th class="n">{}</th>').format(title[:-2])
        if title.endswith(":n")
        else Markup("<th>{}</th>").format(title)
        for title in head
    )
    return Markup(
        '<div class="scroll {}"><table>\n<thead><tr>{}</tr></thead>\n<tbody>\n{}\n</tbody>{}\n</table></div>'
    ).format(css, titles, _rows(rows), Markup("\n<tfoot>{}</tfoot>").format(lines) if (lines := _rows(foot)) else "")


def _rows(rows: Iterable[Sequence[Markup]]) -> Markup:
    return Markup("\n").join(Markup("<tr>{}</tr>").format(Markup().join(cells)) for cells in rows)


def text(value: object) -> Markup:
    return Markup("<td>{}</td>").format(value)


def number(value: str) -> Markup:
    return Markup('<td class="n">{}</td>').format(value)


def bar(filled: float, whole: float = 1.0) -> Markup:
    """A bar whose length is that share of the room there is, filled to the share `filled` of itself."""
    return Markup('<span class="bar" style="width:{:.3%}"><i style="width:{:.3%}"></i></span>').format(whole, filled)


def bar_cell(filled: float, whole: float = 1.0) -> Markup:
    return Markup('<td class="bars">{}</td>').format(bar(filled, whole))


def percent(share: float) -> str:
    """A share for people: 100 % is all of them and 0 % none."""
    text = f"{share:.1%}"
    if text == "100.0%":
        return "100%" if share == 1 else "> 99.9%"
    if text == "0.0%":
        return "0%" if share == 0 else "< 0.1%"
    return text


def drawing(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of so many inches, and its axes, in the pages' colours."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, colors=INK, which="both")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an element of a page: no prologue, no metadata, its text as text.

    name: of this figure alone. label: what those who do not see it are told.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        save_figure(figure, buffer, format="svg", transparent=True, metadata=metadata)
    drawn = buffer.getvalue()
    # Every figure of matplotlib's has a patch_1: names that are unique on the page.
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn[drawn.index("<svg") :])
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    described = Markup('<svg role="img" aria-label="{}"').format(label)
    return Markup(drawn.replace("<svg", described, 1))  # noqa: S704 - matplotlib has escaped its texts
