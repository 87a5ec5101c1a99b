"""The commands that train, and those that use a trained model."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from cluster.environment import is_first_process
from erann_dist.errors import Stopped, UsageError
from jobs.cli import submit
from jobs.cli.options import Address, Json, Launcher, Model, examples
from jobs.terminal.progress import RunView, console, note
from jobs.terminal.show import (
    demo_page,
    evaluation_page,
    folds_page,
    recordings_page,
    run_result_page,
    show,
    tagged_page,
    tags_page,
)

_RECORDINGS = "Recordings, with --out"


def pretrain(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    resume: Annotated[
        Literal["auto", "never", "must"],
        typer.Option(
            help="auto: resume from the last checkpoint if there is one. never: fail if the run exists. must: fail if "
            "there is no checkpoint."
        ),
    ] = "auto",
    launcher: Annotated[
        Launcher | None, typer.Option(help="What starts the workers. Default: the recipe's run.launcher.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from erann_dist.recipe import load_recipe
    from jobs.recipes import find_recipe
    from jobs.training.pretrain import pretrain as run

    # Without a launcher there is one worker, whatever the recipe sets; a number on the command line is an error.
    alone = ["run.workers=1"] if launcher == "none" else []
    settings = [*alone, *(overrides or []), *([f"run.launcher={launcher}"] if launcher else [])]
    loaded = load_recipe(find_recipe(recipe), settings, note)
    try:
        with RunView() as view:
            result = run(loaded, resume, address, view.event)
    except (KeyboardInterrupt, Stopped):
        console.print(f"run the same command again to resume from the last checkpoint in {loaded.run_url}")
        raise
    if is_first_process():
        show(result, as_json, run_result_page)


def preflight(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="The Ray cluster to check: its dashboard, http://HEAD:8265 (or ray://HEAD:10001), to check it by a "
            "job; or HEAD:6379 from one of its nodes. Default: an embedded cluster on this machine."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    address = address or os.environ.get("RAY_ADDRESS")
    if address and "://" in address:
        submit.submit_preflight(context, recipe, overrides or [], address, as_json)
        return
    from erann_dist.recipe import load_recipe
    from jobs.preflight.page import print_end, print_verdict
    from jobs.preflight.preflight import preflight as run
    from jobs.recipes import find_recipe
    from jobs.terminal.show import console_on

    lines = console_on(sys.stderr if as_json else sys.stdout)
    loaded = load_recipe(find_recipe(recipe), overrides or [], note)
    result = run(loaded, address, lambda verdict: print_verdict(lines, verdict))
    show(result, as_json, lambda result: print_end(lines, result))
    if not result["ready"]:
        raise typer.Exit(1)


def finetune(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Pretrained model: a model folder or a finished run; none: train from scratch. Default: model.init.",
        ),
    ] = None,
    launcher: Annotated[
        Launcher | None, typer.Option(help="What starts the workers. Default: the recipe's run.launcher.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from jobs.recipes import find_recipe
    from jobs.terminal.progress import FleetView
    from jobs.training.cross_validation import load_cross_validation
    from jobs.training.finetune import finetune as run

    settings = [*(overrides or []), *([f"run.launcher={launcher}"] if launcher else [])]
    validation = load_cross_validation(find_recipe(recipe), settings, init)
    with FleetView() as view:
        (result,) = run([validation], address, view)
    show(result, as_json, folds_page)
    if result["failed"]:
        raise typer.Exit(1)


def study(
    kind: Annotated[
        Literal["augmentation", "hyperparameters", "transfer"], typer.Argument(help="Which of the paper's tables.")
    ],
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY.PATH=VALUE]...", help="YAML files, then keys that are set in all of them."
        ),
    ],
    variant: Annotated[
        list[str] | None,
        typer.Option(help="hyperparameters, transfer: model variants in place of the paper's; may be repeated."),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="transfer: pretrained model or run, in which {variant} is replaced by each variant; none: only the "
            "rows trained from scratch.",
        ),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Seed to run each row with; may be repeated. Default: 0.")
    ] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from jobs.recipes import find_recipe
    from jobs.terminal.progress import FleetView
    from jobs.terminal.show import study_page
    from jobs.training import study as studies

    paths = [find_recipe(Path(each)) for each in recipes if "=" not in each]
    overrides, seeds = [each for each in recipes if "=" in each], seed or [0]
    with FleetView() as view:
        if kind == "transfer":
            if not paths or not init:
                raise UsageError(
                    "study transfer needs recipes of erann finetune, and --from with the pretrained model or run to "
                    "fine-tune from, or none"
                )
            rows = studies.transfer_rows(variant, init)
            result = studies.run_transfer(paths, rows, overrides, seeds, address, view)
        else:
            if len(paths) != 1 or init:
                raise UsageError(f"study {kind} takes one recipe of erann pretrain, and no --from")
            if kind == "augmentation" and variant:
                raise UsageError("study augmentation takes no --variant; the paper's rows set it")
            grid = studies.augmentation_rows() if kind == "augmentation" else studies.hyperparameter_rows(variant)
            result = studies.run_grid(kind, grid, paths[0], overrides, seeds, address, view)
    show(result, as_json, study_page)
    if result["failed"]:
        raise typer.Exit(1)


def pipeline(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    address: Address = None,
    as_json: Json = False,
) -> None:
    from jobs.pipeline import load_pipeline, run_pipeline
    from jobs.recipes import find_recipe
    from jobs.terminal.show import pipeline_page

    result = run_pipeline(load_pipeline(find_recipe(recipe), overrides or [], address), address)
    show(result, as_json, pipeline_page)
    if any(each["failed"] for each in result["finetuned"]):
        raise typer.Exit(1)


def evaluate(
    model: Model,
    shards: Annotated[str, typer.Argument(help="Folder of the shard set.")],
    split: Annotated[str | None, typer.Option(help="Only the clips of this split.")] = None,
    fold: Annotated[list[int] | None, typer.Option(help="Only the clips of this fold; may be repeated.")] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="Only the clips in this list: one key per line, or a CSV or Parquet file with a column key."),
    ] = None,
    without: Annotated[Path | None, typer.Option(help="All clips except those in this list.")] = None,
    common: Annotated[
        str | None,
        typer.Option(
            metavar="PREDICTIONS",
            help="Another evaluation's predictions.parquet: also compare both on the clips that they share.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Output folder. Default: evaluations/<name of the set> in the model's folder."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of workers.")] = 1,
    launcher: Annotated[
        Launcher | None, typer.Option(help="What starts the workers. Default: none for one worker, otherwise ray.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Device of the workers.")] = "auto",
    as_json: Json = False,
) -> None:
    from erann_dist.recipe import DataSource
    from erann_dist.train.model_folder import find_model
    from jobs.training.evaluate import evaluate as run

    lists = {name: str(path) for name, path in (("keys", keys), ("without", without)) if path}
    source = DataSource(url=shards, split=split, fold=fold or None, **lists)
    parts = [split, *(f"fold{number}" for number in fold or []), *(f"{n}-{Path(p).stem}" for n, p in lists.items())]
    part = "".join(f"-{each}" for each in parts if each)
    if not out:
        if "://" in model:
            raise UsageError(f"{model}: a model in S3 needs --out; give a folder on this machine")
        out = Path(find_model(model).url, "evaluations", f"{Path(shards).name}{part}")
    with RunView() as view:
        launcher = launcher or ("none" if workers == 1 else "ray")
        result = run(model, source, common, out, launcher, workers, device, view.event)
    if is_first_process():
        show(result, as_json, evaluation_page)


def tag(
    model: Model,
    sounds: Annotated[
        list[str],
        typer.Argument(
            help="Recordings: audio files, folders and patterns; or one shard set: its folder or s3://bucket/prefix."
        ),
    ],
    top: Annotated[int | None, typer.Option(min=1, help="Without --out: labels to print. Default: 5.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write: .parquet, .csv or .jsonl; for a shard set .parquet."),
    ] = None,
    window: Annotated[float, typer.Option(help="Length of a window in s.", rich_help_panel=_RECORDINGS)] = 10.0,
    hop: Annotated[float, typer.Option(help="From one window to the next, in s.", rich_help_panel=_RECORDINGS)] = 5.0,
    threshold: Annotated[
        float, typer.Option(help="Probability at which a label is an event.", rich_help_panel=_RECORDINGS)
    ] = 0.5,
    audacity: Annotated[
        Path | None,
        typer.Option(help="Folder for a label track of each recording, for Audacity.", rich_help_panel=_RECORDINGS),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Shard set: number of workers. Default: 1.")] = None,
    launcher: Annotated[
        Launcher | None,
        typer.Option(help="Shard set: what starts the workers. Default: none for one worker, otherwise ray."),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"] | None, typer.Option(help="The device. Default: auto.")] = None,
    as_json: Json = False,
) -> None:
    from erann_dist.data.manifest import MANIFEST
    from jobs.recordings.tag import TagOptions, tag_recordings
    from jobs.training import evaluate as jobs

    sets = [sound for sound in sounds if "://" in sound or Path(sound, MANIFEST).exists()]
    if not sets:
        if (workers, launcher) != (None, None):
            raise UsageError(f"{sounds[0]}: --workers and --launcher are for shard sets")
        if out is None:
            if (device, audacity) != (None, None) or any(Path(sound).is_dir() for sound in sounds):
                raise UsageError(f"{sounds[0]}: folders, --device and --audacity need --out FILE")
            show(jobs.tag(model, [Path(sound) for sound in sounds], top or 5), as_json, tags_page)
            return
        if top is not None:
            raise UsageError("--top: with --out all labels are written")
        options = TagOptions(window, hop, threshold, audacity, device or "auto")
        show(tag_recordings(model, sounds, out, options), as_json, recordings_page)
        return
    if len(sounds) > 1:
        raise UsageError(f"{sets[0]}: one command tags a single shard set; tag other sets and files separately")
    if out is None or top is not None:
        raise UsageError(f"{sets[0]}: tagging a shard set needs --out FILE.parquet and takes no --top")
    workers = workers or 1
    launcher = launcher or ("none" if workers == 1 else "ray")
    with RunView() as view:
        result = jobs.tag_set(model, sets[0], out, launcher, workers, device or "auto", view.event)
    if is_first_process():
        show(result, as_json, tagged_page)


def embed(
    model: Model,
    sounds: Annotated[list[str], typer.Argument(help="Recordings: audio files, folders and patterns.")],
    out: Annotated[Path, typer.Option(help="The file to write: .parquet, .csv or .jsonl.")],
    window: Annotated[float, typer.Option(help="Length of a window in s.")] = 10.0,
    hop: Annotated[float | None, typer.Option(help="From one window to the next, in s. Default: --window.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="The device.")] = "auto",
    as_json: Json = False,
) -> None:
    from jobs.recordings.tag import embed_recordings

    result = embed_recordings(model, sounds, out, window, hop or window, device)
    show(result, as_json, recordings_page)


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for all of the demo's files.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    from jobs.demo import demo as run

    show(run(folder), as_json, demo_page)


def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a built-in recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    segments: Annotated[
        list[Path] | None,
        typer.Option(
            help="AudioSet segment list to use instead of data.train, so that nothing need be packed yet; may be "
            "repeated."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node.")] = 1,
    cores_per_node: Annotated[int | None, typer.Option(min=1, help="CPU cores per node. Default: 8 per GPU.")] = None,
    network: Annotated[
        float, typer.Option(min=0.001, help="Network bandwidth of a node in Gbit/s, to S3 and to the other nodes.")
    ] = 10.0,
    disk: Annotated[float, typer.Option(min=0.001, help="Read speed of a node's disk in MB/s.")] = 1000.0,
    gpu_speed: Annotated[
        float, typer.Option(min=0.001, help="Training speed of one GPU in examples/s; an H200 gave 302 with ERANN-1-6.")
    ] = 300.0,
    core_speed: Annotated[
        float,
        typer.Option(min=0.001, help="Decoding speed of one core in clips/s, as measured by erann bench loader."),
    ] = 250.0,
    request_price: Annotated[float, typer.Option(min=0, help="Price of a million GET requests in USD.")] = 0.4,
    as_json: Json = False,
) -> None:
    from erann_dist.recipe import load_recipe
    from jobs.plan.page import plan_page
    from jobs.plan.plan import Cluster
    from jobs.plan.plan import plan as run
    from jobs.recipes import find_recipe

    loaded = load_recipe(find_recipe(recipe), overrides or [], note)
    cores = cores_per_node or 8 * gpus_per_node
    cluster = Cluster(nodes, gpus_per_node, cores, network, disk, gpu_speed, core_speed, request_price)
    show(run(loaded, cluster, segments or []), as_json, plan_page)


def add_to(app: typer.Typer) -> None:
    app.command(
        help="Train the model of a recipe, resuming from the run's last checkpoint if there is one.\n\nKeys given "
        "after the recipe override it. Between two starts of a run these keys may change: all of run except "
        "run.seed, all of checkpoint, all of evaluate except evaluate.pad_s, data.loader_threads, data.cache, "
        "data.max_bad_clips, optim.zero_stage, optim.compile, optim.max_bad_steps and optim.small_micro_batch. "
        "Any other change makes it a different run, which needs another run.name."
        + examples(
            "erann pretrain esc10.yaml run.name=esc10-short optim.epochs=2",
        ),
        rich_help_panel="Training",
    )(pretrain)
    app.command(
        help="Check whether a cluster is ready for a recipe's run.\n\nChecks nodes, versions, clocks, shards, run "
        "folder, cache and network, and runs a few real training steps; suggests a fix for each problem and estimates "
        "the run's duration. The exit code is 0 only if the run can start. Nothing is left in run.dir."
        + examples(
            "erann preflight audioset_fast.yaml data.train=s3://bucket/train data.eval=s3://bucket/eval "
            "run.dir=s3://bucket/runs run.workers=8 --address http://HEAD:8265",
            "erann preflight audioset_fast.yaml run.workers=8 --address 10.0.0.1:6379",
        ),
        rich_help_panel="Clusters",
    )(preflight)
    app.command(
        help="Cross-validate on a data set with folds, from a pretrained model or from scratch.\n\nEach fold is a run; "
        "as many run at once as the cluster has capacity for. If it is interrupted, run the same command again to "
        "resume."
        + examples(
            "erann finetune esc50.yaml --from runs/audioset",
            "erann finetune ravdess.yaml --from none model.variant=ERANN-1-3 protocol.folds=actors",
        ),
        rich_help_panel="Training",
    )(finetune)
    app.command(
        help="Reproduce the paper's tables: augmentation (mixup, SpecAugment, crop) and hyperparameters (s_m and W) "
        "with a recipe of erann pretrain; transfer (from scratch against fine-tuned) with recipes of erann "
        "finetune.\n\nAs many runs train in parallel as the cluster has capacity for. A key given after the recipe "
        "applies to all rows, and can't be one that the table varies. If it is interrupted, run the same command "
        "again to resume."
        + examples(
            "erann study augmentation audioset.yaml run.name=augmentation --seed 0 --seed 1",
            "erann study hyperparameters audioset.yaml run.name=variants --variant ERANN-1-6 --variant ERANN-2-5",
            "erann study transfer esc50.yaml ravdess.yaml --variant ERANN-2-5 --from runs/variants/{variant}-seed0",
        ),
        rich_help_panel="Training",
    )(study)
    app.command(
        help="Pretrain, evaluate, and fine-tune on several data sets in one job.\n\nIf it is interrupted, run the same "
        "command again to resume."
        + examples(
            "erann pipeline pipeline.yaml pretrain.recipe=audioset_fast.yaml pretrain.set.run.workers=8",
        ),
        rich_help_panel="Training",
    )(pipeline)
    app.command(
        help="Evaluate a trained model on every clip of a shard set: mAP, mAUC and d′, or accuracy and confusion "
        "matrix.\n\nScores can be compared only on the same clips: --keys and --without select them, and --common "
        "computes both evaluations' metrics on the clips that they share."
        + examples(
            "erann evaluate runs/esc10 shard-sets/esc10 --fold 5",
            "erann evaluate runs/audioset shard-sets/eval --common theirs/predictions.parquet",
        ),
        rich_help_panel="A trained model",
    )(evaluate)
    app.command(
        help="Print the most likely labels of audio files in any format; with --out, write those of every window of "
        "recordings of any length and a table of events, or the scores of every clip of a shard set."
        + examples(
            "erann tag runs/esc10 ../shared/data/esc10/audio/1-100032-A-0.ogg",
            "erann tag runs/esc10 recordings/ --window 5 --hop 2.5 --threshold 0.3 --out tags.csv",
            "erann tag runs/esc10 s3://bucket/esc10 --out tags.parquet --workers 2",
        ),
        rich_help_panel="A trained model",
    )(tag)
    app.command(
        help="Write the model's features, the pooled vector before its fully connected layers, of every window of "
        "recordings."
        + examples(
            "erann embed runs/esc10 recordings/ --window 5 --out embeddings.parquet",
        ),
        rich_help_panel="A trained model",
    )(embed)
    app.command(
        help="Run the whole path on a small synthetic AudioSet: generate, pack, verify, pretrain on two workers, "
        "evaluate, tag."
        + examples(
            "erann demo",
        ),
        rich_help_panel="Training",
    )(demo)
    app.command(
        "plan",
        help="Estimate a run's duration, I/O and bottleneck on a cluster, without starting it.\n\nThe run's sample "
        "plan is computed clip by clip; no audio is read."
        + examples(
            "erann plan audioset.yaml data.train=s3://bucket/train --segments unbalanced_train_segments.csv.gz "
            "--nodes 4 --gpus-per-node 8 --network 100",
        ),
        rich_help_panel="Clusters",
    )(plan)
