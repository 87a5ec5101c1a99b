"""Shared code of the images."""

import warnings
from pathlib import Path
from typing import Any, TextIO

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erann_dist.errors import UsageError
from jobs.outputs import check_output

# Names of files, classes and runs are drawn literally: matplotlib would parse text between two dollar signs as math.
matplotlib.rcParams["text.parse_math"] = False
# Fallbacks for letters that matplotlib's own font lacks; those that are installed are used.
_FURTHER_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "IPAGothic")
_INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _FURTHER_FONTS if name in _INSTALLED)]

INK, SOFT, GRID, FILL, PALE = "#1f2933", "#66757f", "#dfe5e9", "#3b7ea1", "#a9c8d8"


def new_figure(path: Path, width: float, height: float) -> Figure:
    """A figure, its size in inches, that can be written to the path.

    Raises UsageError if the suffix is not an image format or the path is a folder, UserError if it can't be written.
    """
    check_output(path)
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"{path}: not an image format; give FILE.png")
    return figure


def save_figure(figure: Figure, to: Path | TextIO, **settings: Any) -> None:
    """Write the image, with savefig's settings; letters that no font has become boxes. Raises OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(to, **{"dpi": 110, **settings})


def shortened(name: str, width: int = 60) -> str:
    """The name, shortened in the middle to fit into a title."""
    return name if len(name) <= width else f"{name[: width // 2]}…{name[-(width // 2 - 1) :]}"


def plain(axes: Axes) -> None:
    """Remove the axes' frame, and draw the tick labels in ink."""
    axes.tick_params(colors=SOFT, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
