"""The `erann` command."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from erann_dist.errors import UserError
from jobs.progress import RunView, console
from jobs.show import demo_page, evaluation_page, facts_page, packed_page, show, tags_page

app = typer.Typer(
    name="erann",
    help="Train ERANN audio taggers on AudioSet, from audio files to tar shards to an evaluated model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
pack_app = typer.Typer(no_args_is_help=True, help="Pack a data set into a shard set.", rich_markup_mode="markdown")
app.add_typer(pack_app, name="pack")

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout at the end, and nothing else there.")
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster; without one, an embedded one is started.")]
Out = Annotated[Path, typer.Option(help="Folder of the shard set.")]
ClipsPerShard = Annotated[int, typer.Option(min=1, help="Clips in a tar; 2500 clips of 10 s are about 1 GB.")]
Launcher = Literal["ray", "torchrun", "none"]

_EXAMPLE = "\n\nExample:\n\n    "


@pack_app.command(
    "audioset",
    help="Pack AudioSet clips, listed in AudioSet's own CSV, under any of the usual file names and formats."
    + _EXAMPLE
    + "erann pack audioset --segments demo/audioset/train_segments.csv --audio demo/audioset/audio "
    "--classes demo/audioset/class_labels_indices.csv --out shard-sets/demo-train",
)
def pack_audioset(
    segments: Annotated[Path, typer.Option(help="AudioSet's segment list, such as balanced_train_segments.csv[.gz].")],
    audio: Annotated[Path, typer.Option(help="Folder of the clips, nested or flat.")],
    out: Out,
    classes: Annotated[Path | None, typer.Option(help="class_labels_indices.csv; AudioSet's 527 if not given.")] = None,
    clips_per_shard: ClipsPerShard = 2500,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from jobs.pack import pack
    from shards.sources.audioset import CLASSES, read_audioset

    with console.status(f"reading {segments}"):
        source = read_audioset(segments, audio, classes or CLASSES)
    show(pack(source, out, clips_per_shard, address), as_json, packed_page)


@pack_app.command(
    "esc50",
    help="Pack ESC-50, or its subset ESC-10, with the official folds."
    + _EXAMPLE
    + "erann pack esc50 --root ../shared/data/esc10 --esc10 --out shard-sets/esc10",
)
def pack_esc50(
    root: Annotated[Path, typer.Option(help="The folder that holds meta/esc50.csv and audio/.")],
    out: Out,
    esc10: Annotated[bool, typer.Option("--esc10", help="Only the ten classes of ESC-10.")] = False,
    clips_per_shard: ClipsPerShard = 2500,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from jobs.pack import pack
    from shards.sources.esc50 import read_esc50

    show(pack(read_esc50(root, esc10), out, clips_per_shard, address), as_json, packed_page)


@app.command(
    help="Check a shard set's tars against its manifest: names, sizes, offsets, checksums."
    + _EXAMPLE
    + "erann verify shard-sets/esc10",
)
def verify(
    shards: Annotated[Path, typer.Argument(help="Folder of the shard set.")],
    as_json: Json = False,
) -> None:
    from jobs.verify import verify as run

    show(run(shards), as_json, facts_page)


@app.command(
    help="Train by a recipe, from the run's last checkpoint if there is one. Keys of the recipe are set behind it."
    + _EXAMPLE
    + "erann pretrain esc10.yaml run.name=esc10-short optim.epochs=2",
)
def pretrain(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of one that comes with this program.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        typer.Option(help="From the last checkpoint if there is one; refuse a run that exists; refuse to start anew."),
    ] = "auto",
    launcher: Annotated[
        Launcher | None, typer.Option(help="Who starts the workers: run.launcher of the recipe.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from cluster.launch import is_first_process
    from erann_dist.recipe import load_recipe
    from jobs.pretrain import pretrain as run
    from jobs.recipes import find_recipe

    settings = [*(overrides or []), *([f"run.launcher={launcher}"] if launcher else [])]
    loaded = load_recipe(find_recipe(recipe), settings)
    try:
        with RunView() as view:
            result = run(loaded, resume, address, view)
    except KeyboardInterrupt:
        console.print(f"stopped; run the same command again to go on from the last checkpoint in {loaded.run_dir}")
        raise
    if is_first_process():
        show(result, as_json, facts_page)


@app.command(
    help="Score every clip of a shard set once with a trained model: mAP, mAUC, d′, or accuracy and confusion matrix."
    + _EXAMPLE
    + "erann evaluate runs/esc10/model shard-sets/esc10 --fold 5",
)
def evaluate(
    model: Annotated[Path, typer.Argument(help="Model folder, such as a run's model/.")],
    shards: Annotated[str, typer.Argument(help="Folder of the shard set.")],
    split: Annotated[str | None, typer.Option(help="Only the clips of this split.")] = None,
    fold: Annotated[list[int] | None, typer.Option(help="Only the clips of this fold; may be given again.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; MODEL/evaluations/<name of the set> if not given.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    launcher: Annotated[Launcher | None, typer.Option(help="none for one worker, else ray, if not given.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    as_json: Json = False,
) -> None:
    from cluster.launch import is_first_process
    from erann_dist.recipe import DataSource
    from jobs.evaluate import evaluate as run

    source = DataSource(url=shards, split=split, fold=fold or None)
    part = "".join([f"-{split}" if split else "", *(f"-fold{number}" for number in fold or [])])
    out = out or model / "evaluations" / f"{Path(shards).name}{part}"
    with RunView() as view:
        result = run(model, source, out, launcher or ("none" if workers == 1 else "ray"), workers, device, view)
    if is_first_process():
        show(result, as_json, evaluation_page)


@app.command(
    help="The likeliest labels of sound files of any format."
    + _EXAMPLE
    + "erann tag runs/esc10/model ../shared/data/esc10/audio/1-100032-A-0.ogg",
)
def tag(
    model: Annotated[Path, typer.Argument(help="Model folder, such as a run's model/.")],
    files: Annotated[list[Path], typer.Argument(help="Sound files.")],
    top: Annotated[int, typer.Option(min=1, help="How many labels.")] = 5,
    as_json: Json = False,
) -> None:
    from jobs.evaluate import tag as run

    show(run(model, files, top), as_json, tags_page)


@app.command(
    help="The whole path on a small synthetic AudioSet: make it, pack, verify, pretrain on two workers, evaluate, tag."
    + _EXAMPLE
    + "erann demo",
)
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where everything goes.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    from jobs.demo import demo as run

    show(run(folder), as_json, demo_page)


def main() -> None:
    """The command: a user's error is one line on stderr and an exit code (errors.py), not a traceback."""
    try:
        app()
    except UserError as error:
        console.print(f"erann: {error}", markup=False)
        sys.exit(error.exit_code)
    except OSError as error:  # such as a full disk
        console.print(f"erann: {error.filename or 'system'}: {error.strerror or error}", markup=False)
        sys.exit(UserError.exit_code)


if __name__ == "__main__":
    main()
