"""The commands that look at runs and at what goes into them."""

from pathlib import Path
from typing import Annotated

import typer

from erann_dist.errors import UsageError
from jobs.cli.options import Endpoint, Json, examples
from jobs.terminal.show import (
    facts_page,
    report_page,
    show,
)


def runs(
    url: Annotated[str, typer.Argument(help="Folder of runs, or a run's own: a path or s3://bucket/prefix.")],
    name: Annotated[str | None, typer.Argument(help="The run, as the list names it.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the run's curves to this PNG file.")] = None,
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    from jobs.runs.page import run_page, runs_page
    from jobs.runs.summary import find_run, list_runs, show_run

    if run := find_run(url, name, endpoint):
        show(show_run(*run, endpoint, plot), as_json, run_page)
    elif plot:
        raise UsageError(f"{url}: --plot draws one run; give its name too")
    else:
        show(list_runs(url, endpoint), as_json, runs_page)


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="A run's folder or a study's: a path or s3://bucket/prefix.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; report.html in the first folder if not given.")
    ] = None,
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    from jobs.report.report import report as run

    show(run(runs, out, endpoint), as_json, report_page)


def augment(
    clip: Annotated[Path, typer.Argument(help="A sound file of any format.")],
    out: Annotated[Path, typer.Option(help="The image to write, such as FILE.png.")],
    partner: Annotated[
        Path | None,
        typer.Option("--with", help="The clip to mix it with; the clip itself, backwards, if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    crop_s: Annotated[float, typer.Option(min=0.5, max=60, help="Length of the crops.")] = 3.0,
    as_json: Json = False,
) -> None:
    from jobs.report.augment_plot import draw_augmentation

    show(draw_augmentation(clip, partner, out, seed, crop_s), as_json, facts_page)


def add_to(app: typer.Typer) -> None:
    app.command(
        help="How the runs below a folder stand; or of one run its starts, incidents and evaluations, and its curves."
        + examples(
            "erann runs runs",
            "erann runs s3://bucket/runs audioset --plot audioset.png",
        ),
    )(runs)
    app.command(
        help="One HTML page about runs or studies: curves, classes, confusion matrix, the worst and the best "
        "clips, data, machine. It needs no network."
        + examples(
            "erann report runs/esc10",
            "erann report runs/a runs/b s3://bucket/runs/c --out compared.html",
        ),
    )(report)
    app.command(
        help="What augmentation does to a clip, as an image: waveform and log-mel before and after temporal "
        "crop, pitch shift, each kind of mixup and SpecAugment. The random choices are a run's with this "
        "seed, but for mixup's share of the clip: 30 to 50 %, so that both show."
        + examples(
            "erann augment ../shared/data/esc10/audio/1-100032-A-0.ogg --out dog.png",
            "erann augment dog.wav --with rain.wav --seed 3 --out dog-in-the-rain.png",
        ),
    )(augment)
