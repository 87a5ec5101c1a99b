"""The statistics of a shard set as one self-contained HTML page."""

from typing import Any

from markupsafe import Markup

from jobs.html import page
from jobs.html.figure import FILL, INK, PALE, SOFT
from jobs.html.page import percent
from jobs.terminal.show import condition_lines, low_rate_warning, size
from shards.sources.rows import FileCounts
from shards.statistics import EXAMPLES, EXAMPLES_ORIGIN

_FORMATS = 20  # Rows of the table of formats.
_LONG = 40  # With more rows, the table of classes scrolls, to keep the rest of the page within reach.
_BAR_LABELS = 26  # With more bars, the histogram has no space for numbers on them.
_WIDE = 20  # With a larger ratio of maximum to minimum, the scale is logarithmic.
_WIDTH = 9.2  # Width of a figure in inches.


def html_page(result: dict[str, Any]) -> str:
    """The page for the result of shards.statistics.statistics."""
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
    return page.document(f"Shard set {result['name']}", sections)


def hours(value: float) -> str:
    """Hours, with fewer decimals the larger the value."""
    decimals = next((d for d, least in enumerate((1000, 10, 1)) if value >= least), 3)
    return f"{value:,.{decimals}f}"


def times(value: float) -> str:
    """A number of times, with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _head(result: dict[str, Any]) -> Markup:
    coverage, classes = result["coverage"], len(result["per_class"])
    figures = [
        (f"{result['clips']:,}", "clips"),
        (hours(result["hours"]), "hours"),
        ("–", "coverage: no list")
        if result["indexed"]
        else (percent(coverage["share"]), f"of {coverage['listed']:,} listed clips"),
        (f"{result['balanced']['classes']:,}", f"of {classes:,} classes have clips"),
        (size(result["bytes"]), f"in {result['tars']:,} tar{'s' * (result['tars'] != 1)}"),
    ]
    facts = [
        ("folder", result["shards"]),
        ("audio", f"{result['sample_rate']:,} Hz, {result['codec']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items()) or "unknown"),
    ]
    hashes = [
        ("packed clips", result["list_hash"]),
        ("content", result["content_hash"]),
        ("source", result["source_hash"]),
    ]
    rows: list[tuple[str, str | Markup]] = list(facts)
    rows += [(f"hash of the {name}", page.element("code", value)) for name, value in hashes]
    origin = "indexed from existing tars" if result["indexed"] else "packed"
    hint = page.soft("Two evaluations used the same clips if they show the same hash of the packed clips.")
    return Markup("\n").join(
        [
            page.element("heading", result["name"], f"a shard set for {result['task']}, {origin}"),
            page.figures(figures),
            page.section("The set", page.facts(rows), hint),
        ]
    )


def _coverage(result: dict[str, Any]) -> Markup:
    coverage = result["coverage"]
    if result["indexed"]:
        parts = [
            page.paragraph(
                "The set was indexed from existing tars. Without an official list its coverage is unknown; the "
                "following counts the clips in the tars."
            )
        ]
    else:
        parts = [
            page.paragraph(f"{coverage['packed']:,} of {coverage['listed']:,} listed clips are in the set."),
            page.element("bar", *_bar(coverage["packed"], coverage["listed"], coverage["listed"])),
        ]
        notes = []
        if coverage["duplicates"]:
            notes.append(f"{coverage['duplicates']:,} duplicate rows do not count as listed clips.")
        if coverage["absent_without_class"]:
            notes.append(f"{coverage['absent_without_class']:,} listed clips have no known class and count in none.")
        if notes:
            parts.append(page.soft(" ".join(notes)))
    if files := result["files"]:
        parts.append(page.paragraph(f"When it was packed: {'; '.join(FileCounts(**files).lines())}."))
    for column in ("split", "fold"):
        if groups := coverage[column + "s"]:
            parts += [page.element("subheading", f"by {column}"), _coverage_table(column, groups)]
    return page.section("Coverage", *parts)


def _coverage_table(column: str, groups: list[dict[str, Any]]) -> Markup:
    most = max(group["listed"] or group["packed"] for group in groups)
    return page.table(
        [column, "", "packed:n", "listed:n", "share:n", "hash of the packed clips"],
        [
            [
                page.text("none" if group[column] is None else group[column]),
                page.bar_cell(*_bar(group["packed"], group["listed"], most)),
                page.number(f"{group['packed']:,}"),
                *_listed_cells(group),
                page.text(page.element("code", f"{group['list_hash'][:16]}…")),
            ]
            for group in groups
        ],
    )


def _classes(result: dict[str, Any]) -> Markup:
    ranked = sorted(result["per_class"], key=lambda c: (-c["packed"], c["name"]))
    most = max(c["listed"] or c["packed"] for c in ranked) or 1
    notes: list[str | Markup] = ["The most common class comes first."]
    if len(ranked) > _LONG:
        notes.append(page.element("on_screen", f"All {len(ranked):,} are in the table, which scrolls."))
    if result["task"] == "tagging":
        notes.append("A clip with several labels counts in each of its classes.")
    if not result["indexed"]:
        notes.append("The pale part of a bar is listed but not in the set.")
    parts = [page.paragraph(Markup(" ").join(notes))]
    if absent := result["without_clips"]:
        names = "; ".join(absent)  # many of AudioSet's have commas
        without = page.element("warning", f"{len(absent):,} without clips:")
        parts.append(page.paragraph(Markup(" ").join([without, f"{names}."])))
    rows = [
        [
            page.element("rank", rank),
            page.text(c["name"]),
            page.bar_cell(*_bar(c["packed"], c["listed"], most)),
            page.number(f"{c['packed']:,}"),
            *_listed_cells(c),
            page.number(hours(c["hours"])),
            page.number("–" if c["repeats"] is None else times(c["repeats"])),
        ]
        for rank, c in enumerate(ranked, 1)
    ]
    head = ["", "class", "", "clips:n", "listed:n", "share:n", "hours:n", "repeats:n"]
    return page.section("Classes", *parts, page.table(head, rows, css="long" if len(rows) > _LONG else ""))


def _durations(result: dict[str, Any]) -> Markup:
    durations = result["durations"]
    names = {"min": "shortest", "q1": "first quartile", "median": "median", "q3": "third quartile", "max": "longest"}
    figures = [(f"{durations[key]:,.2f} s", name) for key, name in names.items()]
    return page.section("Durations", page.figures(figures), _histogram(**durations["histogram"]))


def _formats(result: dict[str, Any]) -> Markup:
    formats, peaks = result["formats"], result["peaks"]
    if formats is None:
        unknown = "Unknown for an indexed set: its clips were encoded elsewhere."
        return page.section("Formats and peaks", page.paragraph(unknown))
    rows = [
        [
            page.text(f["format"]),
            page.bar_cell(*_bar(f["clips"], None, formats[0]["clips"])),
            page.number(f"{f['clips']:,}"),
            page.number(percent(f["share"])),
        ]
        for f in formats[:_FORMATS]
    ]
    rest = formats[_FORMATS:]
    if rest:
        clips = sum(f["clips"] for f in rest)
        share = percent(clips / result["clips"])
        rows.append([page.text(f"{len(rest)} more"), page.text(""), page.number(f"{clips:,}"), page.number(share)])
    loud, quiet = peaks["overloaded"], peaks["near_silence"]
    low = low_rate_warning(result["low_rate"])
    return page.section(
        "Formats and peaks",
        page.paragraph("The clips' format before they were packed: codec, sample rate, channels."),
        *([page.paragraph(page.element("warning", f"{low}."))] if low else []),
        page.table(["format", "", "clips:n", "share:n"], rows),
        page.element(
            "peaks", f"{loud:,}", percent(loud / result["clips"]), f"{quiet:,}", percent(quiet / result["clips"])
        ),
        *map(page.paragraph, condition_lines(result["condition"])),
    )


def _reasons(result: dict[str, Any]) -> Markup:
    if not result["reasons"]:
        return page.section("Not packed", page.paragraph("Nothing: every row is in the set."))
    rows = []
    for r in result["reasons"]:
        example = ": ".join(filter(None, (r["example"]["source"], r["example"]["detail"])))
        cell = page.element("example", r["example"]["key"], example)
        rows.append([page.text(r["reason"]), page.number(f"{r['count']:,}"), page.number(percent(r["share"])), cell])
    return page.section("Not packed", page.table(["reason", "rows:n", "share of all rows:n", "first example"], rows))


def _balanced(result: dict[str, Any]) -> Markup:
    balanced = result["balanced"]
    visits = balanced["visits"]
    figures = [
        (f"{balanced['examples']:,}", "examples drawn"),
        (f"{balanced['draws_per_class']:,.0f}", "draws of each class"),
        *((f"{times(visits[key])} ×", f"{name} clip") for key, name in _VISITS.items()),
    ]
    origin = f" ({EXAMPLES_ORIGIN})" if balanced["examples"] == EXAMPLES else ""
    text = page.element("balanced", f"{balanced['classes']:,}")
    more = page.soft(
        f"Figures are for all clips of the set and one clip per example{origin}. Mixup with a fresh partner draws two "
        "clips per example, which doubles every figure."
    )
    return page.section("Balanced sampling", page.figures(figures), text, more, _repeats_plot(result["per_class"]))


_VISITS = {"min": "least drawn", "median": "median", "max": "most drawn"}


def _recordings(result: dict[str, Any]) -> Markup:
    recordings = result["recordings"]
    if recordings is None:
        return Markup()
    kind, count, shared = recordings["kind"], recordings["count"], recordings["shared"]
    if not shared:
        return page.section(f"Folds and {kind}s", page.paragraph(f"Each of the {count:,} {kind}s is in one fold only."))
    table = page.table(
        [kind, "folds"],
        [[page.text(name), page.text(", ".join(map(str, folds)))] for name, folds in shared.items()],
        css="narrow",
    )
    return page.section(
        f"Folds and {kind}s",
        page.element("shared_folds", f"{len(shared):,}", f"{count:,}", kind),
        table,
    )


def _listed_cells(coverage: dict[str, Any]) -> list[Markup]:
    listed, share = coverage["listed"], coverage["share"]
    return [
        page.number("–" if listed is None else f"{listed:,}"),
        page.number("–" if share is None else percent(share)),
    ]


def _bar(packed: int, listed: int | None, most: int) -> tuple[float, float]:
    """The fill and the length of a bar: packed of listed, and listed of the maximum."""
    whole = packed if listed is None else listed
    return packed / whole if whole else 0, whole / most


def _histogram(edges: list[float], counts: list[int], longer: int) -> Markup:
    heights = [*counts, longer] if longer else counts
    figure, axes = page.drawing(_WIDTH, 3.0)
    bars = axes.bar([i + 0.5 for i in range(len(counts))], counts, width=0.92, color=FILL)
    if longer:
        axes.bar([len(counts) + 1], [longer], width=0.92, color=SOFT)
    if len(heights) <= _BAR_LABELS:
        for x, height in zip([*(b.get_x() + 0.46 for b in bars), len(counts) + 1], heights, strict=False):
            if height:
                axes.annotate(
                    _short(height), (x, height), (0, 3), textcoords="offset points", ha="center", size=8, color=INK
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
    axes.set_xlabel("duration, seconds", color=INK)
    axes.set_ylabel("clips", color=INK)
    axes.margins(y=0.12)
    return page.svg(figure, "durations", "Histogram of the clips' durations")


def _repeats_plot(per_class: list[dict[str, Any]]) -> Markup:
    repeats = sorted(c["repeats"] for c in per_class if c["repeats"] is not None)
    figure, axes = page.drawing(_WIDTH, 2.8)
    floor = 0.0
    if repeats and repeats[-1] > _WIDE * repeats[0]:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("")
        floor = repeats[0] / 2
    classes = range(1, len(repeats) + 1)
    axes.fill_between(classes, repeats, floor, color=PALE, step="mid", linewidth=0)
    axes.step(classes, repeats, color=FILL, linewidth=1.6, where="mid")
    axes.set_ylim(bottom=floor)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g} ×")
    axes.set_xlabel("classes, from the most common to the rarest", color=INK)
    axes.set_ylabel("repeats of the class's list", color=INK)
    axes.margins(x=0.01)
    return page.svg(figure, "repeats", "How often balanced sampling goes through each class's list")


def _short(count: int) -> str:
    for power, unit in ((6, "M"), (3, "k")):
        if count >= 10**power:
            return f"{count / 10**power:.2g}{unit}" if count < 10 ** (power + 1) else f"{count / 10**power:,.0f}{unit}"
    return str(count)
