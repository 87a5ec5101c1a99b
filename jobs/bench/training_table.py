"""Measures training on one GPU by variant, micro-batch, precision, compilation and memory format."""

import itertools
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from rich.table import Table

from erann_dist.data.sources import load_sources
from erann_dist.errors import UsageError, UserError
from erann_dist.recipe import Recipe
from erann_dist.train.distributed import pick_device, single_worker
from jobs.bench.flops import peak_flops, training_flops
from jobs.bench.training import Turn, measure
from jobs.terminal.progress import console
from jobs.terminal.show import console as out
from jobs.terminal.show import facts_page
from jobs.training.probe_run import changed, endless

VARIANTS = ("ERANN-1-6", "ERANN-2-5")
MICRO_BATCHES = (8, 16, 32, 64, 128)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_WARM_UP, _STEPS = 10, 30


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    variant: str
    micro_batch: int = 32
    precision: str = "bf16"
    compile: bool = False
    channels_last: bool = True


def settings(variants: Sequence[str], micro_batches: Sequence[int], precisions: Sequence[str]) -> Iterator[Setting]:
    """The micro-batches with all other settings at their defaults, then all combinations of the other settings."""
    for variant in variants:
        default = Setting(variant)
        yield from (replace(default, micro_batch=size) for size in micro_batches)
        for precision, compiled, channels_last in itertools.product(precisions, (False, True), (True, False)):
            setting = replace(default, precision=precision, compile=compiled, channels_last=channels_last)
            if setting != default or default.micro_batch not in micro_batches:
                yield setting


def bench_table(recipe: Recipe, lines: Sequence[Setting], warm_up: int = _WARM_UP, steps: int = _STEPS) -> Any:
    """Measure each setting with our loop and the plain engine, in a separate process, on synthetic batches."""
    classes = load_sources(recipe.data.train).num_classes
    context = multiprocessing.get_context("spawn")
    table = []
    precisions = dict.fromkeys(line.precision for line in lines)
    peaks = {precision: peak_flops(recipe.run.device, precision) for precision in precisions}
    for line in lines:
        flops = training_flops(line.variant, classes, recipe.data.crop_samples)
        with ProcessPoolExecutor(1, context) as process, tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch:
            try:
                seconds = process.submit(_step_seconds, recipe, line, scratch, warm_up, steps).result()
            except UserError as error:  # Such as a GPU with too little memory.
                table.append(asdict(line) | {"examples_per_s": None, "mfu": None, "problem": str(error)})
            else:
                speed = line.micro_batch / seconds
                mfu = round(speed * flops / peaks[line.precision], 4)
                figures = {"examples_per_s": round(speed, 1), "mfu": mfu, "problem": None}
                table.append(asdict(line) | figures)
        console.print(" ".join(f"{name} {value}" for name, value in table[-1].items()))
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "crop_s": recipe.data.crop_s,
        "peak_tflops": {precision: round(peak / 1e12, 2) for precision, peak in peaks.items()},
        "table": table,
    }


def require_gpu() -> None:
    if not torch.cuda.is_available():
        raise UsageError("--table needs an NVIDIA GPU")


def _step_seconds(recipe: Recipe, line: Setting, scratch: str, warm_up: int, steps: int) -> float:
    """Seconds of a step, in this process."""
    optim = {name: getattr(line, name) for name in ("micro_batch", "precision", "compile")}
    recipe = changed(
        endless(recipe, warm_up),
        model={"variant": line.variant},
        optim=optim | {"global_batch": line.micro_batch, "small_micro_batch": True},
        run={"workers": 1, "engine": "torch", "dir": scratch},
    )
    turn = Turn("plain", recipe, warm_up, steps, channels_last=line.channels_last)
    with single_worker(pick_device(recipe.run.device)) as workers:
        return measure(turn, workers).step_s


def table_page(result: dict[str, Any]) -> None:
    facts_page(result)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in result["table"][0]:
        table.add_column(name.replace("_", " "), justify="left" if name == "variant" else "right")
    for line in result["table"]:
        table.add_row(*("" if value is None else str(value) for value in line.values()))
    out.print(table)
