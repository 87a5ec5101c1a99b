"""The loader against bare decoding and the usual loaders, on the same clips and cores."""

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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import soundfile
import torch

from erann_dist.audio import clip_buffer
from erann_dist.cache import ClipCache
from erann_dist.environment import KEEP_MEMORY, end_with_parent
from erann_dist.errors import UsageError
from erann_dist.folder import LocalFolder, open_folder
from erann_dist.loader import S3_REQUESTS, Crops, load, random_crops
from erann_dist.manifest import Manifest, load_manifest
from erann_dist.sampling import BalancedSampler, class_lists
from jobs.progress import console

_BATCH = 32
_BLOCK = 512


@dataclass(frozen=True)
class Task:
    """What every way of loading does: so many batches of 32 random crops, drawn with class balance."""

    shards: str
    batches: int
    crop_samples: int
    threads: int
    endpoint: str | None = None  # of the S3 server with a copy of the shards
    cache: str | None = None

    def clips(self) -> Manifest:
        return load_manifest(self.shards, self.endpoint)

    def crops(self, clips: Manifest) -> list[Crops]:
        positions = np.arange(self.batches * _BATCH)
        lists = class_lists(clips.label_values, clips.label_offsets, clips.num_classes)
        rows = BalancedSampler(lists, 0).draw(positions)
        drawn = zip(np.split(rows, self.batches), np.split(positions, self.batches), strict=True)
        return [random_crops(clips, rows, positions, 0, self.crop_samples) for rows, positions in drawn]


