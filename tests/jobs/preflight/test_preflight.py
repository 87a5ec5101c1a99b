"""What preflight makes of what it has found, and how it looks at disks and shards, without a cluster."""

import re
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.preflight import collectives, facts, storage
from cluster.preflight.facts import Facts, Gpu, Offset
from cluster.preflight.probes import Node
from cluster.preflight.storage import Disk, Reading
from erann_dist.data.manifest import load_manifest
from erann_dist.errors import UserError
from erann_dist.log.events import Step
from erann_dist.recipe import CacheSection, Recipe
from jobs.preflight.preflight import _late_hits
from jobs.preflight.verdicts import (
    Demand,
    Problem,
    Verdict,
    advice,
    bus_bandwidth,
    by_node,
    cache_verdict,
    clocks_verdict,
    estimate_verdict,
    nodes_verdict,
    shards_verdict,
    step_verdict,
    supply_verdict,
    versions_verdict,
)
from jobs.training.probe_run import ProbeResult, are_enough, counted
from tests.conftest import copy_tree, small_recipe

A, B, C = (Node(f"id-{n}", f"10.0.0.{n}", f"gpu-{n}", {"CPU": 8.0, "GPU": 4.0}) for n in (1, 2, 3))
HERE = Facts("3.11.7", {"torch": "2.11.0", "torchaudio": "2.11.0", "ray": "2.60.0"}, "13.0", "/app", {"a.py": "0"}, 8)
GPU = Gpu("H200", free=140 * 10**9, total=141 * 10**9, has_bf16=True)
TRIAL = ProbeResult(
    step_s=0.5, steps=10, data_wait=0.01, workers=2, device="cuda:0", hosts=["a", "b"], checkpoint_s=2, stall_s=0.1
)


def a_recipe(**sections: dict[str, object]) -> Recipe:
    run: dict[str, object] = {"launcher": "ray", "workers": 2} | sections.pop("run", {})
    return small_recipe(Path("shards"), Path("runs/run"), run=run, **sections)


def texts(verdict: Verdict) -> list[str]:
    return [problem.text for problem in verdict.problems]


def test_the_same_trouble_on_many_nodes_is_told_once() -> None:
    nodes = [Node(str(n), f"10.0.0.{n}", f"h{n}") for n in range(7)]
    problems = by_node(dict.fromkeys(nodes, "no route") | {C: "denied"}, "mend it")
    first = ", ".join(f"10.0.0.{n} (h{n})" for n in range(5))
    assert problems == [
        Problem(f"{first} and 2 more: no route", "mend it"),
        Problem("10.0.0.3 (gpu-3): denied", "mend it"),
    ]


@pytest.mark.parametrize(
    ("seconds", "within", "state"),
    [(0.9, 0, "ok"), (-1.1, 0, "warning"), (1.1, 0.2, "ok"), (-59, 0, "warning"), (61, 0, "failed")],
)
def test_clocks(seconds: float, within: float, state: str) -> None:
    verdict = clocks_verdict({A: Offset(0.0, 0.001), B: Offset(seconds, within)}, [])
    assert verdict.state == state
    if state != "ok":
        (text,) = texts(verdict)
        assert text.startswith("10.0.0.2 (gpu-2): its clock is ")
        assert text.endswith("ahead" if seconds > 0 else "behind")


@pytest.mark.parametrize(
    ("change", "state", "text"),
    [
        ({}, "ok", ""),
        ({"python": "3.11.9"}, "ok", ""),
        ({"python": "3.12.1"}, "failed", "Python 3.12.1, here 3.11.7"),
        ({"versions": HERE.versions | {"ray": "2.59.0"}}, "failed", "ray 2.59.0, here 2.60.0"),
        ({"versions": HERE.versions | {"torchaudio": "2.11.1"}}, "warning", "torchaudio 2.11.1, here 2.11.0"),
        ({"cuda": None}, "warning", "torch for CUDA none, here 13.0"),
        ({"versions": HERE.versions | {"torch": "2.11.0+cpu"}}, "warning", "torch 2.11.0\\+cpu, here 2.11.0"),
        ({"versions": HERE.versions | {"torch": "2.10.0+cpu"}}, "failed", "torch 2.10.0\\+cpu, here 2.11.0"),
        ({"files": {"a.py": "1"}, "folder": "/old"}, "failed", "/old, here .* in /app; a.py differs"),
        ({"files": {"a.py": "0", "b.py": "1", "c.py": "1"}}, "failed", "b.py and 1 more differ"),
    ],
)
def test_versions(change: dict[str, Any], state: str, text: str) -> None:
    verdict = versions_verdict(HERE, {A: HERE, B: replace(HERE, **change)}, {})
    assert verdict.state == state
    if text:
        (found,) = texts(verdict)
        assert found.startswith("10.0.0.2 (gpu-2): ")
        assert re.search(text, found)


