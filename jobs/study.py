"""The paper's tables: grids of runs on one cluster, each row beside the paper's own figure.

augmentation and hyperparameters take a recipe as `erann pretrain` does, transfer takes those of `erann finetune`. What
a row of the table is about is set in the recipe; keys of the command line come last and hold for all rows.
"""

import csv
import io
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from erann_dist import strict_json
from erann_dist.data import load_train_and_eval
from erann_dist.features import padded_frames, padded_samples
from erann_dist.folder import Folder, open_folder
from erann_dist.manifest import Manifest
from erann_dist.model import ERANN, MEL_BINS, count_macs, count_parameters
from erann_dist.recipe import Recipe, load_recipe, read_tree
from jobs import paper
from jobs.finetune import claim, finetune
from jobs.fleet import Ended, Tell, run_all
from jobs.protocol import RESULTS, load_cross_validation

Grid = Literal["augmentation", "hyperparameters"]
TABLE = "table.csv"
_MIXUP = {
    1: ["augment.mixup=none"],
    2: ["augment.mixup=standard", "augment.mixup_on=waveform"],
    3: ["augment.mixup=modified", "augment.mixup_on=waveform"],
    4: ["augment.mixup=modified", "augment.mixup_on=log_mel"],
}
TRANSFER_VARIANTS = ["ERANN-2-4", "ERANN-2-5"]  # of which the paper has both figures
_SPEED_S = 3.0  # of forward passes, at least one


@dataclass(frozen=True)
class Row:
    """One of the table: what is set in the recipe, what the columns say of it, and the paper's figure."""

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
                    f"augment.specaugment={json.dumps(row.specaugment)}",
                    *_MIXUP[row.mixup],
                ],
                columns,
                row.mean_ap,
            )
        )
    return rows


def hyperparameter_rows(variants: Iterable[str] | None = None) -> list[Row]:
    """The paper's variants on AudioSet, or others."""
    known = paper.HYPERPARAMETERS
    rows = []
    for variant in variants or known:
        published = known[variant].mean_ap if variant in known else None
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
    """Train each row with each seed; the table, which is written to the study's folder. Raises UserError.

    The folder is the recipe's, run.dir/run.name; its runs lie below it. Finished ones are not run again.
    """
    base = load_recipe(path, overrides)
    folder = open_folder(base.run_url)
    recipes = {}
    for row in rows:
        for seed in seeds:
            name = _run_name(row, seed)
            run = [f"run.seed={seed}", f"run.dir={json.dumps(base.run_url)}", f"run.name={name}"]
            recipes[name] = load_recipe(path, [*row.settings, *overrides, *run])
    _, clips = load_train_and_eval(base.data)  # what is wrong with the data shows before a folder is made
    claim(folder, kind, base.run.name)
    ended = run_all(recipes, address, on_event)
    table = []
    for row in rows:
        runs = [ended[_run_name(row, seed)] for seed in seeds]
        names = [_run_name(row, seed) for seed in seeds]
        table.append(_line(row, recipes[names[0]], runs, clips) | {"runs": names})
    failed = {name: each.why for name, each in ended.items() if each.why}
    return _write(folder, kind, base.run.name, table, failed)


def _run_name(row: Row, seed: int) -> str:
    return f"{row.name}-seed{seed}"


def _line(row: Row, recipe: Recipe, runs: list[Ended], clips: Manifest) -> dict[str, Any]:
    metrics = [run.outcome for run in runs if run.outcome]
    metric = "mAP" if clips.info.task == "tagging" else "accuracy"
    values = [each[metric] for each in metrics]
    return {
        "run": row.name,
        **row.columns,
        **_sizes_and_speeds(recipe.model.variant, clips),
        metric: statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "seeds": len(values),
        "paper": row.paper,
    }


def _sizes_and_speeds(variant: str, clips: Manifest) -> dict[str, Any]:
    """Of the model for the set's labels and its median clip, on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    samples = padded_samples(int(clips.samples[len(clips) // 2]))
    frames = padded_frames(samples)
    model = ERANN.from_name(variant, clips.num_classes).eval()
    return {
        "params_M": round(count_parameters(model) / 1e6, 3),
        "GMACs": round(count_macs(model.variant, clips.num_classes, frames) / 1e9, 2),
        "clips_per_s_1": _speed(model.to(device), 1, frames),
        "clips_per_s_32": _speed(model, 32, frames),
    }


@torch.inference_mode()
def _speed(model: ERANN, batch: int, frames: int) -> float:
    """Clips a second through the network; the median of some passes behind the first."""
    device = next(model.parameters()).device
    inputs = torch.randn(batch, 1, MEL_BINS, frames, device=device)
    took: list[float] = []
    while len(took) < 2 or sum(took) < _SPEED_S:
        began = time.perf_counter()
        model(inputs).sum().item()  # waits for the device
        took.append(time.perf_counter() - began)
    return round(batch / statistics.median(took[1:]), 2)


def run_transfer(
    paths: list[Path],
    variants: list[str],
    pretrained: str,
    overrides: list[str],
    seeds: list[int],
    address: str | None,
    on_event: Tell,
) -> dict[str, Any]:
    """Each data set with each variant, from scratch and fine-tuned; the table. Raises UserError.

    pretrained: a folder whose runs have the variants' names, such as a hyperparameter study's; {variant} in it is
    replaced by the variant.
    """
    first = read_tree(paths[0], overrides)
    place = f"{first['run'].get('dir', 'runs').rstrip('/')}/transfer"
    validations = []
    for path in paths:
        for variant in variants:
            for init in ("none", pretrained.replace("{variant}", variant)):
                how = "scratch" if init == "none" else "finetuned"
                for seed in seeds:
                    settings = [f"model.variant={variant}", *overrides, f"run.seed={seed}"]
                    settings.append(f"run.dir={json.dumps(place)}")
                    settings.append(f"run.name={path.stem}-{variant}-{how}-seed{seed}")
                    validations.append(load_cross_validation(path, settings, init))
    outcomes = finetune(validations, address, on_event)
    table = []
    for start in range(0, len(outcomes), len(seeds)):
        group = outcomes[start : start + len(seeds)]
        means = [each["mean"] for each in group if each["mean"] is not None]
        first = group[0]
        table.append(
            {
                "run": first["name"].rpartition("-seed")[0],
                "data_set": first["data_set"],
                "variant": first["variant"],
                "init": first["init"],
                "accuracy": statistics.fmean(means) if means else None,
                "std": statistics.stdev(means) if len(means) > 1 else None,
                "seeds": len(means),
                "paper": first["paper"] and first["paper"]["accuracy"],
                "comparable": first["comparable"],
                "runs": [f"{each['name']}/{fold['run']}" for each in group for fold in each["folds"]],
            }
        )
    failed = {f"{each['name']}/fold-{f['fold']}": f["why"] for each in outcomes for f in each["failed"]}
    folder = open_folder(place)
    claim(folder, "transfer", "transfer")
    return _write(folder, "transfer", "transfer", table, failed)


def _write(folder: Folder, kind: str, name: str, table: list[dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    columns = [column for column in table[0] if column not in ("run", "runs")]
    result = {
        "kind": "study",
        "of": kind,
        "name": name,
        "folder": str(folder),
        "columns": columns,
        "rows": table,
        "failed": [{"run": run, "why": why} for run, why in failed.items()],
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, ["run", *columns], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(table)
    folder.write(TABLE, text.getvalue().encode())
    folder.write(RESULTS, strict_json.dumps(result, indent=1).encode())
    return result
