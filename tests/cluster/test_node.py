"""What the processes of a node share, its clip cache and the clips in memory: right, whoever comes or is killed."""

import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from erann_dist.data.cache import ClipCache
from erann_dist.data.shared_clips import shared_clips
from erann_dist.errors import UserError
from erann_dist.log.events import Event, Incident, Step
from erann_dist.log.run_log import read_log
from erann_dist.recipe import DataSource, Recipe
from erann_dist.storage.folder import LocalFolder
from erann_dist.train.checkpoint import committed
from erann_dist.train.distributed import Workers, single_worker
from erann_dist.train.trainer import train
from tests.conftest import small_recipe
from tests.erann_dist.data.test_cache import MB, clip, hits
from tests.support.workers import CPU, run_workers, train_alone, train_events

CLIPS = 400
WRITER = """
import random, sys
from pathlib import Path
from tests.erann_dist.data.test_cache import ClipCache, clip, MB
cache = ClipCache(Path(sys.argv[1]), 64 * MB)
print("ready", flush=True)
while True:
    cache.put(*clip(random.randrange(400)))
"""


def records(slab: Path) -> Iterator[tuple[int, bytes]]:
    """Row and bytes of each record of a slab, one behind the other to its end."""
    header, content, place = struct.Struct("<4s4xQQII"), slab.read_bytes(), 0
    while place < len(content):
        magic, _, row, size, crc32 = header.unpack_from(content, place)
        data = content[place + header.size : place + header.size + size]
        assert magic == b"ERC1"
        assert zlib.crc32(data) == crc32
        yield row, data
        place += -(-(header.size + size) // 16) * 16


def fill_at_random(folder: str, seed: int) -> None:
    cache = ClipCache(Path(folder), 64 * MB)
    for row in np.random.default_rng(seed).permutation(CLIPS):
        id_, data = clip(int(row))
        kept = memoryview(bytearray(id_.size))
        assert not cache.get(id_, kept) or kept == data
        cache.put(id_, data)


def run_processes(function: object, *arguments: tuple[object, ...]) -> None:
    """The function in a process for each tuple of arguments, all at once."""
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=function, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def test_processes_that_fill_one_cache_write_whole_records_and_no_two_to_one_slab(tmp_path: Path) -> None:
    run_processes(fill_at_random, *((str(tmp_path), seed) for seed in range(3)))
    for slab in tmp_path.glob("slab-*"):
        assert all(data == clip(row)[1] for row, data in records(slab))
    assert hits(ClipCache(tmp_path, 64 * MB), range(CLIPS)) == CLIPS


def test_killed_writers_leave_nothing_wrong(tmp_path: Path) -> None:
    """Three processes at a time write at random, and are killed at random; a fourth reads meanwhile."""
    reader = ClipCache(tmp_path, 64 * MB)
    for moment in np.linspace(0.01, 0.2, 4):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
        for writer in writers:
            assert writer.stdout
            assert writer.stdout.readline() == b"ready\n"
        time.sleep(moment)
        hits(reader, range(0, CLIPS, 7))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        assert hits(reader, range(CLIPS)) > 0
    assert sum(path.stat().st_size for path in tmp_path.glob("slab-*")) <= 64 * MB


def weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.run_url) / "model" / "model.safetensors")


def assert_same_weights(one: Recipe, other: Recipe) -> None:
    for name, value in weights(one).items():
        assert torch.equal(weights(other)[name], value), name


def train_apart(workers: Workers, trees: list[dict[str, object]]) -> list[Event]:
    """Each worker trains by a recipe of its own, alone."""
    return train_events(Workers(0, 1, CPU), trees[workers.rank])


