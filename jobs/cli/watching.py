"""The commands that inspect runs and their input."""

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
    url: Annotated[
        str, typer.Argument(help="A folder of runs or the folder of one run: a path or s3://bucket/prefix.")
    ],
    name: Annotated[str | None, typer.Argument(help="Name of one of the listed runs.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot the run's curves to this PNG file.")] = None,
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    from jobs.runs.page import run_page, runs_page
    from jobs.runs.summary import find_run, list_runs, show_run

    if run := find_run(url, name, endpoint):
        show(show_run(*run, endpoint, plot), as_json, run_page)
    elif plot:
        raise UsageError(f"{url}: --plot needs a single run; give its name too")
    else:
        show(list_runs(url, endpoint), as_json, runs_page)


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Folders of runs or studies: paths or s3://bucket/prefix URLs."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file to write. Default: report.html in the first folder.")
    ] = None,
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    from jobs.report.report import report as run

    show(run(runs, out, endpoint), as_json, report_page)


def augment(
    clip: Annotated[Path, typer.Argument(help="An audio file in any format.")],
    out: Annotated[Path, typer.Option(help="The image to write, such as FILE.png.")],
    partner: Annotated[
        Path | None,
        typer.Option("--with", help="The clip to mix it with. Default: the same clip, reversed."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random choices.")] = 0,
    crop_s: Annotated[float, typer.Option(min=0.5, max=60, help="Crop length in seconds.")] = 3.0,
    as_json: Json = False,
) -> None:
    from jobs.report.augment_plot import draw_augmentation

    show(draw_augmentation(clip, partner, out, seed, crop_s), as_json, facts_page)


def add_to(app: typer.Typer) -> None:
    app.command(
        help="List the runs in a folder and their progress; or show one run's starts, incidents, evaluations and "
        "curves."
        + examples(
            "erann runs runs",
            "erann runs s3://bucket/runs audioset --plot audioset.png",
        ),
        rich_help_panel="Runs and clips",
    )(runs)
    app.command(
        help="Write one HTML page about runs or studies: curves, classes, confusion matrix, best and worst clips, "
        "data, hardware.\n\nThe page is self-contained and needs no network."
        + examples(
            "erann report runs/esc10",
            "erann report runs/a runs/b s3://bucket/runs/c --out compared.html",
        ),
        rich_help_panel="Runs and clips",
    )(report)
    app.command(
        help="Plot what augmentation does to a clip: waveform and log-mel before and after temporal crop, pitch "
        "shift, each kind of mixup, and SpecAugment.\n\nThe random choices are those of a run with this seed, except "
        "for the clip's share in mixup, which is 30 to 50 % so that both clips are visible."
        + examples(
            "erann augment ../shared/data/esc10/audio/1-100032-A-0.ogg --out dog.png",
            "erann augment dog.wav --with rain.wav --seed 3 --out dog-in-the-rain.png",
        ),
        rich_help_panel="Runs and clips",
    )(augment)
