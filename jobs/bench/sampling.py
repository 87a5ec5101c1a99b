"""Measures the sampler at the full size of real segment lists."""

import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from erann_dist.data.sampling import BalancedSampler, Sampler, SequentialSampler, UniformSampler, class_lists
from erann_dist.data.shared_clips import shared_clips
from erann_dist.recipe import DataSource
from jobs.terminal.progress import console
from shards.listed import write_listed_set

_BLOCK = 512
_FAR = 10**9


def bench_sampler(segments: list[Path], rounds: int) -> dict[str, Any]:
    """Build the sampler for shard sets with every clip of the lists, draw from it, and jump in it."""
    with tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch:
        folders = []
        for number, path in enumerate(segments):
            with console.status(f"making up the tables of {path.name}"):
                write_listed_set(path, Path(scratch, str(number)))
                folders.append(str(Path(scratch, str(number))))
        results = []
        for _ in range(rounds):  # Each in a new process, as for a worker.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(_measure, (folders,)))
    return {key: round(statistics.median(result[key] for result in results), 3) for key in results[0]}


def _measure(folders: list[str]) -> dict[str, float]:
    before = _private_mb()
    began = time.perf_counter()
    with shared_clips([DataSource(url=folder) for folder in folders]) as clips:
        sampler = BalancedSampler(class_lists(clips.label_values, clips.label_offsets, clips.num_classes), 0)
        sampler.draw(np.arange(_BLOCK))
        result = {"clips": len(clips), "build_s": time.perf_counter() - began, "private_mb": _private_mb() - before}
        blocks = 400
        began = time.perf_counter()
        for block in range(blocks):
            sampler.draw(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
        result["draws_per_s"] = blocks * _BLOCK / (time.perf_counter() - began)
        others: dict[str, Sampler] = {
            "seek_ms": sampler,
            "seek_uniform_ms": UniformSampler(len(clips), 0),
            "seek_sequential_ms": SequentialSampler(len(clips)),
        }
        for name, each in others.items():
            began = time.perf_counter()
            each.draw(np.arange(_FAR, _FAR + len(sampler.classes)))
            result[name] = 1000 * (time.perf_counter() - began)
    return result


def _private_mb() -> float:
    """This process's private memory, without mapped files."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", text, re.MULTILINE)) / 1024
