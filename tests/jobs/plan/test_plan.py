"""What a plan says of a run: the very clips that training will read, counted one by one, and what follows from them."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from erann_dist.data.manifest import Manifest, load_manifest
from erann_dist.errors import UserError
from erann_dist.recipe import Recipe
from erann_dist.train.augment import clip_positions
from erann_dist.train.work_plan import assign_micro_batches, make_sampler
from jobs.plan.page import plan_page
from jobs.plan.plan import Cluster, Reads, Setting, plan, reckon
from jobs.plan.simulation import NodeReads, Simulation
from shards.listed import write_listed_set
from shards.sources.rows import Source, SourceRow, rows_table
from tests.conftest import pack_here, small_recipe

CLUSTER = Cluster(
    nodes=2,
    gpus_per_node=2,
    cores_per_node=16,
    network_gbit_s=10,
    disk_mb_s=1000,
    gpu_examples_per_s=100,
    core_clips_per_s=100,
    usd_per_million_requests=0.4,
)


def a_recipe(shards: Path, url: str = "", **changes: object) -> Recipe:
    """A run of 96 examples on these shards, or on some in S3."""
    recipe = small_recipe(shards, shards).model_dump(mode="json")
    recipe["optim"] |= {"global_batch": 8, "micro_batch": 2, "examples": 96}
    recipe["run"]["workers"] = 1
    recipe["data"]["train"][0] = {"url": url or str(shards)}
    for path, value in changes.items():
        section, key = path.split("__")
        recipe[section][key] = value
    return Recipe.model_validate(recipe)


def one_by_one(recipe: Recipe, clips: Manifest, nodes: list[list[int]], steps: int, room: int) -> list[Counter[str]]:
    """What each node reads, clip by clip, as the loop deals the work and the cache takes it in."""
    world_size = sum(map(len, nodes))
    sampler = make_sampler(recipe, clips)
    result = []
    for ranks in nodes:
        read, cached, left = Counter[str](), set[int](), room
        for step in range(steps):
            for rank in ranks:
                for micro_batch in assign_micro_batches(step, recipe.optim, rank, world_size):
                    needed = clip_positions(micro_batch.examples, recipe.augment.mixup, recipe.augment.partner)
                    for row in sampler.draw(needed).tolist():
                        size = int(clips.sizes[row])
                        read["clips"] += 1
                        read["drawn"] += micro_batch.weight > 0
                        if row in cached:
                            read["hits"] += 1
                            read["cache_bytes"] += size
                            continue
                        read["origin_bytes"] += size
                        if size <= left:
                            cached.add(row)
                            left -= size
                            read["kept"] += 1
                            read["kept_bytes"] += size
                        else:
                            left = 0
        result.append(read)
    return result


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_simulation_is_the_run_read_clip_by_clip(tone_shards: Path, data: st.DataObject) -> None:
    clips = load_manifest(tone_shards)
    micro_batches = data.draw(st.integers(1, 6))
    room = data.draw(st.integers(1, 2 * int(clips.sizes.sum())))
    recipe = a_recipe(
        tone_shards,
        optim__global_batch=2 * micro_batches,
        data__sampling=data.draw(st.sampled_from(["balanced", "uniform", "sequential"])),
        augment__partner=data.draw(st.sampled_from(["fresh", "in_batch"])),
        data__cache={"dir": "cache", "max_bytes": room} if data.draw(st.booleans()) else None,
    )
    workers = data.draw(st.integers(1, micro_batches))
    nodes = [part.tolist() for part in np.array_split(np.arange(workers), data.draw(st.integers(1, workers)))]
    steps = data.draw(st.integers(1, 60))
    ends = sorted(data.draw(st.sets(st.integers(1, steps), max_size=3)) | {steps})
    simulation = Simulation(recipe, clips, nodes, np.zeros(len(clips), np.int64))
    stretches = list(simulation.stretches(ends))
    wanted = one_by_one(recipe, clips, nodes, steps, room if recipe.data.cache else 0)
    assert simulation.counts.sum() == sum(read["drawn"] for read in wanted)
    assert [each.steps for each in stretches] == np.diff([0, *ends]).tolist()
    assert stretches[-1].unique_clips == np.count_nonzero(simulation.counts)
    for number, read in enumerate(wanted):
        for name in ("clips", "hits", "kept", "origin_bytes", "cache_bytes", "kept_bytes"):
            assert sum(getattr(each.nodes[number], name) for each in stretches) == read[name], name
    if len(nodes) == 1:
        assert stretches[-1].nodes[0].seen_bytes == clips.sizes[simulation.counts > 0].sum()


def test_the_parts_of_a_steps_time(tone_shards: Path) -> None:
    """By hand: 4 workers on 2 nodes, 1 micro-batch of 2 examples each; 1.25 GB/s of network, 1 GB/s of disk."""
    node = NodeReads(clips=80, hits=60, kept=5, origin_bytes=5 * 10**9, cache_bytes=18 * 10**9, kept_bytes=2 * 10**9)
    reads = Reads.of(node, steps=10, pcm=False)
    time = Setting(a_recipe(tone_shards), CLUSTER, "flac", True, 10**9).step_time(reads, 4)
    assert time.compute == pytest.approx(0.02)
    assert time.all_reduce == pytest.approx(2 * 3 / 4 / 1.25)
    assert time.network == pytest.approx(0.4 + time.all_reduce)
    assert time.disk == pytest.approx(2.0)
    assert time.decode == pytest.approx(8 / 1600)
    assert (time.limit, time.seconds) == ("disk", time.disk)
    local = Setting(a_recipe(tone_shards), CLUSTER, "wav", False, 10**9).step_time(reads, 2)
    assert local.all_reduce == local.network == 0  # both on one node, with the shards on its disk
    assert local.disk == pytest.approx(2.5)
    assert local.decode == pytest.approx(8 / 16000)
    pcm = Reads.of(node, steps=10, pcm=True)  # 20 clips are decoded, and 5 of them once more as a whole
    assert Setting(a_recipe(tone_shards), CLUSTER, "flac", True, 0).step_time(pcm, 4).decode == pytest.approx(
        2.5 / 1600
    )


def test_a_node_that_is_not_full_does_not_stand_for_the_others(tone_shards: Path) -> None:
    """Two workers on the first node, one on the second, whose cache fills more slowly: the first one's disk limits."""
    recipe = a_recipe(
        tone_shards,
        "s3://bucket/set",
        optim__global_batch=6,
        optim__examples=3000,
        data__cache={"dir": "cache", "max_bytes": 10**9},
    )
    clips = load_manifest(tone_shards)
    cluster = Cluster(**{**CLUSTER.__dict__, "disk_mb_s": 1.0})
    uneven = reckon(recipe, clips, cluster, lambda done: None)
    full = reckon(
        recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"global_batch": 4})}),
        clips,
        Cluster(**{**cluster.__dict__, "nodes": 1}),
        lambda done: None,
    )
    assert uneven["workers"] == 3
    assert {row["limit"] for row in uneven["over_time"][-3:]} == {"disk"}
    assert uneven["step_ms"]["disk"] == pytest.approx(full["step_ms"]["disk"], rel=0.1)


