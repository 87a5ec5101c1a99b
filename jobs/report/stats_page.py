"""The statistics of a shard set as one HTML page that needs nothing but itself."""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from string import Template
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from jobs.show import size
from shards.statistics import EXAMPLES, EXAMPLES_ORIGIN

_INK, _FILL, _PALE, _GRID = "#1f2933", "#3b7ea1", "#cfe0e8", "#dfe5e9"
_FORMATS = 20  # rows of the table of formats
_LONG = 40  # rows of the table of classes, from which on it scrolls, so that the rest of the page is near
_BAR_LABELS = 26  # bars of the histogram that have room for a number
_WIDE = 20  # from the least to the most: what is wider is drawn on a logarithmic scale

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { --ink: #1f2933; --soft: #66757f; --line: #e3e8eb; --fill: #3b7ea1; --pale: #cfe0e8; --warn: #b4541a; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8f9; color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 28px 64px; }
h1 { font-size: 32px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 0 0 14px; }
h3 { font-size: 15px; margin: 22px 0 6px; }
p { margin: 6px 0; max-width: 80ch; }
.soft, th { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 14px; margin: 24px 0; }
.figures div, section { background: #fff; border: 1px solid var(--line); border-radius: 10px; }
.figures div { padding: 14px 16px; }
.figures b { display: block; font-size: 25px; font-weight: 650; line-height: 1.25; white-space: nowrap; }
.figures span { color: var(--soft); font-size: 13px; }
section { padding: 24px 26px; margin: 18px 0; }
section .figures { margin: 0 0 14px; }
section .figures div { border: 0; background: #f6f8f9; padding: 10px 14px; }
section .figures b { font-size: 20px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; font-size: 13px; background: #fff; position: sticky; top: 0; z-index: 1; }
th, td { padding: 4px 10px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { overflow-wrap: anywhere; }
td:last-child, th:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; width: 1%; padding-left: 14px; overflow-wrap: normal; }
.n + td:not(.n), .n + th:not(.n) { padding-left: 14px; }
.bars { width: 30%; min-width: 90px; vertical-align: middle; }
.bar { display: block; height: 11px; border-radius: 2px; background: var(--pale); min-width: 1px; }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--fill); }
.facts, .narrow table { width: auto; } .narrow td { padding-right: 40px; }
.facts { margin-bottom: 10px; } .facts td { border: 0; padding: 2px 18px 2px 0; }
.facts td:first-child { color: var(--soft); white-space: nowrap; }
code { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.rank { color: var(--soft); width: 3em; }
.warn { color: var(--warn); font-weight: 600; }
.long { max-height: 760px; overflow-y: auto; border-bottom: 1px solid var(--line); }
svg { display: block; width: 100%; height: auto; margin: 8px 0; }
@media print {
  body { background: #fff; font-size: 11px; } th, code, .figures span { font-size: 10px; }
  h1 { font-size: 24px; } h2 { font-size: 15px; } h3 { font-size: 12px; }
  .figures b, section .figures b { font-size: 16px; }
  .figures { gap: 8px; grid-template-columns: repeat(5, 1fr); }
  .figures div, section .figures div { padding: 8px 10px; }
  .screen { display: none; } main { max-width: none; padding: 0; }
  section, .figures div { border-color: #ccc; } section { padding: 12px 14px; margin: 10px 0; }
  th { position: static; } .long { max-height: none; overflow: visible; }
  tr, svg, .figures { break-inside: avoid; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def html_page(result: dict[str, Any]) -> str:
    """The page for what shards.statistics.statistics gives."""
    sections = (
        _head(result),
        _coverage(result),
        _classes(result),
        _durations(result),
        _formats(result),
        _reasons(result),
        _balanced(result),
        _recordings(result),
    )
    return _PAGE.substitute(title=escape(f"Shard set {result['name']}"), body="\n".join(sections))


def percent(share: float) -> str:
    """A share for people: 100 % is all of them and 0 % none."""
    text = f"{share:.1%}"
    if text == "100.0%":
        return "100%" if share == 1 else "> 99.9%"
    if text == "0.0%":
        return "0%" if share == 0 else "< 0.1%"
    return text


def hours(value: float) -> str:
    """Hours with as many decimals as say something."""
    decimals = next((d for d, least in enumerate((1000, 10, 1)) if value >= least), 3)
    return f"{value:,.{decimals}f}"


def times(value: float) -> str:
    """How often, in three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _head(result: dict[str, Any]) -> str:
    coverage, classes = result["coverage"], len(result["per_class"])
    figures = [
        (f"{result['clips']:,}", "clips"),
        (hours(result["hours"]), "hours"),
        ("–", "coverage: no list known")
        if result["indexed"]
        else (percent(coverage["share"]), f"of {coverage['listed']:,} listed clips"),
        (f"{result['balanced']['classes']:,}", f"of {classes:,} classes have clips"),
        (size(result["bytes"]), f"in {result['tars']:,} tar{'s' * (result['tars'] != 1)}"),
    ]
    facts = [
        ("folder", result["shards"]),
        ("audio", f"{result['sample_rate']:,} Hz, {result['codec']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items()) or "not known"),
    ]
    hashes = [
        ("packed clips", result["list_hash"]),
        ("content", result["content_hash"]),
        ("source", result["source_hash"]),
    ]
    rows = [f"<tr><td>{name}</td><td>{escape(value)}</td></tr>" for name, value in facts]
    rows += [f"<tr><td>hash of the {name}</td><td><code>{escape(value)}</code></td></tr>" for name, value in hashes]
    origin = "indexed from existing tars" if result["indexed"] else "packed"
    return (
        f'<h1>{escape(result["name"])}</h1>\n<p class="soft">a shard set for {escape(result["task"])}, {origin}</p>\n'
        f"{_figures(figures)}\n<section>\n<h2>The set</h2>\n"
        f'<table class="facts">{"".join(rows)}</table>\n'
        '<p class="soft">Two evaluations were on the same clips if they show the same hash of the packed clips.</p>\n'
        "</section>"
    )


def _coverage(result: dict[str, Any]) -> str:
    coverage = result["coverage"]
    if result["indexed"]:
        text = (
            "<p>The set was indexed from tars that were there. No official list is known, so there is no share of it; "
            "what follows counts the clips that are in the tars.</p>"
        )
    else:
        text = f"<p>{coverage['packed']:,} of {coverage['listed']:,} listed clips are in the set.</p>"
        notes = []
        if coverage["duplicates"]:
            notes.append(f"{coverage['duplicates']:,} duplicate rows do not count as listed clips.")
        if coverage["absent_without_class"]:
            notes.append(f"{coverage['absent_without_class']:,} listed clips have no known class and stand in none.")
        text += _bar(coverage["packed"], coverage["listed"], coverage["listed"])
        text += f'<p class="soft">{" ".join(notes)}</p>' if notes else ""
    tables = [
        f"<h3>by {column}</h3>\n{_coverage_table(column, coverage[column + 's'])}"
        for column in ("split", "fold")
        if coverage[column + "s"]
    ]
    return _section("Coverage", text, *tables)


def _coverage_table(column: str, groups: list[dict[str, Any]]) -> str:
    most = max(group["listed"] or group["packed"] for group in groups)
    return _table(
        [column, "", "packed:n", "listed:n", "share:n", "hash of the packed clips"],
        [
            [
                _text("none" if group[column] is None else group[column]),
                _bar_cell(group["packed"], group["listed"], most),
                _number(f"{group['packed']:,}"),
                *_listed_cells(group),
                f"<td><code>{group['list_hash'][:16]}…</code></td>",
            ]
            for group in groups
        ],
    )


def _classes(result: dict[str, Any]) -> str:
    ranked = sorted(result["per_class"], key=lambda c: (-c["packed"], c["name"]))
    most = max(c["listed"] or c["packed"] for c in ranked) or 1
    text = ["<p>The commonest class first."]
    if len(ranked) > _LONG:
        text.append(f'<span class="screen">All {len(ranked):,} are in the table, which scrolls.</span>')
    if result["task"] == "tagging":
        text.append("A clip with several labels counts in each of its classes.")
    if not result["indexed"]:
        text.append("The pale part of a bar is listed and not in the set.")
    absent = result["without_clips"]
    if absent:
        names = "; ".join(escape(name) for name in absent)  # many of AudioSet's have commas
        text.append(f'</p><p><span class="warn">{len(absent):,} without clips:</span> {names}.')
    rows = [
        [
            f'<td class="rank">{rank}</td>',
            _text(c["name"]),
            _bar_cell(c["packed"], c["listed"], most),
            _number(f"{c['packed']:,}"),
            *_listed_cells(c),
            _number(hours(c["hours"])),
            _number("–" if c["repeats"] is None else times(c["repeats"])),
        ]
        for rank, c in enumerate(ranked, 1)
    ]
    head = ["", "class", "", "clips:n", "listed:n", "share:n", "hours:n", "repeats:n"]
    table = _table(head, rows)
    if len(rows) > _LONG:
        table = f'<div class="long">{table}</div>'
    return _section("Classes", " ".join(text) + "</p>", table)


def _durations(result: dict[str, Any]) -> str:
    durations = result["durations"]
    names = {"min": "shortest", "q1": "first quartile", "median": "median", "q3": "third quartile", "max": "longest"}
    figures = [(f"{durations[key]:,.2f} s", name) for key, name in names.items()]
    return _section("Durations", _figures(figures), _histogram(**durations["histogram"]))


def _formats(result: dict[str, Any]) -> str:
    formats, peaks = result["formats"], result["peaks"]
    if formats is None:
        return _section("Formats and peaks", "<p>Not known of an indexed set: its clips were encoded elsewhere.</p>")
    rows = [
        [
            _text(f["format"]),
            _bar_cell(f["clips"], None, formats[0]["clips"]),
            _number(f"{f['clips']:,}"),
            _number(percent(f["share"])),
        ]
        for f in formats[:_FORMATS]
    ]
    rest = formats[_FORMATS:]
    if rest:
        clips = sum(f["clips"] for f in rest)
        share = percent(clips / result["clips"])
        rows.append([_text(f"{len(rest)} more"), "<td></td>", _number(f"{clips:,}"), _number(share)])
    loud, quiet = peaks["overloaded"], peaks["near_silence"]
    return _section(
        "Formats and peaks",
        "<p>What the clips were before they were packed: codec, rate, channels.</p>",
        _table(["format", "", "clips:n", "share:n"], rows),
        f"<p><b>{loud:,}</b> clips ({percent(loud / result['clips'])}) were overloaded: their peak lies above full "
        f"scale and was clipped. <b>{quiet:,}</b> ({percent(quiet / result['clips'])}) are near silence: their peak "
        "lies below −80 dB of full scale.</p>",
    )


def _reasons(result: dict[str, Any]) -> str:
    if not result["reasons"]:
        return _section("What did not get in", "<p>Nothing: every row is in the set.</p>")
    rows = []
    for r in result["reasons"]:
        example = ": ".join(filter(None, (r["example"]["source"], r["example"]["detail"])))
        cell = f'<td><code>{escape(r["example"]["key"])}</code><br><span class="soft">{escape(example)}</span></td>'
        rows.append([_text(r["reason"]), _number(f"{r['count']:,}"), _number(percent(r["share"])), cell])
    return _section(
        "What did not get in", _table(["reason", "rows:n", "share of all rows:n", "the first of them"], rows)
    )


def _balanced(result: dict[str, Any]) -> str:
    balanced = result["balanced"]
    visits = balanced["visits"]
    figures = [
        (f"{balanced['examples']:,}", "examples drawn"),
        (f"{balanced['draws_per_class']:,.0f}", "draws of each class"),
        *((f"{times(visits[key])} ×", f"{name} clip") for key, name in _VISITS.items()),
    ]
    origin = f" ({EXAMPLES_ORIGIN})" if balanced["examples"] == EXAMPLES else ""
    text = (
        f"<p>Balanced sampling visits the {balanced['classes']:,} classes with clips equally often, so that the clips "
        "of a rare class are heard again and again. The plot and the column <i>repeats</i> of the classes show how "
        "often a class's own list is gone through. A clip with several labels is drawn through each of its classes; "
        "how often a clip is drawn in all is what the figures of the least, the median and the most drawn say.</p>"
        f'<p class="soft">Over all clips of the set, one clip for each example{origin}. Mixup with a fresh partner '
        "draws two: then every figure doubles.</p>"
    )
    return _section("Balanced sampling", _figures(figures), text, _repeats_plot(result["per_class"]))


_VISITS = {"min": "the least drawn", "median": "the median", "max": "the most drawn"}


def _recordings(result: dict[str, Any]) -> str:
    recordings = result["recordings"]
    if recordings is None:
        return ""
    kind, count, shared = recordings["kind"], recordings["count"], recordings["shared"]
    if not shared:
        return _section(f"Folds and {kind}s", f"<p>Each of the {count:,} {kind}s is in one fold only.</p>")
    table = _table(
        [kind, "folds"], [[_text(name), _text(", ".join(map(str, folds)))] for name, folds in shared.items()]
    )
    return _section(
        f"Folds and {kind}s",
        f'<p><span class="warn">{len(shared):,} of {count:,} {kind}s stand in more than one fold.</span> Who evaluates '
        "by folds tests on parts of what was trained on. The official folds are like that; the clips that did not get "
        "in are counted too.</p>",
        f'<div class="narrow">{table}</div>',
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n" + "\n".join(parts) + "\n</section>"


def _figures(figures: Iterable[tuple[str, str]]) -> str:
    cards = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for value, name in figures)
    return f'<div class="figures">{"".join(cards)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """head: titles, with :n behind those of numbers. rows: finished cells."""
    titles = "".join(f'<th class="n">{t[:-2]}</th>' if t.endswith(":n") else f"<th>{t}</th>" for t in head)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _text(value: object) -> str:
    return f"<td>{escape(str(value))}</td>"


def _number(value: str) -> str:
    return f'<td class="n">{escape(value)}</td>'


def _listed_cells(coverage: dict[str, Any]) -> list[str]:
    listed, share = coverage["listed"], coverage["share"]
    return [_number("–" if listed is None else f"{listed:,}"), _number("–" if share is None else percent(share))]


def _bar_cell(packed: int, listed: int | None, most: int) -> str:
    return f'<td class="bars">{_bar(packed, listed, most)}</td>'


def _bar(packed: int, listed: int | None, most: int) -> str:
    """As long as what is listed is of the most that is, and filled as far as it is packed."""
    whole = packed if listed is None else listed
    filled = packed / whole if whole else 0
    return f'<span class="bar" style="width:{whole / most:.3%}"><i style="width:{filled:.3%}"></i></span>'


def _histogram(edges: list[float], counts: list[int], longer: int) -> str:
    heights = [*counts, longer] if longer else counts
    figure, axes = _figure(3.0)
    bars = axes.bar([i + 0.5 for i in range(len(counts))], counts, width=0.92, color=_FILL)
    if longer:
        axes.bar([len(counts) + 1], [longer], width=0.92, color="#7f98a5")
    if len(heights) <= _BAR_LABELS:
        for x, height in zip([*(b.get_x() + 0.46 for b in bars), len(counts) + 1], heights, strict=False):
            if height:
                axes.annotate(
                    _short(height), (x, height), (0, 3), textcoords="offset points", ha="center", size=8, color=_INK
                )
    step = 1 if len(edges) <= 13 else 2
    ticks = list(range(0, len(edges), step))
    labels = [f"{edges[i]:g}" for i in ticks]
    if longer:
        ticks.append(len(counts) + 1)  # type: ignore[arg-type, unused-ignore]
        labels.append("longer")
    axes.set_xticks(ticks, labels)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("duration, seconds", color=_INK)
    axes.set_ylabel("clips", color=_INK)
    axes.margins(y=0.12)
    return _svg(figure, "durations", "Histogram of the clips' durations")


def _repeats_plot(per_class: list[dict[str, Any]]) -> str:
    repeats = sorted(c["repeats"] for c in per_class if c["repeats"] is not None)
    figure, axes = _figure(2.8)
    floor = 0.0
    if repeats and repeats[-1] > _WIDE * repeats[0]:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
        floor = repeats[0] / 2
    classes = range(1, len(repeats) + 1)
    axes.fill_between(classes, repeats, floor, color=_PALE, step="mid", linewidth=0)
    axes.step(classes, repeats, color=_FILL, linewidth=1.6, where="mid")
    axes.set_ylim(bottom=floor)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g} ×")
    axes.set_xlabel("classes, from the commonest to the rarest", color=_INK)
    axes.set_ylabel("repeats of the class's list", color=_INK)
    axes.margins(x=0.01)
    return _svg(figure, "repeats", "How often balanced sampling goes through each class's list")


def _short(count: int) -> str:
    for power, unit in ((6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.2g}{unit}" if count < 10 ** (power + 1) else f"{count / 10**power:,.0f}{unit}"
    return str(count)


def _figure(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9.2, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(length=0, colors=_INK, which="both")
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an element of the page: no prologue, no metadata, its text as text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    # Every figure of matplotlib's has a patch_1: names that are unique on the page.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