def test_two_runs_at_once_share_a_cache(tone_shards: Path, tmp_path: Path) -> None:
    cache = {"cache": {"dir": str(tmp_path / "cache"), "max_bytes": 64 * MB}}
    runs = [small_recipe(tone_shards, tmp_path / name, data=cache) for name in ("a", "b")]
    run_workers(train_apart, 2, [recipe.model_dump() for recipe in runs])
    without = small_recipe(tone_shards, tmp_path / "without")
    train_alone(without)
    for recipe in runs:
        assert_same_weights(without, recipe)
    kept = [row for slab in (tmp_path / "cache").glob("slab-*") for row, _ in records(slab)]
    assert len(set(kept)) > 30


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_run_goes_on_when_the_caches_disk_is_full(tone_shards: Path, tmp_path: Path) -> None:
    without = small_recipe(tone_shards, tmp_path / "without")
    train_alone(without)
    with small_disk(tmp_path / "disk", MB) as disk:
        cache = {"dir": str(disk / "cache"), "max_bytes": 64 * MB}
        recipe = small_recipe(tone_shards, tmp_path / "run", data={"cache": cache})
        events = train_alone(recipe)
    assert_same_weights(without, recipe)
    (incident,) = [event for event in events if isinstance(event, Incident)]
    assert incident.text == f"{disk}/cache: no more clips are cached (No space left on device)"
    first, *_ = [event for event in events if isinstance(event, Step)]
    assert first.cache_hits is not None
    assert 0 < first.cache_hits < 1


def test_a_run_folder_whose_disk_is_full(tone_shards: Path, tmp_path: Path) -> None:
    """There is room for one checkpoint, but not for the next one beside it: told, tried again, and then the end."""
    with small_disk(tmp_path / "disk", 30 * MB) as disk:
        recipe = small_recipe(tone_shards, disk / "run", checkpoint={"every": 1, "keep_last": 1, "max_failed": 2})
        events: list[Event] = []
        with pytest.raises(UserError) as error, single_worker(CPU) as workers:
            train(recipe, workers, events.append)
        assert str(error.value) == (
            f"{disk}/run: the checkpoint of step 4 could not be written (No space left on device); "
            "3 in a row, checkpoint.max_failed is 2"
        )
        incidents = [event for event in events if isinstance(event, Incident)]
        assert [(each.step, each.kind) for each in incidents] == [(2, "checkpoint"), (3, "checkpoint")]
        assert [int(name.split("-")[1]) for name in committed(LocalFolder(str(disk / "run")))] == [1]
        lines = read_log(LocalFolder(str(disk / "run")))
        assert [line["step"] for line in lines if line["event"] == "Step"] == [1, 2, 3, 4]


def test_a_run_folder_whose_disk_is_full_to_the_last_byte(tone_shards: Path, tmp_path: Path) -> None:
    """The log's lines come when there is room again, and the run goes on all the while."""
    with small_disk(tmp_path / "disk", 200 * MB) as disk:
        recipe = small_recipe(tone_shards, disk / "run", checkpoint={"every": 2})
        filler = disk / "filler"

        def fill(event: Event) -> None:
            if isinstance(event, Step) and event.step == 1:
                with filler.open("wb", buffering=0) as file, suppress(OSError):
                    while True:
                        file.write(bytes(4096))
            elif isinstance(event, Incident):
                filler.unlink()

        with single_worker(CPU) as workers:
            train(recipe, workers, fill)
        lines = read_log(LocalFolder(str(disk / "run")))
        assert [line["step"] for line in lines if line["event"] == "Step"] == [1, 2, 3, 4]
        assert [line["kind"] for line in lines if line["event"] == "Incident"] == ["checkpoint"]
        assert lines[-1]["event"] == "Finished"


def come_and_go(folder: str, shards: str) -> None:
    tempfile.tempdir = folder
    for _ in range(100):
        with shared_clips([DataSource(url=shards)]) as clips:
            assert len(clips) == 40
            assert clips.samples.min() > 0


def test_clips_are_there_for_everyone_while_others_come_and_go(tone_shards: Path, tmp_path: Path) -> None:
    run_processes(come_and_go, *[(str(tmp_path), str(tone_shards))] * 3)
    assert list(tmp_path.iterdir()) == []


def be_killed(folder: str, shards: str) -> None:
    tempfile.tempdir = folder
    with shared_clips([DataSource(url=shards)]):
        os.kill(os.getpid(), signal.SIGKILL)


def test_clips_that_a_killed_worker_left_are_used_and_removed(
    tone_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    process = multiprocessing.get_context("forkserver").Process(
        target=be_killed, args=(str(tmp_path), str(tone_shards))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.glob("*.arrow")
    inode = left.stat().st_ino
    with shared_clips([DataSource(url=str(tone_shards))]) as clips:
        assert left.stat().st_ino == inode
        assert len(clips) == 40
    assert list(tmp_path.glob("erann-*")) == []