def bench_loader(shards: str, batches: int, crop_s: float, rounds: int) -> dict[str, Any]:
    """Each way in turns, in a process of its own; ratios are of the medians' clips/s to the bare decoding's."""
    if not isinstance(open_folder(shards), LocalFolder):
        raise UsageError(f"{shards}: the benchmark takes a shard set on a disk")
    cores = len(os.sched_getaffinity(0))
    task = Task(shards, batches, round(crop_s * 44_100), cores)
    os.environ.update(KEEP_MEMORY)
    workers = sorted({-(-cores // 2), cores, cores + 1})
    ways: dict[str, tuple[Callable[[Task], dict[str, float]], Task]] = {
        "limit": (_limit, task),
        "local": (_ours, task),
        "beside_step": (partial(_beside_step, same_process=True), task),
        "beside_other_step": (partial(_beside_step, same_process=False), task),
        **{f"webloader_{n}": (partial(_webloader, workers=n), task) for n in workers},
        f"dataloader_{cores}": (partial(_dataloader, workers=cores), task),
    }
    with tempfile.TemporaryDirectory(prefix="erann-bench-") as scratch, _s3(shards, Path(scratch)) as remote:
        if remote:
            there = Task(remote[0], batches, task.crop_samples, cores, remote[1])
            cached = Task(remote[0], batches, task.crop_samples, cores, remote[1], f"{scratch}/cache")
            ways |= {
                "s3_arrow": (partial(_bare_client, client="arrow"), there),
                "s3_s3fs": (partial(_bare_client, client="s3fs"), there),
                "cold_cache": (_ours, cached),
                "warm_cache": (_ours, cached),
            }
        results: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            shutil.rmtree(f"{scratch}/cache", ignore_errors=True)
            for name, (way, its_task) in ways.items():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    results[name].append(process.submit(way, its_task).result())
                console.print(f"{name:18} {results[name][-1]['clips_per_s']:8.1f} clips/s")
    medians = {
        name: {key: round(statistics.median(each[key] for each in measured), 3) for key in measured[0]}
        for name, measured in results.items()
    }
    limit = medians["limit"]["clips_per_s"]
    webloader = max(figures["clips_per_s"] for name, figures in medians.items() if name.startswith("webloader"))

    def ratio(name: str) -> float | None:
        return round(medians[name]["clips_per_s"] / limit, 4) if name in medians else None

    return {
        "cores": cores,
        "clips": batches * _BATCH,
        "rounds": rounds,
        "limit_clips_per_s": limit,
        "local_ratio": ratio("local"),
        "warm_cache_ratio": ratio("warm_cache"),
        "cold_cache_ratio": ratio("cold_cache"),
        "s3_arrow_ratio": ratio("s3_arrow"),
        "s3_s3fs_ratio": ratio("s3_s3fs"),
        "vs_webloader": round(medians["local"]["clips_per_s"] / webloader, 4),
        "vs_dataloader": round(medians["local"]["clips_per_s"] / medians[f"dataloader_{cores}"]["clips_per_s"], 4),
        "beside_step_ratio": round(
            medians["beside_step"]["clips_per_s"] / medians["beside_other_step"]["clips_per_s"], 4
        ),
        "balanced_overhead": round(_draw_seconds(task) * limit, 5),
        "ways": medians,
    }


def _measured(work: Callable[[], object], clips: int, sampled: int) -> dict[str, float]:
    """Clips/s and MB/s of decoded sound, the share of all cores, CPU time, and peak memory with child processes."""
    cpu, began = _cpu_seconds(), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "clips_per_s": clips / seconds,
        "mb_per_s": 2 * sampled / 1e6 / seconds,
        "cpu_share": (used := _cpu_seconds() - cpu) / seconds / len(os.sched_getaffinity(0)),
        "cpu_ms_per_clip": 1000 * used / clips,
        "peak_mb": (own + children) / 1024,
    }


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _sampled(crops: list[Crops]) -> int:
    return int(sum(each.counts.sum() for each in crops))


def _limit(task: Task) -> dict[str, float]:
    """libsndfile alone: the clips lie in memory, the samples are thrown away."""
    clips = task.clips()
    crops = task.crops(clips)
    data = {row: _bytes(clips, row) for row in sorted({int(row) for each in crops for row in each.rows})}
    jobs = [
        (data[row], start, count)
        for each in crops
        for row, start, count in zip(each.rows.tolist(), each.starts.tolist(), each.counts.tolist(), strict=True)
    ]

    def decode(part: int) -> None:
        buffer = clip_buffer()
        for clip, start, count in jobs[part :: task.threads]:
            buffer.room(len(clip))[:] = clip
            buffer.crop(start, count)

    with ThreadPoolExecutor(task.threads) as pool:

        def work() -> None:
            list(pool.map(decode, range(task.threads)))

        return _measured(work, len(jobs), _sampled(crops))


def _ours(task: Task) -> dict[str, float]:
    clips = task.clips()
    crops = task.crops(clips)
    cache = ClipCache(Path(task.cache), 1 << 40) if task.cache else None

    def work() -> None:
        for _ in load(clips, crops, threads=task.threads, cache=cache):
            pass

    return _measured(work, task.batches * _BATCH, _sampled(crops))


def _beside_step(task: Task, same_process: bool) -> dict[str, float]:
    """The loader beside a thread that launches operations without end, as a training step does for a GPU."""
    clips = task.clips()
    crops = task.crops(clips)
    done = threading.Event()

    def consume() -> None:
        for _ in load(clips, crops, threads=task.threads):
            pass
        done.set()

    def work() -> None:
        consumer = threading.Thread(target=consume)
        consumer.start()
        if same_process:
            _launch_operations(done)
        consumer.join()

    if same_process:
        return _measured(work, task.batches * _BATCH, _sampled(crops))
    other = multiprocessing.get_context("spawn")
    ended = other.Event()
    process = other.Process(target=_launch_operations, args=(ended,))
    process.start()
    result = _measured(work, task.batches * _BATCH, _sampled(crops))
    ended.set()
    process.join()
    return result


class _Flag(Protocol):
    """An event, of threads or of processes."""

    def is_set(self) -> bool: ...


def _launch_operations(until: _Flag) -> None:
    """Small operations, one after the other, in one thread: it holds Python's lock nearly all the time."""
    torch.set_num_threads(1)
    x = torch.ones(64, 64)
    while not until.is_set():
        for _ in range(1000):
            x = torch.relu(x + 1)


def _bare_client(task: Task, client: str) -> dict[str, float]:
    """Ranged reads of the same clips, as many at once as the loader's, nothing decoded."""
    from erann_dist.s3_ranges import S3Object

    clips = task.clips()
    crops = task.crops(clips)
    objects = [S3Object(tar.folder, tar.name) for tar in clips.tars if not isinstance(tar.folder, LocalFolder)]
    rows = np.concatenate([each.rows for each in crops])

    def read(row: int) -> None:
        tar = objects[clips.shards[row]]
        (tar.read if client == "arrow" else tar.read_carefully)(int(clips.offsets[row]), int(clips.sizes[row]))

    def work() -> None:
        with ThreadPoolExecutor(S3_REQUESTS) as pool:
            list(pool.map(read, rows.tolist()))

    return _measured(work, len(rows), _sampled(crops))


def _webloader(task: Task, workers: int) -> dict[str, float]:
    """webdataset's own: whole tars one after the other, shuffled, random crops of the same length."""
    import webdataset

    clips = task.clips()
    tars = [str(tar) for tar in clips.tars]

    def crop(sample: dict[str, Any]) -> npt.NDArray[np.int16]:
        return _cropped(sample["flac"], task.crop_samples)

    def work() -> None:
        dataset = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(100).map(crop)
        batched = dataset.repeat().batched(_BATCH, collation_fn=np.stack)
        loader = webdataset.WebLoader(batched, batch_size=None, num_workers=workers, multiprocessing_context="fork")
        for number, _ in enumerate(loader, 1):
            if number == task.batches:
                break

    return _measured(work, task.batches * _BATCH, task.batches * _BATCH * task.crop_samples)


class _Clips(torch.utils.data.Dataset[npt.NDArray[np.int16]]):
    """The same crops by number, for a map-style DataLoader."""

    def __init__(self, task: Task) -> None:
        self._manifest = task.clips()
        self._rows = np.concatenate([each.rows for each in task.crops(self._manifest)])
        self._samples = task.crop_samples

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> npt.NDArray[np.int16]:
        return _cropped(_bytes(self._manifest, int(self._rows[index])), self._samples)


def _dataloader(task: Task, workers: int) -> dict[str, float]:
    dataset = _Clips(task)

    def work() -> None:
        for _ in torch.utils.data.DataLoader(
            dataset, batch_size=_BATCH, num_workers=workers, multiprocessing_context="fork"
        ):
            pass

    return _measured(work, len(dataset), len(dataset) * task.crop_samples)


def _cropped(data: bytes, samples: int) -> npt.NDArray[np.int16]:
    """A random crop as everybody decodes it: by soundfile, from a buffer; shorter clips are padded."""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        file.seek(int(np.random.default_rng().integers(max(1, file.frames - samples + 1))))
        return file.read(samples, dtype="int16", fill_value=0)


def _bytes(clips: Manifest, row: int) -> bytes:
    with open(str(clips.tars[clips.shards[row]]), "rb") as file:
        return os.pread(file.fileno(), int(clips.sizes[row]), int(clips.offsets[row]))


def _draw_seconds(task: Task) -> float:
    """Seconds to draw one clip, in blocks as training draws."""
    clips = task.clips()
    sampler = BalancedSampler(class_lists(clips.label_values, clips.label_offsets, clips.num_classes), 0)
    began = time.perf_counter()
    for block in range(100):
        sampler.draw(np.arange(block * _BLOCK, (block + 1) * _BLOCK))
    return (time.perf_counter() - began) / (100 * _BLOCK)


@contextmanager
def _s3(shards: str, scratch: Path) -> Iterator[tuple[str, str] | None]:
    """A copy of the shard set on an S3 server on loopback (moto's): URL and endpoint. None where moto is not there."""
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
        from botocore.config import Config  # type: ignore[import-untyped]

        retries = Config(retries={"total_max_attempts": 20, "mode": "standard"})
        boto3.client("s3", endpoint_url=endpoint, config=retries).create_bucket(Bucket="bench")
        folder, source = open_folder("s3://bench/set", endpoint), LocalFolder(shards)
        for name in source.sizes():
            folder.write(name, source.read(name))
        yield "s3://bench/set", endpoint
    finally:
        server.terminate()
        server.wait()
