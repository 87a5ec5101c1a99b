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
_PLACE_HELP = "Default: labels or label in the JSON, else cls, else txt."
_FOLDER = "folder: your own files"
Segments = Annotated[
    Path | None,
    typer.Option(help="Segment list, such as balanced_train_segments.csv[.gz].", rich_help_panel=_AUDIOSET),
]
Audio = Annotated[
    Path | None,
    typer.Option(
        help="Folder with any mix of audio files and archives (tar, zip, Parquet, HDF5); or a single archive.",
        rich_help_panel=_AUDIOSET,
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="audioset: class_labels_indices.csv; default: its 527 classes. folder: the labels in order, one per line "
        "or a CSV; default: alphabetical order.",
        rich_help_panel=_AUDIOSET,
    ),
]
Root = Annotated[Path | None, typer.Option(help="The data set's folder, or an archive of it.", rich_help_panel=_OTHERS)]
Esc10 = Annotated[bool, typer.Option("--esc10", help="esc50: only ESC-10's ten classes.", rich_help_panel=_OTHERS)]
Labels = Annotated[
    Path | None,
    typer.Option(
        help="CSV or TSV with path,labels[,split][,fold]. Default: metadata.csv with file_name,label, otherwise each "
        "sub-folder is a class. webdataset: where in a sample the labels are, such as json:tag, cls or txt. "
        f"{_PLACE_HELP}",
        rich_help_panel=_FOLDER,
    ),
]
Columns = Annotated[
    str | None,
    typer.Option(
        metavar="OURS=THEIRS,…",
        help="The list's columns, such as path=fname,labels=tags; ours are path, labels or label, split, "
        "fold. By number, from 0, for a list without a header: path=0,label=2.",
        rich_help_panel=_FOLDER,
    ),
]
LabelSeparator = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Between the labels of a clip. Default: comma or semicolon. A label that contains it is in double quotes.",
        rich_help_panel=_FOLDER,
    ),
]
Suffix = Annotated[
    str | None,
    typer.Option(help="Suffix of the files, such as .wav, where the list's names have none.", rich_help_panel=_FOLDER),
]
LabelsFromFolders = Annotated[
    Literal["classes", "all"],
    typer.Option(
        help="all: every sub-folder is a class, whatever its name. classes: those named train, val, test, dev, eval "
        "and the like are splits.",
        rich_help_panel=_FOLDER,
    ),
]
_WEBDATASET = "webdataset"
Tars = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="Tars, local or in S3, also gzipped: 'DIR/{000..099}.tar', 'DIR/*.tar', a folder, a single tar. Their "
        "labels are at --labels json:KEY, json:KEY.KEY, cls or txt; the order of classes is that of --classes.",
        rich_help_panel=_WEBDATASET,
    ),
]
Split = Annotated[
    str | None, typer.Option(metavar="PLACE", help="Default: json:split, if it is there.", rich_help_panel=_WEBDATASET)
]
Fold = Annotated[
    str | None, typer.Option(metavar="PLACE", help="Default: json:fold, if it is there.", rich_help_panel=_WEBDATASET)
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
    columns: Columns = None,
    label_separator: LabelSeparator = None,
    suffix: Suffix = None,
    labels_from_folders: LabelsFromFolders = "classes",
    tars: Tars = None,
    split: Split = None,
    fold: Fold = None,
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
    for place in (audio, root, Path(tars) if tars and "://" not in tars else None):
        if place and isinstance(folder, LocalFolder) and Path(folder.url).absolute().is_relative_to(place.absolute()):
            raise UsageError(f"--out {out}: is inside {place}, the source of the clips; choose another folder")
    with console.status("reading the source") as status:
        options = Options(
            segments,
            audio,
            classes,
            root,
            esc10,
            labels,
            columns,
            label_separator,
            suffix,
            labels_from_folders,
            tars=tars,
            split=split,
            fold=fold,
            endpoint=endpoint,
            on_progress=status.update,
        )
        source = read_source(kind, options)
    packing = Packing(sample_rate, codec, clips_per_shard, order, min_seconds, skip_silent, channels=channels)
    try:
        result = run(source, folder, packing, address)
    except KeyboardInterrupt:
        console.print("stopped; run the same command again to resume with the remaining shards")
        raise
    show(result, as_json, packed_page)
    require_coverage(result, max_missing)


def inspect(
    download: Annotated[Path, typer.Argument(metavar="DOWNLOAD", help="A folder, or one archive.")],
    segments: Annotated[Path | None, typer.Option(help="Also match the files with this AudioSet segment list.")] = None,
    as_json: Json = False,
) -> None:
    from jobs.shard_sets.inspect import inspect as run
    from jobs.shard_sets.inspect import inspected_page

    with console.status("looking"):
        result = run(download, segments)
    show(result, as_json, inspected_page)


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
    columns: Columns = None,
    label_separator: LabelSeparator = None,
    suffix: Suffix = None,
    labels_from_folders: LabelsFromFolders = "classes",
    tars: Tars = None,
    split: Split = None,
    fold: Fold = None,
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
    with console.status("reading the source") as status:
        options = Options(
            segments,
            audio,
            classes,
            root,
            labels=labels,
            columns=columns,
            label_separator=label_separator,
            suffix=suffix,
            labels_from_folders=labels_from_folders,
            tars=tars,
            split=split,
            fold=fold,
            endpoint=endpoint,
            on_progress=status.update,
        )
        source = read_source_of(info.name, options)
    show(run(folder, source, quick, address), as_json, repaired_page)


def index(
    shards: Shards,
    labels: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help=f"Where in a sample, such as json:tag or cls. {_PLACE_HELP}"),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Classes in order: class_labels_indices.csv, or a file with one per line. Default: sorted."),
    ] = None,
    endpoint: Endpoint = None,
    as_json: Json = False,
) -> None:
    from erann_dist.storage.folder import open_folder
    from jobs.shard_sets.maintenance import index as run
    from shards.sources.class_lists import read_class_list
    from shards.sources.samples import parse_fields

    folder = open_folder(shards, endpoint)
    show(run(folder, read_class_list(classes) if classes else None, parse_fields(labels)), as_json, packed_page)


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
            "erann pack webdataset --tars 's3://bucket/{000..099}.tar' --labels json:tag --out shard-sets/theirs",
            "erann pack folder --root MINE --labels mine.csv --columns path=fname,labels=tags --classes classes.txt "
            "--suffix .wav --out shard-sets/mine",
        ),
        rich_help_panel="Shard sets",
    )(pack)
    app.command(
        help="Show what is in a download: files by kind, formats, data sets recognised, what matches, and the command "
        "that packs it. Nothing is written."
        + examples(
            "erann inspect ../shared/data/esc10",
            "erann inspect AUDIO --segments balanced_train_segments.csv",
        ),
        rich_help_panel="Shard sets",
    )(inspect)
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
            "erann index shard-sets/theirs --labels json:tag",
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
