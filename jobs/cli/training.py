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
    run_result_page,
    show,
    tagged_page,
    tags_page,
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
    from erann_dist.recipe import load_recipe
    from jobs.recipes import find_recipe
    from jobs.training.pretrain import pretrain as run

    # Without a launcher there is one worker, whatever the recipe has; a number that is typed is an error.
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
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of one that comes with this program.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Of a Ray cluster: its dashboard, http://HEAD:8265 (or ray://HEAD:10001), to check it by a job there; "
            "or HEAD:6379, from one of its nodes. Without one, an embedded cluster is looked at."
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
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of one that comes with this program.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    init: Annotated[
        str | None,
        typer.Option("--from", help="A model folder or a finished run; none: from scratch. model.init if not given."),
    ] = None,
    launcher: Annotated[
        Launcher | None, typer.Option(help="Who starts the workers: run.launcher of the recipe.")
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
    kind: Annotated[Literal["augmentation", "hyperparameters", "transfer"], typer.Argument()],
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY.PATH=VALUE]...", help="YAML files, then keys of all of them.")
    ],
    variant: Annotated[
        list[str] | None, typer.Option(help="Of hyperparameters and transfer, in place of the paper's; several.")
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Of transfer: pretrained model or run, {variant} replaced by each; none: rows from scratch alone.",
        ),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Each row is run with each; 0 if not given.")] = None,
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
                    "study transfer needs recipes of erann finetune, and --from: the pretrained model or run to "
                    "fine-tune from, or none"
                )
            rows = studies.transfer_rows(variant, init)
            result = studies.run_transfer(paths, rows, overrides, seeds, address, view)
        else:
            if len(paths) != 1 or init:
                raise UsageError(f"study {kind} takes one recipe of erann pretrain, and no --from")
            if kind == "augmentation" and variant:
                raise UsageError("study augmentation takes no --variant; its rows are the paper's, each of a variant")
            grid = studies.augmentation_rows() if kind == "augmentation" else studies.hyperparameter_rows(variant)
            result = studies.run_grid(kind, grid, paths[0], overrides, seeds, address, view)
    show(result, as_json, study_page)
    if result["failed"]:
        raise typer.Exit(1)