def test_memory_of_a_gpu_that_another_process_holds() -> None:
    """On a node of four GPUs with more threads than it has cores."""
    recipe = a_recipe(run={"workers": 4}, data={"loader_threads": 3})
    gpus = dict.fromkeys(range(4), GPU) | {2: replace(GPU, free=60 * 10**9)}
    verdict = nodes_verdict(recipe, {"CPU": 1.0, "GPU": 1.0}, [A, B], [A] * 4, None, {A: HERE, B: HERE}, gpus, [])
    assert verdict.state == "warning"
    assert verdict.found.endswith(": H200, 60.0 to 140.0 GB free")
    assert verdict.figures["gpus"][2] == {"node": str(A), "name": "H200", "free": 60 * 10**9, "total": 141 * 10**9}
    assert texts(verdict) == [
        "10.0.0.1 (gpu-1): 81.0 GB of the 141.0 GB of its H200 are already in use",
        "10.0.0.1 (gpu-1): 4 workers with data.loader_threads=3 for 8 cores",
    ]


def test_fewer_workers_than_a_run_can_have() -> None:
    recipe = a_recipe(run={"workers": {"min": 1, "max": 4}})
    verdict = nodes_verdict(recipe, {"CPU": 1.0}, [A, B], [A, B], None, {A: HERE, B: HERE}, {}, [])
    assert (verdict.state, texts(verdict)) == ("warning", ["there is capacity for 2 of up to 4 workers"])


def test_what_a_cache_keeps_already_counts_as_room() -> None:
    cache = CacheSection.model_validate({"dir": "/nvme", "max_bytes": "100GB"})
    verdict = cache_verdict(cache, {A: Disk(10 * 10**9, 95 * 10**9), B: Disk(10 * 10**9, 85 * 10**9)}, {})
    assert verdict.state == "failed"
    assert texts(verdict) == ["10.0.0.2 (gpu-2): 95.0 GB free for data.cache in /nvme, 100.0 GB requested"]


def test_bus_bandwidth() -> None:
    """Two workers that exchange 100 MB in a second each send and receive 100 MB; many, almost twice as much."""
    assert bus_bandwidth(2, 10**8, 1.0) == pytest.approx(1e8)
    assert bus_bandwidth(100, 10**8, 1.0) == pytest.approx(1.98e8)


def reading(clips_per_s: float, computing: float = 0.2) -> Reading:
    """Of three seconds with two threads, which compute for a share of the time."""
    return Reading(round(3 * clips_per_s), round(3 * clips_per_s) * 10**5, 3.0, 2, 6.0 * computing, 5)


@pytest.mark.parametrize(
    ("need", "computing", "hits", "state", "mend"),
    [
        (100, 0.2, None, "ok", ""),
        (101, 0.2, None, "warning", "data.cache={dir: a disk of the node, max_bytes: 50.0 GB or less}"),
        (200, 0.2, 0.6, "ok", ""),  # once the cache has filled
        (200, 0.2, 0.4, "warning", "raise data.cache.max_bytes"),
        (150, 0.9, None, "warning", "data.loader_threads=3, for which the node has enough cores"),
        (150, 0.9, 0.6, "warning", "data.loader_threads=3"),  # FLAC of the cache is decoded too
    ],
)
def test_supply(need: float, computing: float, hits: float | None, state: str, mend: str) -> None:
    """Of two nodes with two workers each, that read 100 clips/s on the slower one."""
    cache = {"dir": "/nvme", "max_bytes": 10**9} if hits is not None else None
    recipe = a_recipe(data={"cache": cache})
    demand = Demand(need, 1e5, 50 * 10**9, True, hits)
    readings = {A: [reading(200)] * 2, B: [reading(100, computing)] * 2}
    verdict = supply_verdict(recipe, demand, readings, {A: 8, B: 8})
    assert verdict.state == state
    assert verdict.figures["needed_clips_per_s"] == 2 * need
    assert verdict.figures["read_clips_per_s"] == 200
    if mend:
        (problem,) = verdict.problems
        assert problem.text.startswith("10.0.0.2 (gpu-2): ")
        assert mend in problem.mend


