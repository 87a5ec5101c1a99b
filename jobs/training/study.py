"""The paper's tables: grids of runs on one cluster, each row next to the paper's figure.

augmentation and hyperparameters take a recipe of `erann pretrain`, transfer takes recipes of `erann finetune`. Keys on
the command line apply to all rows, and none of them may be one that the rows of the table set.
"""

import csv
import io
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from erann_dist.data.manifest import Manifest, SetInfo
from erann_dist.data.sources import load_train_and_eval
from erann_dist.errors import UsageError, UserError
from erann_dist.formats import strict_json
from erann_dist.models.base import AudioModel, count_parameters
from erann_dist.models.spec import build_model, macs_of
from erann_dist.recipe import RunSection, check, load_recipe, read_tree, setting
from erann_dist.storage.folder import Folder, open_folder
from erann_dist.train.distributed import device_name
from erann_dist.train.model_folder import initialise
from jobs.terminal.progress import bar, note
from jobs.training import paper
from jobs.training.cross_validation import CrossValidation, load_cross_validation
from jobs.training.finetune import check_all, finetune, has_begun
from jobs.training.pretrain import only_one
from jobs.training.results import RESULTS, read_results
from jobs.training.scheduler import Ended, Tell, check_runs, run_all
from jobs.training.study_manifest import StudyManifest, require_own, require_unchanged, write_mark

Grid = Literal["augmentation", "hyperparameters"]
TABLE = "table.csv"
_MIXUP = {
    1: ["augment.mixup=none"],
    2: ["augment.mixup=standard", "augment.mixup_on=waveform"],
    3: ["augment.mixup=modified", "augment.mixup_on=waveform"],
    4: ["augment.mixup=modified", "augment.mixup_on=log_mel"],
}
_AUDIOSET_CLASSES = 527
_BATCHES = (1, 32)  # Batch sizes for which the paper gives speeds.
_SPEED_S = 3.0  # Minimum seconds of forward passes for a measurement.


@dataclass(frozen=True)
class Row:
    """A row of the table: the keys that it sets in the recipe, its columns, and the paper's figure."""

    name: str
    settings: list[str]
    columns: dict[str, Any]
    paper: float | None


def augmentation_rows() -> list[Row]:
    """The paper's augmentation table."""
    rows = []
    for row in paper.AUGMENTATION:
        masks = "specaugment" if row.specaugment else "no-specaugment"
        columns = {"variant": row.variant, "t_c": row.crop_s, "specaugment": row.specaugment, "mixup": row.mixup}
        rows.append(
            Row(
                f"{row.variant}-{row.crop_s}s-{masks}-mixup{row.mixup}",
                [
                    f"model.variant={row.variant}",
                    f"data.crop_s={row.crop_s}",
                    setting("augment.specaugment", row.specaugment),
                    *_MIXUP[row.mixup],
                ],
                columns,
                row.mean_ap,
            )
        )
    return rows


def hyperparameter_rows(variants: Iterable[str] | None = None) -> list[Row]:
    """A row for each of the paper's variants on AudioSet, or for these variants."""
    known = paper.HYPERPARAMETERS
    rows = []
    for variant in variants or known:
        published = known.get(variant)
        rows.append(Row(variant, [f"model.variant={variant}"], {"variant": variant}, published))
    return rows


def run_grid(
    kind: Grid,
    rows: list[Row],
    path: Path,
    overrides: list[str],
    seeds: list[int],
    address: str | None,
    on_event: Tell,
) -> dict[str, Any]:
    """Train each row with each seed. Returns the table, which is also written to the study's folder. Raises UserError.

    The folder is the recipe's run.dir/run.name, and its runs are in subfolders. Finished runs are not run again.
    """
    own = {"run.seed", *(setting.partition("=")[0] for row in rows for setting in row.settings)}
    _require_free(kind, overrides, own)
    _require_distinct("--variant", [row.name for row in rows])
    _require_distinct("--seed", seeds)
    base = load_recipe(path, [*overrides, *rows[0].settings])
    own_variant = load_recipe(path, overrides).model.variant
    if own_variant not in (variants := dict.fromkeys(row.columns["variant"] for row in rows)):
        note(f"{path}: its model.variant {own_variant} is not used; the table's rows are {', '.join(variants)}")
    folder = open_folder(base.run_url)
    recipes = {}
    for row in rows:
        for seed in seeds:
            name = _run_name(row, seed)
            run = [f"run.seed={seed}", setting("run.dir", base.run_url), f"run.name={name}"]
            recipes[name] = load_recipe(path, [*overrides, *row.settings, *run])
    training_clips, clips = load_train_and_eval(base.data)
    check_runs(recipes, address)
    weights = None
    if base.model.init != "none":
        for recipe in {recipe.model.variant: recipe for recipe in recipes.values()}.values():
            model = build_model(recipe.model.variant, clips.num_classes)
            weights = initialise(model, recipe.model.init, recipe.model.fresh).weights_sha256
    hashes = {"data.train": training_clips.info.content_hash, "data.eval": clips.info.content_hash}
    manifest = StudyManifest(kind, clips.info.name, hashes, weights)
    require_own(folder, manifest)
    if has_begun(folder):
        require_unchanged(folder, manifest)
    with only_one(folder):
        write_mark(folder, manifest)
        measure = _Measure(folder)
        with bar("measure the models' speed", len(rows)) as progress:
            measured = {}
            for number, row in enumerate(rows):
                progress.update(number, row.name)
                measured[row.name] = measure.of(recipes[_run_name(row, seeds[0])].model.variant, clips)
        ended = run_all(recipes, address, on_event)
        why = _why_not_comparable(clips.info)
        table = []
        for row in rows:
            names = [_run_name(row, seed) for seed in seeds]
            line = _line(row, measured[row.name], [ended[name] for name in names], clips)
            table.append(line | {"paper": None if why else row.paper, "runs": names})
        failed = {name: each.why for name, each in ended.items() if each.why}
        return _write(folder, kind, base.run.name, table, failed, [why] if why else [], measure.on)