def pipeline(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of one that comes with this program.")],
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
    fold: Annotated[list[int] | None, typer.Option(help="Only the clips of this fold; may be given again.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; evaluations/<name of the set> in the model's folder otherwise.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1)] = 1,
    launcher: Annotated[Launcher | None, typer.Option(help="none for one worker, else ray, if not given.")] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    as_json: Json = False,
) -> None:
    from erann_dist.recipe import DataSource
    from erann_dist.train.model_folder import find_model
    from jobs.training.evaluate import evaluate as run

    source = DataSource(url=shards, split=split, fold=fold or None)
    part = "".join([f"-{split}" if split else "", *(f"-fold{number}" for number in fold or [])])
    if not out:
        if "://" in model:
            raise UsageError(f"{model}: --out is needed, a folder on this machine")
        out = Path(find_model(model).url, "evaluations", f"{Path(shards).name}{part}")
    with RunView() as view:
        result = run(model, source, out, launcher or ("none" if workers == 1 else "ray"), workers, device, view.event)
    if is_first_process():
        show(result, as_json, evaluation_page)


def tag(
    model: Model,
    sounds: Annotated[
        list[str], typer.Argument(help="Sound files, or one shard set: its folder or s3://bucket/prefix.")
    ],
    top: Annotated[int | None, typer.Option(min=1, help="Of files: how many labels; 5 if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Of a shard set: the Parquet file to write.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Of a shard set; 1 if not given.")] = None,
    launcher: Annotated[
        Launcher | None, typer.Option(help="Of a shard set: none for one worker, else ray, if not given.")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Of a shard set; auto if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    from jobs.training import evaluate as jobs

    sets = [sound for sound in sounds if "://" in sound or Path(sound).is_dir()]
    if not sets:
        if (out, workers, launcher, device) != (None, None, None, None):
            raise UsageError(f"{sounds[0]}: --out, --workers, --launcher and --device are for shard sets, not files")
        show(jobs.tag(model, [Path(sound) for sound in sounds], top or 5), as_json, tags_page)
        return
    if len(sounds) > 1:
        raise UsageError(f"{sets[0]}: a shard set is tagged alone; tag other sets and files by commands of their own")
    if out is None or top is not None:
        raise UsageError(f"{sets[0]}: tagging a shard set needs --out FILE.parquet and takes no --top")
    workers = workers or 1
    launcher = launcher or ("none" if workers == 1 else "ray")
    with RunView() as view:
        result = jobs.tag_set(model, sets[0], out, launcher, workers, device or "auto", view.event)
    if is_first_process():
        show(result, as_json, tagged_page)


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where everything goes.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    from jobs.demo import demo as run

    show(run(folder), as_json, demo_page)


def plan(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of one that comes with this program.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", show_default=False)] = None,
    segments: Annotated[
        list[Path] | None,
        typer.Option(help="AudioSet's list in place of data.train's manifest, packed or not; may be given again."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 1,
    cores_per_node: Annotated[int | None, typer.Option(min=1, help="8 for each GPU if not given.")] = None,
    network: Annotated[float, typer.Option(min=0.001, help="Gbit/s of a node, to S3 and to the other nodes.")] = 10.0,
    disk: Annotated[float, typer.Option(min=0.001, help="MB/s that a node reads from its disk.")] = 1000.0,
    gpu_speed: Annotated[
        float, typer.Option(min=0.001, help="Examples/s of one GPU; an H200 gave 302 with ERANN-1-6.")
    ] = 300.0,
    core_speed: Annotated[
        float, typer.Option(min=0.001, help="Clips/s that a core decodes; erann bench loader measures it.")
    ] = 250.0,
    request_price: Annotated[float, typer.Option(min=0, help="USD for a million GET requests.")] = 0.4,
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
        help="Train by a recipe, from the run's last checkpoint if there is one. Keys of the recipe are set "
        "behind it.\n\nFrom one start to the next these may change: the keys of run but run.seed, those of "
        "checkpoint, those of evaluate but evaluate.pad_s, data.loader_threads, data.cache, "
        "data.max_bad_clips, optim.zero_stage, optim.compile, optim.max_bad_steps and optim.small_micro_batch. "
        "With any other change it is another run, and needs another run.name."
        + examples(
            "erann pretrain esc10.yaml run.name=esc10-short optim.epochs=2",
        ),
    )(pretrain)
    app.command(
        help="Whether a cluster is ready for a recipe's run: nodes, versions, clocks, shards, run folder, "
        "cache, network and some real steps, a line each with what mends it; then the time that the run will "
        "take. Exit code 0 only when the run can start. Nothing stays in run.dir."
        + examples(
            "erann preflight audioset_fast.yaml data.train=s3://bucket/train data.eval=s3://bucket/eval "
            "run.dir=s3://bucket/runs run.workers=8 --address http://HEAD:8265",
            "erann preflight audioset_fast.yaml run.workers=8 --address 10.0.0.1:6379",
        ),
    )(preflight)
    app.command(
        help="Cross-validation on a data set with folds, from a pretrained model or from scratch: a run for "
        "each fold, as many at once as the cluster has room for. The same command again goes on where it was stopped."
        + examples(
            "erann finetune esc50.yaml --from runs/audioset",
            "erann finetune ravdess.yaml --from none model.variant=ERANN-1-3 protocol.folds=actors",
        ),
    )(finetune)
    app.command(
        help="The paper's tables: augmentation (mixup, SpecAugment, crop) and hyperparameters (s_m and W) on "
        "a recipe of erann pretrain; transfer (from scratch against fine-tuned) on recipes of erann finetune.\n\n"
        "The runs go in parallel as the cluster allows. A key set behind the recipe holds for all rows, and "
        "can't be one that they are about. The same command again goes on."
        + examples(
            "erann study augmentation audioset.yaml run.name=augmentation --seed 0 --seed 1",
            "erann study hyperparameters audioset.yaml run.name=variants --variant ERANN-1-6 --variant ERANN-2-5",
            "erann study transfer esc50.yaml ravdess.yaml --variant ERANN-2-5 --from runs/variants/{variant}-seed0",
        ),
    )(study)
    app.command(
        help="Pretrain, evaluate, and fine-tune on several data sets, as one job. The same command again "
        "goes on where it was stopped."
        + examples(
            "erann pipeline pipeline.yaml pretrain.recipe=audioset_fast.yaml pretrain.set.run.workers=8",
        ),
    )(pipeline)
    app.command(
        help="Score every clip of a shard set once with a trained model: mAP, mAUC, d′, or accuracy and "
        "confusion matrix."
        + examples(
            "erann evaluate runs/esc10 shard-sets/esc10 --fold 5",
        ),
    )(evaluate)
    app.command(
        help="The likeliest labels of sound files of any format; or the scores of every clip of a shard set, "
        "as Parquet."
        + examples(
            "erann tag runs/esc10 ../shared/data/esc10/audio/1-100032-A-0.ogg",
            "erann tag runs/esc10 s3://bucket/esc10 --out tags.parquet --workers 2",
        ),
    )(tag)
    app.command(
        help="The whole path on a small synthetic AudioSet: make it, pack, verify, pretrain on two workers, "
        "evaluate, tag."
        + examples(
            "erann demo",
        ),
    )(demo)
    app.command(
        "plan",
        help="What a run will take on a cluster, and what will limit it: every clip of the run is drawn, "
        "nothing is read."
        + examples(
            "erann plan audioset.yaml data.train=s3://bucket/train --segments unbalanced_train_segments.csv.gz "
            "--nodes 4 --gpus-per-node 8 --network 100",
        ),
    )(plan)
