"""What the images have in common."""

import warnings
from pathlib import Path
from typing import Any, TextIO

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from erann_dist.errors import UsageError
from jobs.outputs import check_output

# Names of files, classes and runs are drawn as they are: matplotlib would parse what is between two dollar signs.
matplotlib.rcParams["text.parse_math"] = False
# For the letters that matplotlib's own font does not have, whichever of these the machine has.
_FURTHER_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "IPAGothic")
_INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
matplotlib.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _FURTHER_FONTS if name in _INSTALLED)]

INK, SOFT, GRID, FILL, PALE = "#1f2933", "#66757f", "#dfe5e9", "#3b7ea1", "#a9c8d8"


def new_figure(path: Path, width: float, height: float) -> Figure:
    """A figure, in inches, that can be written to the path.

    Raises UsageError if its ending is no kind of image, or it is a folder; UserError if nothing can be written there.
    """
    check_output(path)
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    if path.suffix[1:].lower() not in figure.canvas.get_supported_filetypes():
        raise UsageError(f"{path}: not a kind of image; give FILE.png")
    return figure


def save_figure(figure: Figure, to: Path | TextIO, **settings: Any) -> None:
    """Write the image, by savefig's settings; a letter that no font has is a box in it. Raises OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(to, **{"dpi": 110, **settings})


def shortened(name: str, width: int = 60) -> str:
    """A name that fits into a title: of a longer one the beginning and the end."""
    return name if len(name) <= width else f"{name[: width // 2]}…{name[-(width // 2 - 1) :]}"


def plain(axes: Axes) -> None:
    """Without a frame, and its ticks' labels in ink."""
    axes.tick_params(colors=SOFT, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
