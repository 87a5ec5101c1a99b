"""The statistics of a shard set, as JSON, on the terminal, and as an HTML page."""

from pathlib import Path
from typing import Any

from rich.table import Table

from erann_dist.data.clip_reader import write_text
from erann_dist.storage.folder import Folder
from jobs.html.page import percent
from jobs.outputs import check_output
from jobs.shard_sets.stats_page import hours, html_page, times
from jobs.terminal.show import condition_lines, console, low_rate_warning, size
from shards.sources.rows import FileCounts
from shards.statistics import EXAMPLES, EXAMPLES_ORIGIN, statistics

_FEW = 6


def stats(folder: Folder, examples: int, html: Path | None) -> dict[str, Any]:
    """The statistics of a shard set, also written as a page to `html`. Raises UserError if the folder has no set."""
    if html:
        check_output(html)
    result = statistics(folder, examples)
    if html:
        write_text(html, html_page(result))
        result["html"] = str(html)
    return result


def stats_page(result: dict[str, Any]) -> None:
    """The facts, coverage, classes, formats, reasons, shared recordings and balanced sampling."""
    parts: list[Table | str] = [_facts(result)]
    for column in ("split", "fold"):
        if groups := result["coverage"][column + "s"]:
            parts.append(_coverage(column, groups))
    parts.append(_classes(result["per_class"]))
    if names := result["without_clips"]:
        parts.append(f"{len(names)} of {len(result['per_class'])} classes have no clips: {_few(names)}")
    if result["formats"]:
        parts.append(_formats(result["formats"]))
    if warning := low_rate_warning(result["low_rate"]):
        parts.append(f"warning: {warning}")
    if result["reasons"]:
        parts.append(_reasons(result["reasons"]))
    if result["recordings"]:
        parts.append(_recordings(**result["recordings"]))
    parts.append(_balanced(result["balanced"]))
    if "html" in result:
        parts.append(f"page: {result['html']}")
    for i, part in enumerate(parts):
        if i:
            console.print()
        console.print(part)


def _facts(result: dict[str, Any]) -> Table:
    coverage, durations, peaks = result["coverage"], result["durations"], result["peaks"]
    tars = f"{result['tars']:,} tar{'s' * (result['tars'] != 1)}"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("shards", result["shards"])
    table.add_row("set", f"{result['name']}, {result['task']}, {result['sample_rate']} Hz, {result['codec']}")
    table.add_row(
        "clips",
        f"{result['clips']:,}, {hours(result['hours'])} h, {size(result['bytes'])} in {tars}",
    )
    if result["indexed"]:
        table.add_row("coverage", "unknown: the set was indexed from tars, without an official list")
    else:
        text = f"{coverage['packed']:,} of {coverage['listed']:,} listed clips ({percent(coverage['share'])})"
        if coverage["duplicates"]:
            text += f"; {coverage['duplicates']:,} duplicate rows are not counted"
        table.add_row("coverage", text)
        if coverage["absent_without_class"]:
            table.add_row("", f"{coverage['absent_without_class']:,} of those not packed have no known class")
    if files := result["files"]:
        for i, line in enumerate(FileCounts(**files).lines()):
            table.add_row("" if i else "files", line)
    table.add_row(
        "seconds",
        "shortest {min:.2f}, quartiles {q1:.2f}, {median:.2f}, {q3:.2f}, longest {max:.2f}".format(**durations),
    )
    if peaks:
        table.add_row("peaks", f"{peaks['overloaded']:,} overloaded, {peaks['near_silence']:,} near silence")
    for line in condition_lines(result["condition"] or {}):
        table.add_row("sources", line)
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    table.add_row("versions", versions or "unknown")
    for name in ("list", "content", "source"):
        table.add_row(f"{name} hash", result[f"{name}_hash"])
    return table


def _coverage(column: str, groups: list[dict[str, Any]]) -> Table:
    table = _table(column, "packed", "listed", "share", "list hash")
    for group in groups:
        name = "none" if group[column] is None else str(group[column])
        table.add_row(name, f"{group['packed']:,}", *_listed(group), group["list_hash"][:16])
    return table


def _classes(per_class: list[dict[str, Any]]) -> Table:
    ranked = sorted((c for c in per_class if c["packed"]), key=lambda c: (-c["packed"], c["name"]))
    many = len(ranked) > 2 * _FEW
    title = f"class ({_FEW} largest, {_FEW} smallest of {len(ranked)})" if many else "class"
    table = _table(title, "clips", "listed", "share", "hours", "repeats")
    for c in [*ranked[:_FEW], *ranked[-_FEW:]] if many else ranked:
        table.add_row(c["name"], f"{c['packed']:,}", *_listed(c), hours(c["hours"]), times(c["repeats"]))
    return table


def _formats(formats: list[dict[str, Any]]) -> Table:
    shown, rest = formats[: 2 * _FEW], formats[2 * _FEW :]
    table = _table("format", "clips", "share")
    for f in shown:
        table.add_row(f["format"], f"{f['clips']:,}", percent(f["share"]))
    if rest:
        table.add_row(f"{len(rest)} more", f"{sum(f['clips'] for f in rest):,}", percent(sum(f["share"] for f in rest)))
    return table


def _reasons(reasons: list[dict[str, Any]]) -> Table:
    table = _table("not packed", "rows", "share", "first example")
    for r in reasons:
        example = ": ".join(filter(None, (r["example"]["key"], r["example"]["source"], r["example"]["detail"])))
        table.add_row(r["reason"], f"{r['count']:,}", percent(r["share"]), example)
    return table


def _recordings(kind: str, count: int, shared: dict[str, list[int]]) -> str:
    if not shared:
        return f"each of the {count:,} {kind}s is in one fold only"
    lines = (f"  {name}: folds {', '.join(map(str, folds))}" for name, folds in shared.items())
    return "\n".join([f"{len(shared):,} of {count:,} {kind}s are in more than one fold:", *lines])


def _balanced(balanced: dict[str, Any]) -> str:
    least, median, most = (times(balanced["visits"][name]) for name in ("min", "median", "max"))
    origin = f" ({EXAMPLES_ORIGIN})" if balanced["examples"] == EXAMPLES else ""
    return (
        f"balanced sampling of {balanced['examples']:,} examples{origin}:\n"
        f"  {times(balanced['draws_per_class'])} draws for each of {balanced['classes']:,} classes; "
        "repeats is the number of passes over a class's own list\n"
        "  a clip with several labels is drawn for each of its classes; "
        f"in total a clip is drawn at least {least}, in the median {median}, at most {most} times\n"
        "  mixup with a fresh partner draws two clips per example, which doubles every figure"
    )


def _table(*columns: str) -> Table:
    """A table whose columns hold numbers, except the first and those that hold text."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        text = i == 0 or column in ("list hash", "first example")
        table.add_column(column, justify="left" if text else "right")
    return table


def _listed(coverage: dict[str, Any]) -> tuple[str, str]:
    listed, share = coverage["listed"], coverage["share"]
    return "–" if listed is None else f"{listed:,}", "–" if share is None else percent(share)


def _few(names: list[str]) -> str:
    rest = len(names) - 2 * _FEW
    return "; ".join(names[: 2 * _FEW]) + (f" and {rest} more" if rest > 0 else "")
