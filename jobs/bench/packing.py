"""Compares packing with bare encoding, and measures its planning at full size."""

import io
import multiprocessing
import os
import resource
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

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.embedded import ray_cluster
from erann_dist import SAMPLE_RATE
from erann_dist.data.audio import load, to_pcm16
from erann_dist.data.manifest import load_manifest
from erann_dist.environment import KEEP_MEMORY, usable_cpus
from erann_dist.errors import UserError
from erann_dist.storage.folder import LocalFolder
from jobs.shard_sets.pack import build_all
from jobs.terminal.progress import console
from shards import build
from shards.build import Plan
from shards.clip import Packing
from shards.sources.audioset import read_audioset
from shards.sources.csvfile import read_lines
from shards.sources.files import find_audio
from shards.sources.rows import Source, SourceRow, rows_table
from shards.synthetic import SyntheticAudioSet, write_synthetic_audioset

_LINKS_TO_ONE = 60_000  # Hard links per file; ext4 allows 65,000.


def bench_pack(audio: Path | None, clips: int, rounds: int, clips_per_shard: int) -> dict[str, Any]:
    """Compare packing on the embedded cluster with bare decoding, resampling and encoding of the same clips.

    Bare is a warm loop in one process per core that discards the FLACs. Packing is everything from the first task to
    the last recorded shard: decoder processes, tars, checksums, the files on disk. In both, the clips are files of
    `audio`, or of the synthetic AudioSet, reused as needed.
    """
    cores = usable_cpus()
    with tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch, ray_cluster():
        paths = _sounds(audio, Path(scratch))
        many = list(islice(cycle(paths), clips))
        rows = rows_table(SourceRow(f"clip-{i:06d}", [0], os.fsencode(path), path.name) for i, path in enumerate(many))
        source = Source("bench", "classification", ["a"], ["a"], rows, [])
        os.environ.update(KEEP_MEMORY)  # So that the bare processes have the same advantage.
        with multiprocessing.get_context("spawn").Pool(cores) as pool:
            parts = [many[i::cores] for i in range(cores)]
            seconds: dict[str, list[float]] = {"bare": [], "packed": []}
            for number in range(-1, rounds):  # Round -1 is a warm-up of both.
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
    """Audio files that can be decoded."""
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
    """A folder that is emptied afterwards, as a round may write gigabytes."""
    folder = LocalFolder(f"{scratch}/round-{number}")
    yield folder
    for name in folder.sizes():
        folder.delete(name)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bench_plan(segments: Path, missing: float) -> dict[str, Any]:
    """Measure packing without the decoding, at the full size of a real segment list.

    The audio files are hard links to a few files, with PANNs' names in 100 folders; a share `missing` is left out. The
    results of the shards' tasks are made up: a clip of 10 s for each file.
    """
    with tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch:
        audio, out = Path(scratch, "audio"), Path(scratch, "shards")
        with console.status("linking audio files"):
            links = _link_files(segments, audio, missing)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            steps = (_step_plan, _step_finish, _step_load, _step_plan)
            planned, finished, loaded, again = (pool.apply(step, (segments, audio, out)) for step in steps)
    if again["to_do"]:
        raise UserError("a finished set would be packed again")
    return {
        "files": links,
        "rows": planned["rows"],
        "planning_s": planned["seconds"],
        "planning_peak_mb": planned["peak_mb"],
        "tables_s": finished["seconds"],
        "tables_peak_mb": finished["peak_mb"],
        "clips": loaded["clips"],
        "load_manifest_s": loaded["seconds"],
        "again_s": again["seconds"],
    }


def _link_files(segments: Path, audio: Path, missing: float) -> int:
    """Create a file YYTID.wav in one of 100 folders for each segment that is not missing. Returns their number."""
    base, links = Path(), 0
    for folder in range(100):
        (audio / f"{folder:02d}").mkdir(parents=True)
    for number, (_, fields) in enumerate(read_lines(segments, comment="#")):
        if number % 1000 < 1000 * missing:
            continue
        if links % _LINKS_TO_ONE == 0:
            base = audio.parent / f"base-{links:07d}"
            base.touch()
        os.link(base, audio / f"{number % 100:02d}" / f"Y{fields[0]}.wav")
        links += 1
    return links


def _plan_of(segments: Path, audio: Path, out: Path) -> Plan:
    return Plan(read_audioset(segments, audio), Packing(), LocalFolder(str(out)))


def _step_plan(segments: Path, audio: Path, out: Path) -> dict[str, Any]:
    began = time.perf_counter()
    plan = _plan_of(segments, audio, out)
    to_do = build.start(plan)
    if to_do:
        plan.task(0)
    return {"rows": len(plan.source.rows), "to_do": to_do} | _cost(began)


def _step_finish(segments: Path, audio: Path, out: Path) -> dict[str, Any]:
    """Make up the tasks' results; then write the tables, which is the only part that is timed."""
    plan = _plan_of(segments, audio, out)
    for shard in range(plan.num_shards):
        task = plan.task(shard)
        rows = task.rows
        there = pc.is_null(rows["reason"]).to_numpy()
        facts = {"shard": shard, "offset": 512, "size": 400_000, "samples": 441_000, "peak": 0.5, "crc32": shard}
        columns = {name: pa.array(np.full(len(rows), value), mask=~there) for name, value in facts.items()}
        columns["format"] = pa.array(np.where(there, "pcm 44100 Hz mono", ""), mask=~there)
        columns |= {name: pa.nulls(len(rows)) for name in ("lost", "channel_peak")}
        for name in ("key", "labels", "source", "split", "fold", "reason", "detail"):
            columns[name] = rows[name]
        table = pa.table(columns).select(build.OUTCOME_SCHEMA.names).cast(build.OUTCOME_SCHEMA)
        size, name = 2_000_000_000, f"audioset-{shard:06d}.tar"
        tar = {"shard": shard, "name": name, "size": size, "clips": int(there.sum()), "sha256": f"{shard:064x}"}
        build.keep(task, build.ShardResult(table, tar))
    began = time.perf_counter()
    build.finish(plan)
    return _cost(began)


def _step_load(segments: Path, audio: Path, out: Path) -> dict[str, Any]:
    began = time.perf_counter()
    return {"clips": len(load_manifest(out))} | _cost(began)


def _cost(began: float) -> dict[str, float]:
    """Seconds since `began`, and this process's peak memory since its start."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(time.perf_counter() - began, 2), "peak_mb": round(peak)}
