"""Shared code of the HTML pages: their style in light and dark mode, and the elements that they are made of.

Jinja2's templates escape all text and return Markup, which is not escaped again. Ruff's S704 finds other ways to create
Markup.
"""

import base64
import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from jobs.html.figure import FILL, GRID, INK, PALE, SOFT, save_figure

# The colours that figures are drawn with; on a page they are replaced by variables of its style sheet.
_VARIABLES = {INK: "ink", SOFT: "soft", GRID: "line", FILL: "fill", PALE: "pale"}

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ELEMENTS: Any = _TEMPLATES.get_template("elements.html").module


def document(title: str, parts: Iterable[Markup], style: str = "", script: str = "") -> str:
    """A self-contained page, whose policy lets browsers load nothing else and run no other script.

    style: the name of a file to append to the style sheet. script: the name of a file to run.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
    css = _file("style.css") + (_file(style) if style else Markup())
    code = _file(script) if script else None
    if code:
        digest = hashlib.sha256(f"\n{code}".encode()).digest()
        policy += f"; script-src 'sha256-{base64.b64encode(digest).decode()}'"
    template = _TEMPLATES.get_template("document.html")
    return template.render(title=title, policy=policy, style=css, parts=list(parts), script=code)


def _file(name: str) -> Markup:
    return Markup((Path(__file__).parent / "templates" / name).read_text())  # noqa: S704 - a file of this program


def element(name: str, *values: Any) -> Markup:
    """One of the elements in templates/elements.html, with its arguments. Text is escaped, Markup is not."""
    made: Markup = getattr(_ELEMENTS, name)(*values)
    return made


def section(title: str, *parts: Markup) -> Markup:
    return element("section", title, parts)


def paragraph(text: str | Markup) -> Markup:
    return element("paragraph", text)


def soft(text: str | Markup) -> Markup:
    """A paragraph in a softer colour, for side notes."""
    return element("soft", text)


def figures(pairs: Iterable[tuple[str, str]]) -> Markup:
    """Cards, each with a value and its description."""
    return element("figures", list(pairs))


def facts(pairs: Iterable[tuple[str, str | Markup]]) -> Markup:
    """A line for each fact: its name and value."""
    return element("facts", list(pairs))


def table(
    head: Sequence[str], rows: Iterable[Sequence[Markup]], *, foot: Iterable[Sequence[Markup]] = (), css: str = ""
) -> Markup:
    """A table in a box, in which it scrolls sideways if it is too wide.

    head: titles, with :n after those of numeric columns. rows, foot: finished cells. css: classes of the box; with
    `long` it also scrolls down.
    """
    return element("table", head, list(rows), list(foot), css)


def text(value: object) -> Markup:
    return element("text", value)


def number(value: str) -> Markup:
    return element("number", value)


def bar_cell(filled: float, whole: float = 1.0) -> Markup:
    """A bar whose length is the share `whole` of the cell, filled to the share `filled` of its length."""
    return element("bar_cell", filled, whole)


def percent(share: float) -> str:
    """A share as text; it reads 100% only for all, and 0% only for none."""
    text = f"{share:.1%}"
    if text == "100.0%":
        return "100%" if share == 1 else "> 99.9%"
    if text == "0.0%":
        return "0%" if share == 0 else "< 0.1%"
    return text


def drawing(width: float, height: float) -> tuple[Figure, Any]:
    """A figure, its size in inches, and its axes, in the pages' colours."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, colors=INK, which="both")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an element of a page, without prologue and metadata, its text as text.

    name: unique on the page. label: a description for screen readers.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        save_figure(figure, buffer, format="svg", transparent=True, metadata=metadata)
    drawn = buffer.getvalue()
    # Every matplotlib figure has a patch_1, so ids are made unique on the page.
    drawn = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", drawn[drawn.index("<svg") :])
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, f"var(--{variable})")
    described = f'<svg role="img" aria-label="{escape(label)}"'
    return Markup(drawn.replace("<svg", described, 1))  # noqa: S704 - matplotlib escapes its text