def test_shards_that_are_read_the_slow_way_are_a_warning() -> None:
    slow = replace(reading(20), slow="clips from S3 are read by s3fs, several times slower: no route to host")
    verdict = shards_verdict(1000, 100, 5, {A: [reading(100)] * 2, B: [slow] * 2})
    assert verdict.state == "warning"
    assert texts(verdict) == [f"10.0.0.2 (gpu-2): {slow.slow}"]


def test_a_node_without_cores_to_spare_is_not_to_decode_more() -> None:
    demand = Demand(200, 1e5, 10**9, False, None)
    verdict = supply_verdict(a_recipe(), demand, {A: [reading(100, 0.9)] * 4}, {A: 8})
    assert "pcm" in verdict.problems[0].mend


def test_the_estimate_is_of_the_steps_that_are_left() -> None:
    verdict = estimate_verdict(TRIAL, steps=72_000, done=0)
    assert verdict.figures == {"steps": 72_000, "seconds": 36_000.0, "gpu_hours": 20.0}
    assert verdict.found.startswith("72,000 steps of 0.50 s: 10:00:00, 20 GPU-hours")
    verdict = estimate_verdict(replace(TRIAL, device="cpu"), steps=72_000, done=36_000)
    assert verdict.found.startswith("36,000 remaining steps of 0.50 s: 5:00:00, 10 worker-hours")


def test_a_step_that_waits_for_data() -> None:
    trial = replace(TRIAL, data_wait=0.3, peak_gpu_bytes=[10**9, 2 * 10**9], incidents=["the cache is full"])
    verdict = step_verdict(a_recipe(), trial, 0.05, [GPU])
    assert verdict.state == "warning"
    assert texts(verdict) == ["the cache is full", "the first worker waits for data during 30% of a step"]
    assert "32.0 examples/s; waiting for data 30.0%, all-reduce 10.0%; at most 2.0 GB of 141.0 GB" in verdict.found


@pytest.mark.parametrize(
    ("sections", "trial", "all_reduce_s", "room", "lines"),
    [
        ({"optim": {"precision": "bf16"}}, {}, 0.01, 2, []),
        ({}, {}, 0.01, 2, ["optim.precision=bf16 is faster on these GPUs"]),
        ({"optim": {"precision": "bf16"}}, {}, 0.1, 2, ["the all-reduce takes 20% of a step"]),
        (
            {"optim": {"precision": "bf16"}},
            {},
            0.01,
            4,
            ["run.workers=4 uses the cluster's full capacity: about 0.26 s"],
        ),
        ({"optim": {"precision": "bf16"}}, {}, 0.48, 4, ["the all-reduce takes 96% of a step"]),
        (
            {"optim": {"precision": "bf16"}},
            {"workers": 4},
            0.01,
            9,
            ["there is capacity for 9 workers, but a step of 16 examples has only 4 micro-batches of 4"],
        ),
        ({"optim": {"precision": "bf16"}}, {"workers": 3}, 0.01, 3, ["2 of the 3 workers idle for part of each step"]),
        ({"optim": {"precision": "bf16"}, "checkpoint": {"every": 3}}, {}, 0.01, 2, ["checkpoint.every=10 or more"]),
    ],
)
def test_advice(
    sections: dict[str, dict[str, object]],
    trial: dict[str, Any],
    all_reduce_s: float,
    room: int,
    lines: list[str],
) -> None:
    """Four micro-batches a step, on two workers unless it is said."""
    found = advice(a_recipe(**sections), replace(TRIAL, **trial), all_reduce_s, room, [GPU])
    assert len(found) == len(lines)
    assert all(line.startswith(begin) for line, begin in zip(found, lines, strict=True)), found


def steps_of(seconds: list[float]) -> list[Step]:
    return [Step(n, 0.1, 0.1, 1, 1, 0, 1, s, 1, 1, None, 0) for n, s in enumerate(seconds, 1)]


@given(st.lists(st.floats(0.001, 200), max_size=120))
def test_a_trial_ends_once_it_has_counted_enough(seconds: list[float]) -> None:
    steps = steps_of(seconds)
    behind = counted(steps)
    assert steps[len(steps) - len(behind) :] == behind
    if are_enough(steps):
        assert behind
        assert len(steps) > len(behind)  # the first is never counted
    if len(steps) >= 102 or (len(steps) > 4 and sum(step.seconds for step in behind) >= 5):
        assert are_enough(steps)