def test_the_plan_of_a_run(tone_shards: Path) -> None:
    clips = load_manifest(tone_shards)
    told: list[int] = []
    result = reckon(a_recipe(tone_shards, "s3://bucket/set"), clips, CLUSTER, told.append)
    assert (result["steps"], result["workers"], result["clips_drawn"]) == (12, 4, 192)
    assert told[-1] == 12
    assert result["over_time"][-1]["step"] == 12
    assert {row["cache_hits"] for row in result["over_time"]} == {0}
    assert result["over_time"][-1]["hours"] == pytest.approx(result["gpu_hours"] / 4)
    assert result["s3_requests"] == 192 + 2 * 4 * 5  # each clip, and twice each of the 5 tars by each worker
    assert result["s3_usd"] == pytest.approx(232 * 0.4e-6)
    assert result["node"]["distinct_bytes"] <= clips.sizes.sum()
    drawn = {row["class"]: row["repeats"] for row in result["classes"].values()}
    assert result["classes"]["least"]["repeats"] == min(drawn.values())
    assert [row["gpus"] for row in result["scaling"]] == [1, 2, 4]
    assert any("no data.cache" in line for line in result["advice"])


def test_gpus_without_work_and_limits_are_named(tone_shards: Path) -> None:
    clips = load_manifest(tone_shards)

    def advice(recipe: Recipe, **changes: float) -> str:
        cluster = Cluster(**{**CLUSTER.__dict__, **changes})
        return "\n".join(reckon(recipe, clips, cluster, lambda done: None)["advice"])

    recipe, remote = a_recipe(tone_shards), a_recipe(tone_shards, "s3://bucket/set")
    assert "capacity for 16 workers, but a step of 8 examples has only 4 micro-batches of 2" in advice(recipe, nodes=8)
    assert "raise optim.global_batch to 32" in advice(recipe, nodes=8)
    assert "2 of the 3 workers idle for part of each step" in advice(recipe, nodes=1, gpus_per_node=3)
    assert "decoding is the limit: with" in advice(recipe, core_clips_per_s=0.1)
    assert "the disk is the limit" in advice(recipe, disk_mb_s=0.01)
    assert "the network is the limit" in advice(remote, network_gbit_s=1e-3, nodes=1, gpus_per_node=4)
    assert "the all-reduce takes" in advice(remote, network_gbit_s=1e-3)
    assert "more than 1 GPUs don't help" in advice(recipe, network_gbit_s=1e-3, gpus_per_node=1, nodes=4)
    assert "up to 4 GPUs help" in advice(recipe, nodes=1, gpus_per_node=4)


def test_a_list_without_a_known_label_is_named(tone_shards: Path, tmp_path: Path) -> None:
    """And not the folder that its tables are written to."""
    segments = tmp_path / "x_segments.csv"
    segments.write_text('x, 0.000, 10.000, "/m/none"\n')
    with pytest.raises(UserError, match=f"^{segments}: none of its 1 segments has labels") as error:
        plan(a_recipe(tone_shards), CLUSTER, [segments])
    assert "\n" not in str(error.value)


def test_clips_without_labels_are_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uniform sampling needs none."""
    soundfile.write(tmp_path / "a.wav", np.zeros(4410), 44_100)
    rows = [SourceRow("a", [], os.fsencode(tmp_path / "a.wav"), "")]
    shards = pack_here(Source("s", "tagging", ["a"], ["A"], rows_table(rows), []), tmp_path / "shards")
    result = plan(a_recipe(shards, data__sampling="uniform"), CLUSTER, [])
    assert result["classes"] == {}
    plan_page(result)
    assert "draws of a clip" not in capsys.readouterr().out


def test_a_list_stands_for_the_shards_that_it_would_give(tone_shards: Path, tmp_path: Path, real_data: Path) -> None:
    segments = real_data / "audioset" / "balanced_train_segments.csv"
    recipe = a_recipe(tone_shards, "s3://bucket/not-packed-yet", optim__examples=8000)
    result = plan(recipe, CLUSTER, [segments])
    assert result["train_clips"] == 22160
    write_listed_set(segments, tmp_path / "set")
    assert plan(a_recipe(tmp_path / "set", optim__examples=8000), CLUSTER, [])["classes"] == result["classes"]