def _require_free(kind: str, overrides: list[str], own: set[str]) -> None:
    """Raise UsageError if an override sets a key that the rows of the table set."""
    fixes = {"run.seed": "use --seed", "model.init": "use --from"}
    if kind != "augmentation":
        fixes["model.variant"] = "use --variant"
    for override in overrides:
        key = override.partition("=")[0]
        for taken in sorted(own):
            if f"{key}.".startswith(f"{taken}.") or f"{taken}.".startswith(f"{key}."):
                fix = fixes.get(taken, "omit it")
                raise UsageError(f"{override!r}: study {kind} sets {taken} for each of its rows; {fix}")


def _require_distinct(what: str, values: Sequence[object]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise UsageError(f"{what}: {twice[0]} is given twice")


def _why_not_comparable(info: SetInfo) -> str | None:
    if info.task == "tagging" and info.name == "audioset" and len(info.label_ids) == _AUDIOSET_CLASSES:
        return None
    what = f"{info.name} ({info.task}, {len(info.label_ids)} classes)"
    return f"not comparable with the paper's figures, which are for AudioSet: the evaluated clips are {what}"


def _run_name(row: Row, seed: int) -> str:
    return f"{row.name}-seed{seed}"


def _line(row: Row, measured: dict[str, Any], runs: list[Ended], clips: Manifest) -> dict[str, Any]:
    metrics = [run.outcome for run in runs if run.outcome]
    metric = "mAP" if clips.info.task == "tagging" else "accuracy"
    values = [each[metric] for each in metrics]
    return {
        "run": row.name,
        **row.columns,
        **measured,
        metric: statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
    }


class _Measure:
    """Size and speed of models on this machine. Values in the study's earlier table from this hardware are reused."""

    def __init__(self, folder: Folder) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on = device_name(self._device)
        self._known: dict[tuple[Any, ...], dict[str, Any]] = {}  # Speeds by variant, parameters and MACs.
        last = _last_result(folder)
        for row in last.get("rows", []) if last.get("measured_on") == self.on else []:
            speeds = {column: row.get(column) for column in map(_speed_column, _BATCHES)}
            self._known[row.get("variant"), row.get("params_M"), row.get("GMACs")] = speeds

    def of(self, variant: str, clips: Manifest) -> dict[str, Any]:
        """The measurements for the set's number of labels and its median clip length."""
        samples = int(np.median(clips.samples))
        model = build_model(variant, clips.num_classes).eval()
        params = round(count_parameters(model) / 1e6, 3)
        macs = round(macs_of(variant, clips.num_classes, samples) / 1e9, 2)
        key = (variant, params, macs)
        if key not in self._known:
            model.to(self._device)
            self._known[key] = {
                _speed_column(batch): _speed(model, batch, model.front_end.frames(samples)) for batch in _BATCHES
            }
            model.cpu()
            torch.cuda.empty_cache()  # for the runs
        return {"params_M": params, "GMACs": macs, **self._known[key]}


def _speed_column(batch: int) -> str:
    return f"clips_per_s_{batch}"


@torch.inference_mode()
def _speed(model: AudioModel, batch: int, frames: int) -> float:
    """Clips per second through the network: the median of several passes after the first."""
    device = next(model.parameters()).device
    inputs = torch.randn(batch, 1, model.front_end.mel_bins, frames, device=device)
    took: list[float] = []
    while len(took) < 2 or sum(took) < _SPEED_S:
        began = time.perf_counter()
        model(inputs).sum().item()  # waits for the device
        took.append(time.perf_counter() - began)
    return round(batch / statistics.median(took[1:]), 2)


def transfer_rows(variants: list[str] | None, pretrained: str) -> list[tuple[str, str]]:
    """Variants, each with what it starts from: none or a pretrained model. Raises UsageError.

    variants: each from scratch and fine-tuned. Default: the rows for which the paper has figures.
    pretrained: a model or a run, such as one of a hyperparameter study; {variant} in it is replaced by the variant.
    none: only the rows from scratch.
    """
    figures = paper.ACCURACY["esc50"]
    _require_distinct("--variant", variants or [])
    rows = [
        (variant, init)
        for variant in variants or figures
        for init in dict.fromkeys(["none", pretrained.replace("{variant}", variant)])
    ]
    if variants:
        return rows
    return [
        (variant, init)
        for variant, init in rows
        if (figures[variant].scratch if init == "none" else figures[variant].finetuned) is not None
    ]


def run_transfer(
    paths: list[Path],
    rows: list[tuple[str, str]],
    overrides: list[str],
    seeds: list[int],
    address: str | None,
    on_event: Tell,
) -> dict[str, Any]:
    """Cross-validate each data set with each of `transfer_rows`. Returns the table. Raises UserError."""
    _require_free("transfer", overrides, {"model.variant", "model.init", "run.seed"})
    _require_distinct("--seed", seeds)
    _require_distinct("recipes of one name", [path.stem for path in paths])
    run = check(RunSection, read_tree(paths[0], ["run.name=transfer", *overrides])["run"], f"{paths[0]}: run")
    place = run.url
    # Each row of the table, by its name, is one cross-validation per seed.
    repeated: dict[str, list[CrossValidation]] = {}
    for path in paths:
        for variant, init in rows:
            row = f"{path.stem}-{variant}-{'scratch' if init == 'none' else 'finetuned'}"
            repeated[row] = []
            for seed in seeds:
                settings = [*overrides, f"model.variant={variant}", f"run.seed={seed}"]
                settings += [setting("run.dir", place), f"run.name={row}-seed{seed}"]
                repeated[row].append(load_cross_validation(path, settings, init))
    validations = [validation for row in repeated.values() for validation in row]
    folder = open_folder(place)
    manifest = StudyManifest("transfer", ", ".join(sorted({validation.data_set for validation in validations})))
    require_own(folder, manifest)
    check_all(validations, address)
    with only_one(folder):
        write_mark(folder, manifest)
        measure = _Measure(folder)
        measured = {}
        with bar("measure the models' speed", len(repeated)) as progress:
            for number, (name, each) in enumerate(repeated.items()):
                progress.update(number, name)
                measured[name] = measure.of(each[0].variant, each[0].clips)
        outcomes = {each["name"]: each for each in finetune(validations, address, on_event)}
        table = [_transfer_line(row, measured[row], [outcomes[v.name] for v in each]) for row, each in repeated.items()]
        failed = {f"{name}/fold-{f['fold']}": f["why"] for name, each in outcomes.items() for f in each["failed"]}
        notes = [
            f"{name}: not counted, as some of its folds failed" for name, each in outcomes.items() if each["failed"]
        ]
        return _write(folder, "transfer", run.name, table, failed, notes, measure.on)


def _transfer_line(row: str, measured: dict[str, Any], outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """outcomes: one per seed. Only those in which all folds finished count."""
    means = [each["mean"] for each in outcomes if not each["failed"]]
    first = outcomes[0]
    return {
        "run": row,
        "data_set": first["data_set"],
        "variant": first["variant"],
        "init": first["init"],
        **measured,
        "accuracy": statistics.fmean(means) if means else None,
        "std": statistics.stdev(means) if len(means) > 1 else None,
        "seeds": len(means),
        "paper": first["paper"] and first["paper"]["accuracy"],
        "comparable": all(each["comparable"] for each in outcomes),
        "runs": [f"{each['name']}/{fold['run']}" for each in outcomes for fold in each["folds"]],
    }


def _last_result(folder: Folder) -> dict[str, Any]:
    """The study's previous results; empty if there are none or they can't be read."""
    try:
        return read_results(folder)
    except (FileNotFoundError, UserError):
        return {}


def _write(
    folder: Folder,
    kind: str,
    name: str,
    table: list[dict[str, Any]],
    failed: dict[str, str],
    notes: list[str],
    measured_on: str,
) -> dict[str, Any]:
    """Write the requested table. A note names the runs of the previous table that are not in it."""
    requested = {run for row in table for run in row["runs"]} | failed.keys()
    others = {run for row in _last_result(folder).get("rows", []) for run in row["runs"]} - requested
    if others:
        notes = [*notes, f"not in this table, as they were not requested this time: {', '.join(sorted(others))}"]
    columns = [column for column in table[0] if column not in ("run", "runs")]
    result = {
        "kind": "study",
        "of": kind,
        "name": name,
        "folder": str(folder),
        "columns": columns,
        "rows": table,
        "failed": [{"run": run, "why": why} for run, why in failed.items()],
        "notes": notes,
        "measured_on": measured_on,
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", *columns], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(table)
    folder.write(TABLE, text.getvalue().encode())
    folder.write(RESULTS, strict_json.dumps(result, indent=1).encode())
    return result
