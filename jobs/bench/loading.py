"""Compares the loader with bare decoding and common loaders, on the same clips and cores."""

import dataclasses
import importlib.util
import io
import multiprocessing
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from erann_dist.data.audio import clip_buffer
from erann_dist.data.cache import ClipCache
from erann_dist.data.loader import Crops, Loader, random_crops
from erann_dist.data.manifest import Manifest, concatenate, load_manifest
from erann_dist.data.sampling import BalancedSampler, class_lists
from erann_dist.environment import KEEP_MEMORY, end_with_parent, usable_cpus
from erann_dist.errors import UsageError, UserError
from erann_dist.storage.folder import LocalFolder, open_folder
from erann_dist.storage.s3_ranges import S3_REQUESTS
from jobs.terminal.progress import console

_BATCH = 32
_BLOCK = 512
_WARM_UP = 0.2  # Share of the batches that are not counted, while processes start and memory is allocated.
# Clips/s per core that no loader can reach: a request or the start of a decoder alone takes some 50 microseconds.
MOST_PER_CORE = 20_000

Way = Callable[["Task"], Iterator[int]]  # Loads all batches; yields the number of clips loaded since the last yield.


@dataclass(frozen=True)
class Task:
    """What every loader has to load: batches of 32 random crops, drawn with class balance."""

    shards: str
    batches: int
    crop_samples: int
    threads: int
    endpoint: str | None = None  # of the S3 server with a copy of the shards
    cache: str | None = None

    def clips(self) -> Manifest:
        return load_manifest(self.shards, self.endpoint)

    def sampler(self, clips: Manifest) -> BalancedSampler:
        return BalancedSampler(class_lists(clips.label_values, clips.label_offsets, clips.num_classes), 0)

    def crops(self, clips: Manifest) -> list[Crops]:
        positions = np.arange(self.batches * _BATCH)
        rows = self.sampler(clips).draw(positions)
        drawn = zip(np.split(rows, self.batches), np.split(positions, self.batches), strict=True)
        return [random_crops(clips, rows, positions, 0, self.crop_samples) for rows, positions in drawn]

    @property
    def warm_up(self) -> int:
        """Clips of the batches that are not counted."""
        return round(self.batches * _WARM_UP) * _BATCH


