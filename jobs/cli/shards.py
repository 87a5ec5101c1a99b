"""The commands that create, check and inspect shard sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from erann_dist.errors import UsageError, UserError
from jobs.cli.options import Address, Endpoint, Json, Shards, examples
from jobs.terminal.progress import console
from jobs.terminal.show import facts_page, packed_page, repaired_page, show, verified_page
from shards.sources.data_sets import DATA_SETS, Options, read_source, read_source_of

if TYPE_CHECKING:
    Kind = str
else:
    Kind = Literal[tuple(DATA_SETS)]

_AUDIOSET = "audioset"
_OTHERS = "esc50, urbansound8k, ravdess, fsd50k, folder"
Segments = Annotated[
    Path | None,
    typer.Option(help="Segment list, such as balanced_train_segments.csv[.gz].", rich_help_panel=_AUDIOSET),
]
Audio = Annotated[
    Path | None,
    typer.Option(
        help="Folder with any mix of audio files, tars of clips and PANNs' HDF5 packs; or a single archive.",
        rich_help_panel=_AUDIOSET,
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(help="class_labels_indices.csv. Default: AudioSet's 527 classes.", rich_help_panel=_AUDIOSET),
]
Root = Annotated[Path | None, typer.Option(help="The data set's folder.", rich_help_panel=_OTHERS)]
Esc10 = Annotated[bool, typer.Option("--esc10", help="esc50: only ESC-10's ten classes.", rich_help_panel=_OTHERS)]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="folder: CSV with path,labels[,split][,fold]. Default: each sub-folder is a class.",
        rich_help_panel=_OTHERS,
    ),
]
_PACKING = "packing"
Quick = Annotated[bool, typer.Option("--quick", help="Compare only sizes and tables, without reading the tars.")]


def pack(
    kind: Annotated[Kind, typer.Argument(metavar="|".join(DATA_SETS), help="The data set.", show_default=False)],
    out: Annotated[str, typer.Option(metavar="URL", help="The shard set: a folder or s3://bucket/prefix.")],
    segments: Segments = None,
    audio: Audio = None,
    classes: Classes = None,
    root: Root = None,
    esc10: Esc10 = False,
    labels: Labels = None,
    clips_per_shard: Annotated[
        int, typer.Option(min=1, help="Clips per tar; 2500 clips of 10 s take about 1 GB.", rich_help_panel=_PACKING)
    ] = 2500,
    codec: Annotated[
        Literal["flac", "wav"],
        typer.Option(
            help="Codec of the clips. WAV decodes faster but takes twice the space.", rich_help_panel=_PACKING
        ),
    ] = "flac",
    order: Annotated[
        Literal["shuffled", "source"], typer.Option(help="Order of the clips in the tars.", rich_help_panel=_PACKING)
    ] = "shuffled",
    sample_rate: Annotated[
        int, typer.Option(min=1000, help="Sample rate in Hz. ERANN requires 44100.", rich_help_panel=_PACKING)
    ] = 44_100,
    min_seconds: Annotated[
        float, typer.Option(min=0, help="Leave out shorter clips; they are reported.", rich_help_panel=_PACKING)
    ] = 0.02,
    skip_silent: Annotated[
        bool,
        typer.Option(
            "--skip-silent", help="Leave out clips below -80 dB; they are reported.", rich_help_panel=_PACKING
        ),
    ] = False,
    channels: Annotated[
        Literal["mean", "left", "loudest"],
        typer.Option(
            help="What several channels become: their mean, the first, or the one with the most energy (slower).",
            rich_help_panel=_PACKING,
        ),
    ] = "mean",
    max_missing: Annotated[
        float, typer.Option(min=0, max=1, help="Exit with code 1 if a larger fraction of the listed clips is missing.")
    ] = 1.0,
    endpoint: Endpoint = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from erann_dist.storage.folder import LocalFolder, open_folder
    from jobs.shard_sets.pack import pack as run
    from jobs.shard_sets.pack import require_coverage
    from shards.clip import Packing

    folder = open_folder(out, endpoint)
    for place in (audio, root):
        if place and isinstance(folder, LocalFolder) and Path(folder.url).absolute().is_relative_to(place.absolute()):
            raise UsageError(f"--out {out}: is inside {place}, the source of the clips; choose another folder")
    with console.status("reading the source"):
        source = read_source(kind, Options(segments, audio, classes, root, esc10, labels))
    packing = Packing(sample_rate, codec, clips_per_shard, order, min_seconds, skip_silent, channels=channels)
    try:
        result = run(source, folder, packing, address)
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to resume with the remaining shards")
        raise
    show(result, as_json, packed_page)
    require_coverage(result, max_missing)


def verify(shards: Shards, quick: Quick = False, endpoint: Endpoint = None, as_json: Json = False) -> None:
    from erann_dist.storage.folder import open_folder
    from jobs.shard_sets.maintenance import verify as run

    show(run(open_folder(shards, endpoint), quick), as_json, verified_page)


def repair(
    shards: Shards,
    segments: Segments = None,
    audio: Audio = None,
    classes: Classes = None,
    root: Root = None,
    labels: Labels = None,
    quick: Quick = False,
    endpoint: Endpoint = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from erann_dist.data.manifest import read_info
    from erann_dist.storage.folder import open_folder
    from jobs.shard_sets.maintenance import repair as run

    folder = open_folder(shards, endpoint)
    info = read_info(folder)
    if not info.packing:
        raise UserError(f"{folder}: its tars were not made by erann pack, so they can't be rebuilt")
    with console.status("reading the source"):
        source = read_source_of(info.name, Options(segments, audio, classes, root, labels=labels))
    show(run(folder, source, quick, address), as_json, repaired_page)


def index(shards: Shards, classes: Classes = None, endpoint: Endpoint = None, as_json: Json = False) -> None:
    from erann_dist.storage.folder import open_folder
    from jobs.shard_sets.maintenance import index as run
    from shards.sources.audioset import read_classes

    folder = open_folder(shards, endpoint)
    show(run(folder, read_classes(classes) if classes else None), as_json, packed_page)


def stage(
    shards: Shards,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The copy: a folder on a disk of this machine.")],
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    from erann_dist.storage.folder import LocalFolder, open_folder
    from jobs.shard_sets.maintenance import stage as run

    folder = open_folder(directory)
    if not isinstance(folder, LocalFolder):
        raise UsageError(f"{directory}: a set is copied to a local folder, not to S3")
    try:
        result = run(open_folder(shards, endpoint), folder)
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to resume")
        raise
    show(result, as_json, facts_page)


def stats(
    shards: Shards,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page with plots to this file.")] = None,
    examples: Annotated[
        int, typer.Option(min=1, help="Training examples for which balanced sampling is computed.")
    ] = 16_000_000,
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    from erann_dist.storage.folder import open_folder
    from jobs.shard_sets.stats import stats as run
    from jobs.shard_sets.stats import stats_page

    show(run(open_folder(shards, endpoint), examples, html), as_json, stats_page)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(
        help="Pack a data set into a shard set: tars and a manifest, in a folder or in S3.\n\nIf it is interrupted, "
        "run the same command again to resume."
        + examples(
            "erann pack audioset --segments eval_segments.csv --audio AUDIO --out s3://bucket/eval",
            "erann pack esc50 --root ../shared/data/esc10 --esc10 --out shard-sets/esc10",
            "erann pack urbansound8k --root ../shared/data/urbansound8k --out shard-sets/urbansound8k",
            "erann pack ravdess --root ../shared/data/ravdess --out shard-sets/ravdess",
            "erann pack folder --root ../shared/data/formats --out shard-sets/formats",
        ),
        rich_help_panel="Shard sets",
    )(pack)
    app.command(
        help="Check a shard set against its manifest by reading every tar and decoding every clip."
        + examples(
            "erann verify shard-sets/esc10",
        ),
        rich_help_panel="Shard sets",
    )(verify)
    app.command(
        help="Verify a shard set, and rebuild damaged or missing shards from the source, byte for byte."
        + examples(
            "erann repair shard-sets/esc10 --root ../shared/data/esc10",
        ),
        rich_help_panel="Shard sets",
    )(repair)
    app.command(
        help="Write a manifest for existing WebDataset tars, without repacking them."
        + examples(
            "erann index shard-sets/theirs",
        ),
        rich_help_panel="Shard sets",
    )(index)
    app.command(
        help="Copy a whole shard set from S3 or a shared disk to a local disk, checking every tar.\n\nIf it is "
        "interrupted, run the same command again to resume."
        + examples(
            "erann stage s3://bucket/audioset/balanced_train /local/balanced_train",
        ),
        rich_help_panel="Shard sets",
    )(stage)
    app.command(
        help="Show the statistics of a shard set: coverage, classes, durations, formats, clips not packed, balanced "
        "sampling."
        + examples(
            "erann stats shard-sets/esc10 --html esc10.html",
        ),
        rich_help_panel="Shard sets",
    )(stats)
