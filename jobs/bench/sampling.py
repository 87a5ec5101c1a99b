"""The sampler at the full size of real segment lists."""

import multiprocessing
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from erann_dist.folder import LocalFolder
from erann_dist.manifest import CLIP_SCHEMA, REPORT_SCHEMA, SHARD_SCHEMA, SetInfo, content_hash, write_shard_set_tables
from erann_dist.recipe import DataSource
from erann_dist.sampling import BalancedSampler, Sampler, SequentialSampler, UniformSampler, class_lists
from erann_dist.shared_clips import shared_clips
from jobs.progress import console
from shards.sources.audioset import read_audioset

_BLOCK = 512
_FAR = 10**9
_CLIPS_PER_SHARD = 2500


def bench_sampler(segments: list[Path], rounds: int) -> dict[str, Any]:
    """Build the plan of shard sets that hold every clip of the lists, draw from it and jump in it."""
    with tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch:
        folders = []
        for number, path in enumerate(segments):
            with console.status(f"making up a shard set of {path.name}"):
                folders.append(_made_up_set(path, Path(scratch, str(number))))
        results = []
        for _ in range(rounds):  # each in a new process, as a worker is
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results.append(pool.apply(_measure, (folders,)))
    return {key: round(statistics.median(result[key] for result in results), 3) for key in results[0]}


def _made_up_set(segments: Path, folder: Path) -> str:
    """A shard set's tables, without its tars: a clip of 10 s for each segment."""
    empty = folder / "no-audio"  # but for a file that no segment has
    empty.mkdir(parents=True)
    (empty / "none.wav").touch()
    source = read_audioset(segments, empty)
    count = len(source.rows)
    numbers = np.arange(count)
    columns = {
        "key": source.rows["key"],
        "labels": source.rows["labels"],
        "split": pa.array(["train"] * count),
        "fold": pa.nulls(count, pa.int8()),
        "shard": numbers // _CLIPS_PER_SHARD,
        "offset": numbers % _CLIPS_PER_SHARD * 410_000,
        "size": np.full(count, 400_000),
        "samples": np.full(count, 441_000),
        "peak": np.full(count, 0.5),
        "crc32": numbers,
        "source": source.rows["key"],
        "format": pa.array(["pcm 44100 Hz mono"] * count),
    }
    clips = pa.table(columns).select(CLIP_SCHEMA.names).cast(CLIP_SCHEMA)
    names = [f"audioset-{shard:06d}.tar" for shard in range(-(-count // _CLIPS_PER_SHARD))]
    tars = [{"shard": i, "name": name, "size": 1, "clips": 0, "sha256": ""} for i, name in enumerate(names)]
    info = SetInfo(
        "audioset", "tagging", source.label_ids, source.label_names, 44_100, "flac", {}, {}, {}, "", content_hash(clips)
    )
    write_shard_set_tables(
        LocalFolder(str(folder)), info, clips, pa.Table.from_pylist(tars, SHARD_SCHEMA), REPORT_SCHEMA.empty_table()
    )
    return str(folder)


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
    """Memory that only this process has: what is mapped from files counts for nobody."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kb) for kb in re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", text, re.MULTILINE)) / 1024
