"""What the images have in common."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erann_dist.errors import UsageError

INK, SOFT, GRID, FILL, PALE = "#1f2933", "#66757f", "#dfe5e9", "#3b7ea1", "#a9c8d8"


def new_figure(path: Path, width: float, height: float) -> Figure:
    """A figure, in inches, that can be written to the path. Raises UsageError if its ending is no kind of image."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"{path}: not a kind of image; give FILE.png")
    return figure


def plain(axes: Axes) -> None:
    """Without a frame, and its ticks' labels in ink."""
    axes.tick_params(colors=SOFT, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
