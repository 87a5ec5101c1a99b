"""The benchmark commands."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import Json, Launcher, Shards, examples
from jobs.terminal.show import (
    facts_page,
    show,
)


def bench_pack(
    audio: Annotated[Path | None, typer.Option(help="Folder of audio files; default: a synthetic AudioSet.")] = None,
    clips: Annotated[int, typer.Option(min=1, help="Clips per round; files are reused as needed.")] = 10_000,
    clips_per_shard: Annotated[int, typer.Option(min=1, help="Clips per tar.")] = 2500,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; the median is reported.")] = 3,
    as_json: Json = False,
) -> None:
    from jobs.bench.packing import bench_pack as run

    show(run(audio, clips, rounds, clips_per_shard), as_json, facts_page)


def bench_loader(
    shards: Annotated[str, typer.Argument(help="A shard set on a local disk, with clips of about 10 s.")],
    batches: Annotated[int, typer.Option(min=2, help="Batches of 32 crops; the first fifth is not counted.")] = 120,
    crop_s: Annotated[float, typer.Option(min=0.1, help="Crop length in seconds.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; the median is reported.")] = 3,
    as_json: Json = False,
) -> None:
    from jobs.bench.loading import bench_loader as run

    show(run(shards, batches, crop_s, rounds), as_json, facts_page)


def bench_augment(
    variant: Annotated[str, typer.Option(help="Model whose training step is the reference.")] = "ERANN-1-3",
    crop_s: Annotated[float, typer.Option(min=0.5, help="Crop length in seconds.")] = 3.0,
    clips: Annotated[int, typer.Option(min=1, help="Clips that share a shift, as in a micro-batch.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; the median is reported.")] = 5,
    as_json: Json = False,
) -> None:
    from jobs.bench.augmentation import bench_augment as run

    show(run(variant, crop_s, clips, rounds), as_json, facts_page)


def bench_sampler(
    segments: Annotated[list[Path], typer.Argument(help="AudioSet segment lists; each stands for one shard set.")],
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; the median is reported.")] = 3,
    as_json: Json = False,
) -> None:
    from jobs.bench.sampling import bench_sampler as run

    show(run(segments, rounds), as_json, facts_page)


def bench_plan(
    segments: Annotated[Path, typer.Argument(help="AudioSet segment list.")],
    missing: Annotated[float, typer.Option(min=0, max=1, help="Fraction of the audio files that is missing.")] = 0.07,
    as_json: Json = False,
) -> None:
    from jobs.bench.packing import bench_plan as run

    show(run(segments, missing), as_json, facts_page)


def bench_kills(
    shards: Shards,
    kills: Annotated[int, typer.Option(min=1, help="Number of kills; with --every, the maximum.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed for the times of the kills.")] = 0,
    steps: Annotated[int, typer.Option(min=10, help="Steps per run.")] = 60,
    every: Annotated[
        float | None,
        typer.Option(
            min=1, help="Instead, one run with a kill every so many seconds: alternately a node and a worker."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    from jobs.bench.kills import bench_kills as run
    from jobs.bench.kills import kills_page

    show(run(shards, kills, seed, steps, every), as_json, kills_page)


def bench_train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a built-in recipe.")] = (
        Path("demo.yaml")
    ),
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    launcher: Annotated[
        Launcher | None,
        typer.Option(help="Launcher of the whole job, overriding the recipe's run.launcher. none: 1 worker."),
    ] = None,
    steps: Annotated[int, typer.Option(min=3, help="Measured steps per turn; a multiple of three.")] = 9,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds; the median is reported.")] = 5,
    job_rounds: Annotated[int, typer.Option(min=1, help="Rounds of the whole job, which is started in each.")] = 3,
    table: Annotated[
        bool,
        typer.Option(
            "--table",
            help="Instead, measure speed and FLOP utilisation of ERANN-1-6 and ERANN-2-5 on an NVIDIA GPU, by "
            "micro-batch, precision, compilation and memory format, for the recipe's crop length and classes.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    from erann_dist.recipe import load_recipe
    from jobs.bench import training, training_table
    from jobs.recipes import find_recipe

    alone = ["run.workers=1"] if launcher == "none" else []
    # Only speed is measured, so the training and evaluation clips may overlap.
    alone.append("data.allow_overlap=true")
    settings = [*alone, *(overrides or []), *([f"run.launcher={launcher}"] if launcher else [])]
    loaded = load_recipe(find_recipe(recipe), settings)
    if table:
        training_table.require_gpu()
        names = training_table.VARIANTS, training_table.MICRO_BATCHES, training_table.PRECISIONS
        lines = list(training_table.settings(*names))
        show(training_table.bench_table(loaded, lines), as_json, training_table.table_page)
    else:
        show(training.bench_train(loaded, steps, rounds, job_rounds), as_json, training.training_page)


def add_to(app: typer.Typer) -> None:
    bench = typer.Typer(
        no_args_is_help=True,
        help="Benchmark parts of the system against baselines in the same run.",
        rich_markup_mode="markdown",
    )
    app.add_typer(bench, name="bench", rich_help_panel="Measurements")
    bench.command(
        "pack",
        help="Benchmark packing against bare decoding, resampling and FLAC encoding of the same clips on the same "
        "cores."
        + examples(
            "erann bench pack --audio ../shared/data/esc10/audio",
        ),
    )(bench_pack)
    bench.command(
        "loader",
        help="Benchmark the loader reading from disk, S3 and the cache against bare decoding, webdataset's WebLoader "
        "and PyTorch's DataLoader, on the same shards and cores."
        + examples(
            "erann bench loader demo/shards/train",
        ),
    )(bench_loader)
    bench.command(
        "augment",
        help="Benchmark pitch shift: the cost per clip of torchaudio's function and of ours, next to that of the "
        "front end and of a training example, on one core."
        + examples(
            "erann bench augment --variant ERANN-1-3",
        ),
    )(bench_augment)
    bench.command(
        "sampler",
        help="Benchmark the sample plan at full size: time and memory to build it, draws per second, cost of a jump."
        + examples(
            "erann bench sampler ../shared/data/audioset/unbalanced_train_segments.csv.gz "
            "../shared/data/audioset/balanced_train_segments.csv",
        ),
    )(bench_sampler)
    bench.command(
        "plan",
        help="Benchmark packing's plan, manifest and report at the full size of a real segment list, with linked "
        "audio files."
        + examples(
            "erann bench plan ../shared/data/audioset/unbalanced_train_segments.csv.gz",
        ),
    )(bench_plan)
    bench.command(
        "kills",
        help="Kill a worker, all workers, the command itself and a node, one after another at random times, and "
        "compare with an undisturbed run.\n\nReports whether the weights are bit-identical, and the steps and time "
        "lost. Uses two workers on this machine's CPU."
        + examples(
            "erann bench kills demo/shards/train",
            "erann bench kills demo/shards/train --every 60 --steps 2000",
        ),
    )(bench_kills)
    bench.command(
        "train",
        help="Benchmark the training loop, DeepSpeed and the whole job under Ray or torchrun against a bare PyTorch "
        "loop.\n\nThe measurements are interleaved, and made with the recipe's model and with a null model, which "
        "shows what each layer costs."
        + examples(
            "erann bench train demo.yaml run.workers=2",
            "erann bench train audioset.yaml --table",
        ),
    )(bench_train)
