"""What is drawn: names from outside stand in a picture as they are."""

import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import soundfile

from erann_dist.log.events import Evaluated
from erann_dist.log.run_log import as_line
from jobs.html.figure import new_figure, save_figure, shortened
from jobs.report.augment_plot import draw_augmentation
from jobs.runs.plot import draw_run
from tests.support.run_logs import step

NAMES = [r"a$\badcmd$", "$x^2$", "a_b^c", r"\frac{", "100 %$", r"\$5$", "日本語", "x" * 200]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_drawn_as_it_is(tmp_path: Path, name: str) -> None:
    figure = new_figure(tmp_path / "x.svg", 40, 40)
    axes = figure.subplots()
    texts = [axes.set_title(name), axes.set_xlabel(name), axes.text(0, 0, name), figure.suptitle(name)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_figure(figure, tmp_path / "x.svg")
    assert [text.get_parse_math() for text in texts] == [False] * 4


@pytest.mark.parametrize("name", NAMES)
def test_curves_of_a_run_of_any_name(tmp_path: Path, name: str) -> None:
    lines = [as_line(event, 1.0) for event in (step(1), Evaluated(1, 3, {name: 0.5}))]
    draw_run(lines, name, tmp_path / "x.png")
    assert matplotlib.image.imread(tmp_path / "x.png").ndim == 3


def test_augmentation_of_a_clip_of_any_name(tmp_path: Path) -> None:
    clip, partner = tmp_path / r"a$\badcmd$_^日本語.wav", tmp_path / f"{'$' * 200}.wav"
    for path in (clip, partner):
        soundfile.write(path, np.zeros(22050), 44100)
    draw_augmentation(clip, partner, tmp_path / "x.png", 0, 0.5)
    assert matplotlib.image.imread(tmp_path / "x.png").ndim == 3


def test_a_shortened_name_keeps_its_beginning_and_end() -> None:
    assert shortened("a" * 60) == "a" * 60
    assert shortened("a" * 60 + "b" * 60) == "a" * 30 + "…" + "b" * 29