def test_a_trial_of_slow_steps_is_short() -> None:
    assert not are_enough(steps_of([60]))
    assert are_enough(steps_of([60, 50]))
    assert not are_enough(steps_of([1, 1, 1, 1]))


def a_data_section(shards: Path) -> str:
    return small_recipe(shards, Path("runs/run")).data.model_dump_json()


def test_reading_a_set(tone_shards: Path) -> None:
    """All tars come first, each clip is counted once, and as many bytes as it has."""
    clips = load_manifest(tone_shards)
    done = storage.read_clips(a_data_section(tone_shards), 0.2, seed=1)
    assert done.tars == len(clips.tars) == 5
    assert done.clips >= 16
    assert clips.sizes.min() <= done.bytes / done.clips <= clips.sizes.max()
    assert done.seconds >= 0.2
    assert done.computing > 0


@pytest.mark.parametrize("spoil", [lambda tar: tar.unlink(), lambda tar: tar.write_bytes(tar.read_bytes()[:-1])])
def test_a_tar_that_is_not_as_it_should_be_is_found(
    tone_shards: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    tar = sorted(shards.glob("*.tar"))[3]
    spoil(tar)
    with pytest.raises(UserError, match=tar.name):
        storage.read_clips(a_data_section(shards), 0.0, seed=1)


def test_a_damaged_clip_is_found(tone_shards: Path, tmp_path: Path) -> None:
    shards = copy_tree(tone_shards, tmp_path / "shards")
    clips = load_manifest(shards)
    with (shards / clips.tars[clips.shards[7]].name).open("r+b") as file:
        file.seek(int(clips.offsets[7]) + 100)
        file.write(bytes(64))
    with pytest.raises(UserError, match=f"clip {clips.keys[7]} is damaged"):
        storage.read_clips(a_data_section(shards), 20.0, seed=1)


def test_a_token_leaves_nothing_behind(tmp_path: Path) -> None:
    url = str(tmp_path / "a" / "b" / "c")
    made = storage.write_token(url, "mine")
    assert made == str(tmp_path / "a")
    assert storage.write_token(url, "other") is None
    assert storage.tokens_seen(url, ["mine", "other", "none"]) == {"mine", "other"}
    storage.remove_token(url, "mine", made)
    assert storage.tokens_seen(url, ["mine", "other"]) == {"other"}
    storage.remove_token(url, "other", made)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    made = storage.write_token(str(tmp_path / "runs" / "x"), "mine")
    storage.remove_token(str(tmp_path / "runs" / "x"), "mine", made)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_file_in_the_way_of_a_run_folder_or_a_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/runs: can't be written to \(Not a directory\)"):
        storage.write_token(str(tmp_path / "file" / "runs"), "mine")
    with pytest.raises(UserError, match="can't hold the cache"):
        storage.cache_disk(str(tmp_path / "file"))


def test_the_disk_of_a_cache(tmp_path: Path) -> None:
    """That is to be made, and one that is there; neither is touched."""
    assert storage.cache_disk(str(tmp_path / "a" / "b")).kept == 0
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "slab-00000").write_bytes(np.random.default_rng(0).bytes(1 << 16))
    disk = storage.cache_disk(str(tmp_path))
    assert disk.kept >= 1 << 16
    assert disk.free > 0


def test_hosts_that_can_not_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = server.getsockname()[1]
        closed = collectives.free_port()
        others = {"a": ("127.0.0.1", there), "b": ("127.0.0.1", closed), "c": ("127.0.0.1", collectives.listen())}
        assert collectives.unreachable(others) == ["b"]


def test_facts_are_of_this_program() -> None:
    found = facts.facts()
    assert found.folder == str(Path(__file__).parents[3])
    assert {
        "jobs/preflight/preflight.py",
        "cluster/preflight/facts.py",
        "erann_dist/data/sources.py",
        "shards/build.py",
    } <= set(found.files)
    assert replace(found, files=found.files | {"jobs/preflight/preflight.py": "0"}).source != found.source
    assert found.cores >= 1


@pytest.mark.parametrize(("room", "least", "most"), [(10**9, 0.99, 1.0), (1, 0.0, 0.0), (10**6, 0.05, 0.95)])
def test_what_the_cache_will_serve(tone_shards: Path, room: int, least: float, most: float) -> None:
    recipe = small_recipe(
        tone_shards, Path("runs/run"), data={"cache": {"dir": "c", "max_bytes": room}}, optim={"examples": 3200}
    )
    assert least <= _late_hits(recipe, load_manifest(tone_shards), [[0], [1]]) <= most