def bench_loader(shards: str, batches: int, crop_s: float, rounds: int) -> dict[str, Any]:
    """Measure all loaders, interleaved, each in its own process. The ratios are relative to bare decoding."""
    if not isinstance(open_folder(shards), LocalFolder):
        raise UsageError(f"{shards}: not a local folder; the benchmark needs a shard set on a disk")
    cores = usable_cpus()
    task = Task(shards, batches, round(crop_s * 44_100), cores)
    os.environ.update(KEEP_MEMORY)
    workers = sorted({-(-cores // 2), cores, cores + 1})
    ways: dict[str, tuple[Way, Task]] = {
        "limit": (_limit, task),
        "local": (_ours, task),
        "beside_step": (partial(_beside_step, same_process=True), task),
        "beside_other_step": (partial(_beside_step, same_process=False), task),
        **{f"webloader_{n}": (partial(_webloader, workers=n), task) for n in workers},
        f"dataloader_{cores}": (partial(_dataloader, workers=cores), task),
    }
    with tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch, _s3(shards, Path(scratch)) as remote:
        if remote:
            there = dataclasses.replace(task, shards=remote[0], endpoint=remote[1])
            cached = dataclasses.replace(there, cache=f"{scratch}/cache")
            ways |= {
                "s3_arrow": (partial(_bare_client, client="arrow"), there),
                "s3_s3fs": (partial(_bare_client, client="s3fs"), there),
                "cold_cache": (_cold, cached),
                "warm_cache": (_warm, cached),
            }
        results: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (way, its_task) in ways.items():
                shutil.rmtree(f"{scratch}/cache", ignore_errors=True)
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    results[name].append(process.submit(_measured, way, its_task).result())
                require_possible(name, results[name][-1]["clips_per_s"], cores)
                console.print(f"{name:18} {results[name][-1]['clips_per_s']:8.1f} clips/s")
    medians = {
        name: {key: round(statistics.median(each[key] for each in measured), 3) for key in measured[0]}
        for name, measured in results.items()
    }
    webloader = max((name for name in ways if name.startswith("webloader")), key=lambda n: medians[n]["clips_per_s"])

    def ratio(name: str, to: str = "limit") -> float | None:
        """The median of the rounds' ratios, so that a temporary disturbance of the machine affects both."""
        if name not in results:
            return None
        pairs = zip(results[name], results[to], strict=True)
        return round(statistics.median(one["clips_per_s"] / other["clips_per_s"] for one, other in pairs), 4)

    return {
        "cores": cores,
        "clips": batches * _BATCH,
        "rounds": rounds,
        "limit_clips_per_s": medians["limit"]["clips_per_s"],
        "local_ratio": ratio("local"),
        "warm_cache_ratio": ratio("warm_cache"),
        "cold_cache_ratio": ratio("cold_cache"),
        "s3_arrow_ratio": ratio("s3_arrow"),
        "s3_s3fs_ratio": ratio("s3_s3fs"),
        "vs_webloader": ratio("local", webloader),
        "vs_dataloader": ratio("local", f"dataloader_{cores}"),
        "beside_step_ratio": ratio("beside_step", "beside_other_step"),
        "balanced_overhead": round(_draw_seconds(task) * medians["limit"]["clips_per_s"], 5),
        "ways": medians,
    }


def _measured(way: Way, task: Task) -> dict[str, float]:
    """Clips/s, MB/s of decoded audio and CPU time after the warm-up; peak memory including child processes."""
    clips = task.clips()
    sampled = sum(int(crops.counts.sum()) for crops in task.crops(clips)) / (task.batches * _BATCH)
    warm, warm_cpu, uncounted, done = 0.0, 0.0, 0, 0
    for count in way(task):
        done += count
        if not warm and done >= task.warm_up:
            warm, warm_cpu, uncounted = time.perf_counter(), _cpu_seconds(resource.RUSAGE_SELF), done
    seconds = time.perf_counter() - warm
    counted = done - uncounted
    # The CPU time of ended child processes is known only in total.
    used = _cpu_seconds(resource.RUSAGE_SELF) - warm_cpu + _cpu_seconds(resource.RUSAGE_CHILDREN) * counted / done
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "clips_per_s": counted / seconds,
        "mb_per_s": counted / seconds * sampled * 2 / 1e6,
        "cpu_share": used / seconds / usable_cpus(),
        "cpu_ms_per_clip": 1000 * used / counted,
        "peak_mb": (own + children) / 1024,
    }


def _cpu_seconds(whose: int) -> float:
    usage = resource.getrusage(whose)
    return usage.ru_utime + usage.ru_stime


def _limit(task: Task) -> Iterator[int]:
    """libsndfile alone: the clips are in memory, the samples are discarded."""
    clips = task.clips()
    crops = task.crops(clips)
    data = {row: _bytes(clips, row) for row in sorted({int(row) for each in crops for row in each.rows})}
    jobs = [
        (data[row], start, count)
        for each in crops
        for row, start, count in zip(each.rows.tolist(), each.starts.tolist(), each.counts.tolist(), strict=True)
    ]

    def decode(jobs: list[tuple[bytes, int, int]]) -> None:
        buffer = clip_buffer()
        for clip, start, count in jobs:
            buffer.room(len(clip))[:] = clip
            buffer.crop(start, count)

    with ThreadPoolExecutor(task.threads) as pool:
        for part in (jobs[: task.warm_up], jobs[task.warm_up :]):
            list(pool.map(decode, (part[thread :: task.threads] for thread in range(task.threads))))
            yield len(part)


def _ours(task: Task) -> Iterator[int]:
    clips = task.clips()
    for batch in Loader(clips, task.crops(clips), threads=task.threads):
        yield len(batch.pcm)


def _cold(task: Task) -> Iterator[int]:
    """With a cold cache: each repetition of a clip is treated as a clip of another set."""
    clips = task.clips()
    crops = task.crops(clips)
    times = Counter[int]()
    for each in crops:
        for i, row in enumerate(each.rows.tolist()):
            each.rows[i] += times[row] * len(clips)
            times[row] += 1
    copies = concatenate([_copy(clips, number) for number in range(max(times.values()))])
    with closing(ClipCache(Path(str(task.cache)), 1 << 40)) as cache:
        for batch in Loader(copies, crops, threads=task.threads, cache=cache):
            yield len(batch.pcm)


def _copy(clips: Manifest, number: int) -> Manifest:
    """The same clips, with another set's hash."""
    tars = [dataclasses.replace(tar, set_hash=f"{number:016x}") for tar in clips.tars]
    return dataclasses.replace(clips, tars=tars)


def _warm(task: Task) -> Iterator[int]:
    """With a warm cache, which has all of the clips."""
    clips = task.clips()
    crops = task.crops(clips)
    with closing(ClipCache(Path(str(task.cache)), 1 << 40)) as cache:
        drawn = np.unique(np.concatenate([each.rows for each in crops]))
        for _ in Loader(clips, [random_crops(clips, drawn, drawn, 0, 1)], threads=task.threads, cache=cache):
            pass
        for batch in Loader(clips, crops, threads=task.threads, cache=cache):
            yield len(batch.pcm)


def _beside_step(task: Task, same_process: bool) -> Iterator[int]:
    """The loader alongside a thread that launches operations continuously, as a training step does for a GPU."""
    ended: threading.Event | Any
    other: threading.Thread | Any
    if same_process:
        ended = threading.Event()
        other = threading.Thread(target=_launch_operations, args=(ended,))
    else:
        context = multiprocessing.get_context("spawn")
        ended = context.Event()
        other = context.Process(target=_launch_operations, args=(ended,))
    other.start()
    try:
        yield from _ours(task)
    finally:
        ended.set()
        other.join()


def _launch_operations(until: Any) -> None:
    """Small operations in one thread, which holds Python's GIL nearly all the time."""
    torch.set_num_threads(1)
    x = torch.ones(64, 64)
    while not until.is_set():
        for _ in range(1000):
            x = torch.relu(x + 1)


def _bare_client(task: Task, client: str) -> Iterator[int]:
    """Ranged reads of the same clips, as many at once as in the loader, without decoding."""
    from erann_dist.storage.s3_ranges import S3Object

    clips = task.clips()
    stop = threading.Event()
    objects = [S3Object(tar.folder, tar.name, stop) for tar in clips.tars if not isinstance(tar.folder, LocalFolder)]
    rows = np.concatenate([each.rows for each in task.crops(clips)])

    def read(row: int) -> int:
        tar = objects[clips.shards[row]]
        (tar.read if client == "arrow" else tar.read_carefully)(int(clips.offsets[row]), int(clips.sizes[row]))
        return 1

    with ThreadPoolExecutor(S3_REQUESTS) as pool:
        yield from completed(pool, read, rows.tolist(), 2 * S3_REQUESTS)


def completed(pool: Executor, work: Callable[[int], int], values: Iterable[int], most: int) -> Iterator[int]:
    """The results as they complete, with at most `most` in flight, so that few completed ones are not yet counted.

    In the order of the values, all others could complete, unmeasured, during the wait for a slow first one.
    """
    rest = iter(values)
    running = {pool.submit(work, value) for value in islice(rest, most)}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()
        running |= {pool.submit(work, value) for value in islice(rest, most - len(running))}


def require_possible(way: str, clips_per_s: float, cores: int) -> None:
    """Raise UserError for an impossible rate, which means that the measurement is wrong."""
    if clips_per_s > MOST_PER_CORE * cores:
        raise UserError(
            f"{way}: {clips_per_s:,.0f} clips/s were measured on {cores} cores, but more than {MOST_PER_CORE:,} per "
            "core are impossible; the measurement is wrong: give more --batches"
        )


def _webloader(task: Task, workers: int) -> Iterator[int]:
    """webdataset's WebLoader: whole tars in shuffled order, random crops of the same length."""
    import webdataset

    clips = task.clips()
    tars = [str(tar) for tar in clips.tars]

    def crop(sample: dict[str, Any]) -> npt.NDArray[np.int16]:
        return _cropped(sample["flac"], task.crop_samples)

    dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(100).map(crop)
    batched = dataset.repeat().batched(_BATCH, collation_fn=np.stack)
    with warnings.catch_warnings(action="ignore"):  # About more workers than cores.
        loader = webdataset.WebLoader(batched, batch_size=None, num_workers=workers, multiprocessing_context="fork")
        done = 0
        for batch in loader:  # The last batch of an epoch is smaller.
            yield len(batch)
            done += len(batch)
            if done >= task.batches * _BATCH:
                break


class _Clips(torch.utils.data.Dataset[npt.NDArray[np.int16]]):
    """The same crops by index, for a map-style DataLoader."""

    def __init__(self, task: Task) -> None:
        self._manifest = task.clips()
        self._rows = np.concatenate([each.rows for each in task.crops(self._manifest)])
        self._samples = task.crop_samples

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> npt.NDArray[np.int16]:
        return _cropped(_bytes(self._manifest, int(self._rows[index])), self._samples)


def _dataloader(task: Task, workers: int) -> Iterator[int]:
    loader = torch.utils.data.DataLoader(
        _Clips(task), batch_size=_BATCH, num_workers=workers, multiprocessing_context="fork"
    )
    for batch in loader:
        yield len(batch)


def _cropped(data: bytes, samples: int) -> npt.NDArray[np.int16]:
    """A random crop as commonly decoded: with soundfile, from a buffer; shorter clips are padded."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        file.seek(int(np.random.default_rng().integers(max(1, file.frames - samples + 1))))
        return file.read(samples, dtype="int16", fill_value=0)


def _bytes(clips: Manifest, row: int) -> bytes:
    with open(str(clips.tars[clips.shards[row]]), "rb") as file:
        return os.pread(file.fileno(), int(clips.sizes[row]), int(clips.offsets[row]))


def _draw_seconds(task: Task) -> float:
    """Seconds to draw one clip, in blocks as in training."""
    sampler = task.sampler(task.clips())
    began = time.perf_counter()
    for block in range(100):
        sampler.draw(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
    return (time.perf_counter() - began) / (100 * _BLOCK)


@contextmanager
def _s3(shards: str, scratch: Path) -> Iterator[tuple[str, str] | None]:
    """URL and endpoint of a copy of the shard set on a local S3 server (moto). None if moto is not installed."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        console.print("no S3 server: install moto[server] to measure reading from S3")
        yield None
        return
    os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_DEFAULT_REGION="us-east-1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=end_with_parent, cwd=scratch
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        import boto3  # type: ignore[import-untyped]
        from botocore.config import Config

        retries = Config(retries={"total_max_attempts": 20, "mode": "standard"})
        boto3.client("s3", endpoint_url=endpoint, config=retries).create_bucket(Bucket="bench")
        folder, source = open_folder("s3://bench/set", endpoint), LocalFolder(shards)
        for name in source.sizes():
            folder.write(name, source.read(name))
        yield "s3://bench/set", endpoint
    finally:
        server.terminate()
        server.wait()
