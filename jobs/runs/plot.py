"""A run's curves as an image: loss, learning rate, evaluations, speed, with its incidents."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from erann_dist.log.events import IncidentKind
from erann_dist.log.run_log import Line
from jobs.html.figure import FILL, GRID, INK, PALE, SOFT, new_figure, plain, save_figure, shortened

_AVERAGED, _WAIT = "#8a5aa8", "#c9a227"
KINDS: dict[IncidentKind, str] = {
    "failure": "#c0392b",
    "preemption": "#d9822b",
    "stop": "#4a6fa5",
    "resize": "#5d8a3a",
    "checkpoint": "#7d5ba6",
    "evaluation": "#c2478a",
    "bad_step": INK,
    "log": "#2a9d8f",
    "cache": "#8b8f94",
    "storage": "#3d7ea6",
    "bad_clip": "#b08968",
}
_DASHES = (0, (4, 3))
_SMOOTH = 60  # From this number of points on, a running mean is drawn over them.
_POINTS = 1000  # Approximate maximum number of points drawn.


def draw_run(lines: Sequence[Line], title: str, path: Path) -> None:
    """Write the image, in the format of the path's suffix. Raises UsageError for an unknown format, OSError."""
    figure = new_figure(path, 11, 11.5)
    axes = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1.3, 2.4, 2.4]})
    loss, rate, evaluation, speed = axes
    steps, evaluations, incidents = (
        [line for line in lines if line["event"] == kind] for kind in ("Step", "Evaluated", "Incident")
    )
    loss.set_title(shortened(title, 90), loc="left", fontsize=13, fontweight="bold", color=INK, pad=30)
    for each, key, label in (
        (loss, "loss", "loss"),
        (rate, "lr", "learning rate"),
        (speed, "examples_per_s", "examples/s"),
    ):
        draw_curve(each, steps, key)
        each.set_ylabel(label, color=INK)
    draw_evaluations(evaluation, evaluations)
    evaluation.set_ylabel(shortened(metric_name(evaluations) or "evaluation", 24), color=INK)
    speed.set_ylim(bottom=0)
    speed.set_xlabel("step", color=INK)
    speed.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _draw_wait(speed, steps)
    for each in axes:
        mark_incidents(each, incidents)
        each.grid(color=GRID, linewidth=0.8)
        each.set_axisbelow(True)
        plain(each)
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    speed.set_xlim(left=0)
    figure.align_ylabels()
    _explain(loss, incidents)
    save_figure(figure, path)


def draw_curve(axes: Axes, steps: Sequence[Line], key: str, color: str = FILL, *, alone: bool = True) -> None:
    """Draw a value of the Step lines; with many points, their running mean (on top of them if the curve is alone)."""
    points = [(line["step"], line[key]) for line in steps if line[key] is not None]
    if not points:
        return
    x, y = np.array(points).T
    curve, some = y, slice(None, None, len(x) // _POINTS + 1)
    if len(x) >= _SMOOTH and key != "lr":
        width = len(x) // 60 + 1
        # At the ends the mean is over fewer points.
        curve = np.convolve(y, np.ones(width), "same") / np.convolve(np.ones(len(y)), np.ones(width), "same")
        if alone:
            axes.plot(x[some], y[some], color=PALE, linewidth=1.0)
            # A few outliers, as at the start of a run, must not flatten the rest.
            low, high = np.quantile(y, [0.001, 0.995])
            axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
    marker = "o" if len(x) == 1 else None
    axes.plot(x[some], curve[some], color=color, linewidth=1.8 if alone else 1.3, marker=marker)


def metric_name(evaluations: Sequence[Line]) -> str | None:
    """The first metric, by which the best evaluation is chosen."""
    return next((name for line in evaluations for name in line["metrics"]), None)


def metric_points(evaluations: Sequence[Line], *, averaged: bool = False) -> list[tuple[int, float]]:
    """Steps and values of the first metric, for the run's own weights or for averaged ones."""
    name = metric_name(evaluations)
    own = [line for line in evaluations if bool(line.get("averaged")) == averaged]
    return [(line["step"], line["metrics"][name]) for line in own if line["metrics"].get(name) is not None]


def draw_evaluations(axes: Axes, evaluations: Sequence[Line]) -> None:
    """Draw the first metric of the Evaluated lines; the best one is labelled with its value."""
    for averaged, color, label, above in (
        (False, FILL, "the run's weights", -15),
        (True, _AVERAGED, "mean of the last checkpoints' weights", 8),
    ):
        if points := metric_points(evaluations, averaged=averaged):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=5, label=label, clip_on=False)
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
    if any(line.get("averaged") for line in evaluations):
        axes.legend(loc="lower right", frameon=False, labelcolor=INK)
    if not evaluations:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color=SOFT)
        axes.set_yticks([])


def mark_incidents(axes: Axes, incidents: Sequence[Line]) -> None:
    """Draw a dashed line at each incident, and shade the steps that were computed twice."""
    for line in incidents:
        color, step = KINDS[line["kind"]], line["step"]
        axes.axvline(step, color=color, linewidth=1.1, linestyle=_DASHES, zorder=1)
        if line.get("steps_lost"):
            axes.axvspan(step, step + line["steps_lost"], color=color, alpha=0.12, linewidth=0, zorder=0)


def _draw_wait(axes: Axes, lines: Sequence[Line]) -> None:
    """Draw the share of time spent waiting for data, on a separate axis on the right."""
    wait = axes.twinx()
    x, y = [line["step"] for line in lines], [line["data_wait"] for line in lines]
    wait.fill_between(x, y, color=_WAIT, alpha=0.35, linewidth=0)
    wait.set_ylim(0, max(0.05, *y, 0.0) * 2)  # It fills at most the lower half.
    wait.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    wait.yaxis.set_major_locator(MaxNLocator(4))
    wait.set_ylabel("waiting for data", color=_WAIT)
    wait.tick_params(colors=_WAIT)
    for spine in wait.spines.values():
        spine.set_visible(False)


def _explain(axes: Axes, incidents: Sequence[Line]) -> None:
    """Add a legend of the vertical lines above the first curve."""
    counts = Counter(line["kind"] for line in incidents)
    handles = [
        Line2D([], [], color=color, linestyle=_DASHES, label=f"{counts[kind]} × {kind.replace('_', ' ')}")
        for kind, color in KINDS.items()
        if counts[kind]
    ]
    if handles:
        axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=len(handles),
            frameon=False,
            labelcolor=INK,
            handlelength=1.6,
        )
