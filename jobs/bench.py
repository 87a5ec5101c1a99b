"""Measurements, each a ratio of things that are run side by side, in turns."""

import io
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from cluster.embedded import ray_cluster
from erann_dist import SAMPLE_RATE
from erann_dist.audio import load, to_pcm16
from erann_dist.folder import LocalFolder
from jobs.pack import build_all
from jobs.progress import console
from shards.build import Plan
from shards.clip import Packing
from shards.sources.files import find_audio
from shards.sources.rows import Source, SourceRow, rows_table
from shards.synthetic import SyntheticAudioSet, write_synthetic_audioset


def bench_pack(audio: Path | None, clips: int, rounds: int, clips_per_shard: int) -> dict[str, Any]:
    """Packing on the embedded cluster against the bare decoding, resampling and encoding of the same clips.

    Bare is a loop in as many processes as there are cores, warm, that throws the FLACs away. Packing is everything from
    the first task to the last noted shard: decoder processes, tars, checksums, the files on disk. In both, clips are
    files of `audio`, or of the synthetic AudioSet, over and over.
    """
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch, ray_cluster():
        paths = _sounds(audio, Path(scratch))
        many = list(islice(cycle(paths), clips))
        rows = rows_table(SourceRow(f"clip-{i:06d}", [0], os.fsencode(path), path.name) for i, path in enumerate(many))
        source = Source("bench", "classification", ["a"], ["a"], rows, [])
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            parts = [many[i::cores] for i in range(cores)]
            seconds: dict[str, list[float]] = {"bare": [], "packed": []}
            for number in range(-1, rounds):  # round -1 warms both up
                few = [part[:8] for part in parts] if number < 0 else parts
                seconds["bare"].append(_seconds(partial(pool.map, _bare, few, chunksize=1)))
                with _folder(scratch, number) as folder:
                    rows = source.rows.slice(0, 8 * cores) if number < 0 else source.rows
                    packing = Packing(clips_per_shard=8 if number < 0 else clips_per_shard)
                    plan = Plan(replace(source, rows=rows), packing, folder)
                    seconds["packed"].append(_seconds(partial(_pack, plan)))
                if number < 0:
                    seconds = {"bare": [], "packed": []}
                    continue
                console.print("  ".join(f"{name} {clips / times[-1]:.1f} clips/s" for name, times in seconds.items()))
    ratios = [bare / packed for bare, packed in zip(*seconds.values(), strict=True)]
    return {
        "clips": clips,
        "files": len(paths),
        "cores": cores,
        "rounds": rounds,
        **{f"{name}_clips_per_s": round(clips / statistics.median(times), 1) for name, times in seconds.items()},
        "ratios": [round(ratio, 4) for ratio in ratios],
        "ratio_to_bare": round(statistics.median(ratios), 4),
    }


def _sounds(audio: Path | None, scratch: Path) -> list[Path]:
    """Files that can be decoded."""
    if audio is None:
        with console.status("writing the synthetic AudioSet"):
            write_synthetic_audioset(scratch / "synthetic")
        audio = SyntheticAudioSet.at(scratch / "synthetic").audio
    paths = [Path(os.fsdecode(path)) for path in sorted(find_audio(audio).table["path"].to_pylist())]
    return [path for path in paths if path.stat().st_size > 1000]


def _pack(plan: Plan) -> None:
    for _ in build_all((plan.task(shard) for shard in range(plan.num_shards)), lambda progress: None, keep=True):
        pass


def _bare(paths: list[Path]) -> None:
    import soundfile

    for path in paths:
        pcm = to_pcm16(load(path, SAMPLE_RATE).samples)
        soundfile.write(io.BytesIO(), pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")


@contextmanager
def _folder(scratch: str, number: int) -> Iterator[LocalFolder]:
    """A folder that is gone afterwards: a round may write gigabytes."""
    folder = LocalFolder(f"{scratch}/round-{number}")
    yield folder
    for name in folder.sizes():
        folder.delete(name)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
