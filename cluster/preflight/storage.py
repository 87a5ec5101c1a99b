"""Tests what a node can read and write: the shard sets, the run's folder, the cache's disk."""

import functools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from erann_dist.data import loader
from erann_dist.data.clip_reader import ReadStats
from erann_dist.data.loader import Crops, random_crops
from erann_dist.data.manifest import Manifest
from erann_dist.data.sources import load_train_and_eval
from erann_dist.errors import UserError
from erann_dist.recipe import DataSection
from erann_dist.storage.folder import LocalFolder, open_folder

_BATCH = 16
_ATTEMPTS = 3  # Attempts per S3 request: fewer than in a run, to report a verdict soon.


@dataclass(frozen=True)
class Reading:
    """Random clips that one process has read, checked and decoded, as a worker of the run does."""

    clips: int
    bytes: int  # size of the clips in the tars
    seconds: float
    threads: int  # decoding threads
    computing: float  # CPU seconds
    tars: int  # number of tars that the clips came from
    slow: str | None = None  # why most clips were read from S3 by the slow fallback, if they were

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.seconds

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds


@dataclass(frozen=True)
class Disk:
    """The disk of a folder for the clip cache."""

    free: int  # bytes
    kept: int  # bytes that the cache already uses there


def open_sets(data: str) -> tuple[Manifest, Manifest]:
    """The training and evaluation clips of a recipe's data section, in JSON, as this node sees them.

    Raises as load_train_and_eval.
    """
    section = DataSection.model_validate_json(data)
    for source in (*section.train, *section.eval):
        _limit_s3_attempts(source.url)
    return _opened(data)


@functools.cache
def _opened(data: str) -> tuple[Manifest, Manifest]:
    return load_train_and_eval(DataSection.model_validate_json(data))


def count_clips(data: str) -> tuple[int, int]:
    """The numbers of clips of open_sets, which also loads them for read_clips."""
    train, evaluation = open_sets(data)
    return len(train), len(evaluation)


def read_clips(data: str, seconds: float, seed: int) -> Reading:
    """Read random training clips for `seconds`, beginning with one of each tar, and then a few evaluation clips.

    Raises UserError, naming tar and clip, for data that does not match the manifest.
    """
    section = DataSection.model_validate_json(data)
    (clips, eval_clips), rng = open_sets(data), np.random.default_rng(seed)
    read, tars, threads = ReadStats(), set[int](), section.loader_threads
    computing, began = time.process_time(), time.perf_counter()
    with closing(loader.Loader(clips, _crops(clips, section, rng), threads=threads, stats=read)) as batches:
        for batch in batches:
            tars.update(clips.shards[batch.crops.rows].tolist())
            passed = time.perf_counter() - began
            if passed >= seconds:
                break
        computing = time.process_time() - computing
        clips_read, bytes_read, slow = read.counts["clips_origin"], read.counts["bytes_origin"], read.slow.problem
        done = Reading(clips_read, bytes_read, passed, threads, computing, len(tars), slow)
    with closing(loader.Loader(eval_clips, _crops(eval_clips, section, rng), threads=threads)) as batches:
        next(batches)
    return done


def _crops(clips: Manifest, section: DataSection, rng: np.random.Generator) -> Iterator[Crops]:
    """An endless sequence of random crops; the first ones cover all tars that have clips."""
    _, firsts = np.unique(clips.shards, return_index=True)
    rows = rng.permutation(firsts)
    while True:
        missing = max(0, _BATCH - len(rows))
        rows = np.concatenate([rows, rng.integers(len(clips), size=missing)])
        yield random_crops(clips, rows[:_BATCH], rows[:_BATCH], 0, section.crop_samples)
        rows = rows[_BATCH:]


def write_token(url: str, name: str) -> str | None:
    """Write a file with its name as content. Returns the topmost folder that was created for it.

    Raises UserError if it can't be written.
    """
    _limit_s3_attempts(url)
    folder, made = open_folder(url), first_missing(url)
    try:
        folder.write(name, name.encode())
    except OSError as error:
        raise UserError(f"{folder}: can't be written to ({error.strerror})") from error
    return made


def tokens_seen(url: str, names: list[str]) -> set[str]:
    """Those of the files that this node sees."""
    folder, seen = open_folder(url), set()
    for name in names:
        with suppress(OSError):
            if folder.read(name) == name.encode():
                seen.add(name)
    return seen


def remove_token(url: str, name: str, made: str | None) -> None:
    """Undo write_token, except for folders that others still need."""
    open_folder(url).delete(name)
    remove_folders(url, made)


def remove_folders(url: str, made: str | None) -> None:
    """Remove a local folder and its parents up to `made`, as long as they are empty."""
    if made is None:
        return
    with suppress(OSError):  # One of them is not empty.
        for path in [Path(url).absolute(), *Path(url).absolute().parents]:
            with suppress(FileNotFoundError):
                path.rmdir()
            if str(path) == made:
                return


def first_missing(url: str) -> str | None:
    """The topmost folder that must be created for this one; None in S3."""
    if not isinstance(open_folder(url), LocalFolder):
        return None
    path = Path(url).absolute()
    return next((str(each) for each in [*reversed(path.parents), path] if not each.exists()), None)


def cache_disk(folder: str) -> Disk:
    """The disk of the clip cache. Raises UserError if nothing can be written there."""
    path = Path(folder).absolute()
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: can't hold the cache: {there} is not a writable folder")
    kept = sum(512 * slab.stat().st_blocks for slab in path.glob("slab-*"))
    return Disk(shutil.disk_usage(there).free, kept)


def _limit_s3_attempts(url: str) -> None:
    """Limit the attempts per S3 request in this process."""
    if url.startswith("s3://"):
        from erann_dist.storage import s3

        s3.ATTEMPTS = s3.PATIENT_ATTEMPTS = _ATTEMPTS
