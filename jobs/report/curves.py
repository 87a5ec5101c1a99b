"""Curves of one run, or of several runs overlaid, as charts of a page."""

from collections import Counter
from collections.abc import Callable, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from erann_dist.log.run_log import Line
from jobs.html import page
from jobs.html.figure import SOFT
from jobs.runs.plot import KINDS, draw_curve, draw_evaluations, mark_incidents, metric_name, metric_points
from jobs.runs.summary import evaluations

# Colours of overlaid runs, reused if there are more runs; they are distinguishable in light and dark mode.
_COLOURS = "#3b7ea1 #d9822b #5d9a3a #c0504d #8a63b5 #b08d1e #c46aa0 #3fa39b #8c6d54 #7a8691".split()
_SIZE = 4.6, 2.5  # Inches; on a phone, the charts' text is as large as the page's.
_PLACE = (0.13, 0.17, 0.84, 0.78)  # Position of the axes in a chart: left, bottom, width, height.
_METRIC = "metric"  # Key of the evaluations' chart; the others are keys of the Step lines.


def run_curves(lines: Sequence[Line], name: str) -> Markup:
    """A run's loss, evaluations, learning rate and speed, with its incidents. name: unique among the page's curves."""
    steps, incidents, evaluated = _events(lines, "Step"), _events(lines, "Incident"), evaluations(lines)
    counts = Counter(line["kind"] for line in incidents)

    def draw(axes: Axes, key: str) -> None:
        if key == _METRIC:
            draw_evaluations(axes, evaluated)
        else:
            draw_curve(axes, steps, key)
        mark_incidents(axes, incidents)

    legend = [(KINDS[kind], f"{counts[kind]} × {kind.replace('_', ' ')}") for kind in KINDS if counts[kind]]
    # A single evaluation is shown as a figure at the top of the page, not as a curve.
    metric = metric_name(evaluated) if len(metric_points(evaluated)) > 1 else None
    return _charts(name, metric, _last_step(lines), draw, legend)


def curves_of_several(runs: Sequence[tuple[str, Sequence[Line]]], name: str) -> Markup:
    """The same curves of several runs, given by name and log, overlaid."""
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(runs))]
    found = [(_events(lines, "Step"), evaluations(lines)) for _, lines in runs]

    def draw(axes: Axes, key: str) -> None:
        for colour, (steps, evaluated) in zip(colours, found, strict=True):
            if key != _METRIC:
                draw_curve(axes, steps, key, colour, alone=False)
            elif points := metric_points(evaluated):
                axes.plot(
                    *zip(*points, strict=True), color=colour, linewidth=1.3, marker="o", markersize=3.5, clip_on=False
                )

    metric = next((metric_name(evaluated) for _, evaluated in found if len(metric_points(evaluated)) > 1), None)
    last = max((_last_step(lines) for _, lines in runs), default=0)
    return _charts(
        name, metric, last, draw, [(colour, title) for colour, (title, _) in zip(colours, runs, strict=True)]
    )


def _mark_steps(axes: Axes, last: int) -> None:
    """Set the step axis from 0 to the last step, with ticks at round numbers and at the last step."""
    axes.set_xlim(0, max(1, last))
    round_ones = [tick for tick in MaxNLocator(5, integer=True).tick_values(0, max(1, last)) if 0 <= tick < 0.88 * last]
    axes.set_xticks([*round_ones, last] if last else [0, 1])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")  # Centred, it would be cut off.


def _charts(
    name: str,
    metric: str | None,
    last: int,
    draw: Callable[[Axes, str], None],
    legend: Sequence[tuple[str, str]],
) -> Markup:
    """The charts of a page. metric: the title of the evaluations' chart, if there is one. last: the last step."""
    titles = {"loss": "loss", **({_METRIC: metric} if metric else {}), "lr": "learning rate"}
    titles["clips_per_s"] = "clips/s decoded"
    drawings = []
    for key, title in titles.items():
        figure, axes = page.drawing(*_SIZE)
        # The axes have the same position in each chart regardless of its labels, so that the charts of a page align.
        figure.set_layout_engine("none")
        axes.set_position(_PLACE)
        draw(axes, key)
        if key == "clips_per_s":
            axes.set_ylim(bottom=0)
        _mark_steps(axes, last)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axes.set_xlabel("step", color=SOFT, loc="right")
        drawing = page.svg(figure, f"{name}-{key}", f"{title} over the steps")
        drawings.append((title, drawing))
    return page.element("charts", drawings, list(legend))


def _last_step(lines: Sequence[Line]) -> int:
    return max((line["step"] for line in lines if line["event"] in ("Step", "Evaluated")), default=0)


def _events(lines: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["event"] == kind]
