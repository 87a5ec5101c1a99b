"""Runs on the terminal."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from rich.table import Table

from erann_dist.log.run_log import LOG
from jobs.terminal.progress import duration
from jobs.terminal.show import console


def runs_page(result: dict[str, Any]) -> None:
    """A line for each run, the most recently active last."""
    runs = sorted(result["runs"], key=lambda run: run["last_event"] or 0)
    columns = {name: [cell(run) for run in runs] for name, cell in _COLUMNS.items()}
    widths = {name: max(map(len, [name, *cells])) + 2 for name, cells in columns.items()}
    longest = max((len(run["run"]) for run in runs), default=0)
    for name in _LESS_IMPORTANT:
        if sum(widths[each] for each in columns) + min(longest, _NAME_WIDTH) > console.width:
            del columns[name]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    available = console.width - sum(widths[each] for each in columns)
    table.add_column("run", overflow="fold", min_width=min(longest, max(available, _NAME_LEAST)))
    for name in columns:
        table.add_column(name, justify="left" if name in _WORDS else "right", no_wrap=True)
    for run, *cells in zip(runs, *columns.values(), strict=True):
        table.add_row(run["run"], *cells)
    console.print(table)
    for run in result["runs"]:
        _print_skipped(run)


def run_page(result: dict[str, Any]) -> None:
    """The run's state, then its starts, incidents and evaluations."""
    steps = sum(line.get("steps_lost", 0) for line in result["incident_list"])
    seconds = sum(line.get("seconds_lost", 0.0) for line in result["incident_list"])
    console.print(f"run      {result['folder'].rstrip('/')}/{result['run']}")
    console.print(f"state    {result['state']}, step {_step(result)}, last event {_ago(result)}")
    if result["why"]:
        console.print(f"why      {result['why']}")
    if result["best"]:
        console.print(f"best     {_best(result)} at step {result['best']['step']:,}")
    console.print(f"goodput  {result['goodput']:.1%}; lost: {steps:,} steps, {duration(seconds)}")
    _print_skipped(result)
    if result["plot"]:
        console.print(f"curves   {result['plot']}")
    _print("started", _starts(result["starts"]))
    _print("incidents", _incidents(result["incident_list"]))
    _print("evaluations", _evaluations(result["evaluations"]))


def _print_skipped(run: dict[str, Any]) -> None:
    if run["skipped_lines"]:
        console.print(f"{run['run']}: {run['skipped_lines']:,} damaged lines of {LOG} are skipped")


def _print(title: str, table: Table) -> None:
    if table.row_count:
        console.print(f"\n{title}")
        console.print(table)


def _starts(lines: list[dict[str, Any]]) -> Table:
    table = _table("time", "from step", "workers", "device", "hosts")
    for line in lines:
        hosts = list(dict.fromkeys(line["hosts"]))
        names = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        table.add_row(_when(line), f"{line['step']:,}", str(line["workers"]), line["device"], names)
    return table


def _incidents(lines: list[dict[str, Any]]) -> Table:
    table = _table("time", "step", "steps lost", "time lost", "kind", "")
    for line in lines:
        steps, seconds = line.get("steps_lost", 0), line.get("seconds_lost", 0.0)
        lost = [str(steps) if steps else "", duration(seconds) if seconds >= 0.5 else ""]
        table.add_row(_when(line), f"{line['step']:,}", *lost, line["kind"], line["text"])
    return table


def _evaluations(lines: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for line in lines for name in line["metrics"]))
    table = _table("time", "step", *names, "weights")
    for line in lines:
        values = [line["metrics"].get(name) for name in names]
        averaged = line.get("averaged")
        table.add_row(
            _when(line),
            f"{line['step']:,}",
            *("" if value is None else f"{value:.4f}" for value in values),
            f"mean of {averaged}" if averaged else "",
        )
    return table


_UNITS = (("days", 86400), ("h", 3600), ("min", 60))
_WORDS = ("run", "state", "time", "kind", "device", "hosts", "weights", "")


def _table(*names: str) -> Table:
    """A table with columns of words and of numbers; only the last one is wrapped."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in names:
        last = name == names[-1]
        table.add_column(name, justify="left" if name in _WORDS else "right", no_wrap=not last, min_width=8 * last)
    return table


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "state": lambda run: run["state"],
    "step": lambda run: _step(run),
    "best": lambda run: _best(run),
    "goodput": lambda run: "" if run["goodput"] is None else f"{run['goodput']:.1%}",
    "incidents": lambda run: str(run["incidents"]),
    "last event": lambda run: _ago(run),
}
_LESS_IMPORTANT = ("incidents", "goodput", "last event")  # Columns dropped on a narrow terminal, in this order.
_NAME_WIDTH = 20  # Minimum width of a run's name before columns are dropped.
_NAME_LEAST = 8


def _when(line: dict[str, Any]) -> str:
    return datetime.fromtimestamp(line["time"]).strftime("%m-%d %H:%M:%S")


def _step(run: dict[str, Any]) -> str:
    if run["step"] is None:
        return ""
    return f"{run['step']:,}" + (f"/{run['steps']:,}" if run["steps"] is not None else "")


def _best(run: dict[str, Any]) -> str:
    return f"{run['best']['metric']} {run['best']['value']:.4f}" if run["best"] else ""


def _ago(run: dict[str, Any]) -> str:
    if run["silent_s"] is None:
        return ""
    unit, seconds = next((each for each in _UNITS if run["silent_s"] >= 2 * each[1]), ("s", 1))
    return f"{run['silent_s'] / seconds:.0f} {unit} ago"
