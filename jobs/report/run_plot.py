"""A run's curves as an image: loss, learning rate, evaluations, speed, with its incidents."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from erann_dist.errors import UsageError
from erann_dist.events import IncidentKind
from erann_dist.run_log import Line

_INK, _SOFT, _GRID, _FILL, _PALE = "#1f2933", "#66757f", "#dfe5e9", "#3b7ea1", "#a9c8d8"
_AVERAGED, _WAIT = "#8a5aa8", "#c9a227"
_KINDS: dict[IncidentKind, str] = {
    "failure": "#c0392b",
    "preemption": "#d9822b",
    "resize": "#5d8a3a",
    "checkpoint": "#7d5ba6",
    "bad_step": "#111111",
    "log": "#2a9d8f",
    "cache": "#8b8f94",
    "bad_clip": "#b08968",
}
_DASHES = (0, (4, 3))
_SMOOTH = 60  # points from which on a running mean is drawn over them


def draw_run(lines: Sequence[Line], title: str, path: Path) -> None:
    """Write the image; its name's ending says of which kind. Raises UsageError for an unknown one, OSError."""
    figure = Figure(figsize=(11, 11.5), layout="constrained", facecolor="white")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"{path}: not a kind of image; give FILE.png")
    axes = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1.3, 2.4, 2.4]})
    loss, rate, evaluation, speed = axes
    steps, evaluations, incidents = (
        [line for line in lines if line["event"] == kind] for kind in ("Step", "Evaluated", "Incident")
    )
    loss.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=30)
    _draw_curve(loss, steps, "loss", "loss")
    _draw_curve(rate, steps, "lr", "learning rate")
    _draw_evaluations(evaluation, evaluations)
    _draw_curve(speed, steps, "examples_per_s", "examples/s")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("step", color=_INK)
    speed.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _draw_wait(speed, steps)
    for each in axes:
        for line in incidents:
            color, step = _KINDS[line["kind"]], line["step"]
            each.axvline(step, color=color, linewidth=1.1, linestyle=_DASHES, zorder=1)
            if line.get("steps_lost"):  # they were computed twice
                each.axvspan(step, step + line["steps_lost"], color=color, alpha=0.12, linewidth=0, zorder=0)
        each.grid(color=_GRID, linewidth=0.8)
        each.set_axisbelow(True)
        each.tick_params(colors=_SOFT, labelcolor=_INK)
        for spine in each.spines.values():
            spine.set_visible(False)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    speed.set_xlim(left=0)
    figure.align_ylabels()
    _explain(loss, incidents)
    figure.savefig(path, dpi=110)


def _draw_curve(axes: Axes, lines: Sequence[Line], key: str, label: str) -> None:
    axes.set_ylabel(label, color=_INK)
    points = [(line["step"], line[key]) for line in lines if line[key] is not None]
    if not points:
        return
    x, y = np.array(points).T
    if len(x) < _SMOOTH or key == "lr":
        axes.plot(x, y, color=_FILL, linewidth=1.8)
        return
    width = len(x) // 60 + 1
    # At the ends the mean is over what there is.
    mean = np.convolve(y, np.ones(width), "same") / np.convolve(np.ones(len(y)), np.ones(width), "same")
    axes.plot(x, y, color=_PALE, linewidth=0.8)
    axes.plot(x, mean, color=_FILL, linewidth=1.8)
    # A few wild values, as at the start of a run, must not flatten the rest.
    low, high = np.quantile(y, [0.001, 0.995])
    axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _draw_evaluations(axes: Axes, lines: Sequence[Line]) -> None:
    name = next((name for line in lines for name in line["metrics"]), "evaluation")
    axes.set_ylabel(name, color=_INK)
    for averaged, color, label, above in (
        (False, _FILL, "the run's weights", -15),
        (True, _AVERAGED, "mean of the last checkpoints' weights", 8),
    ):
        found = [line for line in lines if bool(line.get("averaged")) == averaged]
        points = [(line["step"], line["metrics"][name]) for line in found if line["metrics"].get(name) is not None]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=5, label=label)
            best = int(np.argmax(y))
            axes.annotate(
                f"{y[best]:.4f}",
                (x[best], y[best]),
                xytext=(0, above),
                textcoords="offset points",
                ha="center",
                color=color,
                fontweight="bold",
            )
    axes.margins(y=0.2)
    if any(line.get("averaged") for line in lines):
        axes.legend(loc="lower right", frameon=False, labelcolor=_INK)
    if not lines:
        axes.text(0.5, 0.5, "no evaluation so far", transform=axes.transAxes, ha="center", color=_SOFT)
        axes.set_yticks([])


def _draw_wait(axes: Axes, lines: Sequence[Line]) -> None:
    """On an axis of its own on the right."""
    wait = axes.twinx()
    x, y = [line["step"] for line in lines], [line["data_wait"] for line in lines]
    wait.fill_between(x, y, color=_WAIT, alpha=0.35, linewidth=0)
    wait.set_ylim(0, max(0.05, *y, 0.0) * 2)  # in the lower half
    wait.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    wait.yaxis.set_major_locator(MaxNLocator(4))
    wait.set_ylabel("waiting for data", color=_WAIT)
    wait.tick_params(colors=_WAIT)
    for spine in wait.spines.values():
        spine.set_visible(False)


def _explain(axes: Axes, incidents: Sequence[Line]) -> None:
    """What the vertical lines are, above the first curve."""
    counts = Counter(line["kind"] for line in incidents)
    handles = [
        Line2D([], [], color=color, linestyle=_DASHES, label=f"{counts[kind]} × {kind.replace('_', ' ')}")
        for kind, color in _KINDS.items()
        if counts[kind]
    ]
    if handles:
        axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=len(handles),
            frameon=False,
            labelcolor=_INK,
            handlelength=1.6,
        )
