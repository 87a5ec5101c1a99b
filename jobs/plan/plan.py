"""Estimates how long a run will take on a cluster and what will limit it, before it is started."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erann_dist.data.manifest import Manifest, concatenate, load_manifest
from erann_dist.data.sampling import class_lists
from erann_dist.data.sources import load_sources
from erann_dist.models.spec import build_model
from erann_dist.recipe import Recipe
from erann_dist.train.work_plan import micro_batches_per_rank
from erann_dist.words import count
from jobs.advice import on_workers
from jobs.plan.simulation import NodeReads, Simulation, Stretch
from jobs.terminal.progress import bar, console
from jobs.terminal.show import size
from shards.listed import write_listed_set

_SHARES = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)  # Shares of the run at which to report.
_EPOCHS_SHOWN = 12
_WAV_DECODING = 0.1  # Decoding time of WAV relative to FLAC.
_ENOUGH = 0.95  # Share of the best speed; more GPUs than it takes are not worthwhile.


@dataclass(frozen=True)
class Cluster:
    """A cluster of identical nodes. Ranks fill one node after the other."""

    nodes: int
    gpus_per_node: int
    cores_per_node: int
    network_gbit_s: float  # of a node
    disk_mb_s: float  # read speed of a node's disk
    gpu_examples_per_s: float  # training speed of a GPU that never waits
    core_clips_per_s: float  # decoding speed of a core
    usd_per_million_requests: float


@dataclass(frozen=True)
class Reads:
    """What a node reads for a step, on average over a stretch of the run."""

    clips: float
    decoded: float  # clips, including those decoded whole for a PCM cache
    origin_bytes: float
    cache_bytes: float
    kept_bytes: float  # written to the cache

    @classmethod
    def of(cls, node: NodeReads, steps: int, pcm: bool) -> "Reads":
        decoded = node.clips - node.hits + node.kept if pcm else node.clips
        return cls(
            node.clips / steps,
            decoded / steps,
            node.origin_bytes / steps,
            node.cache_bytes / steps,
            node.kept_bytes / steps,
        )

    def scaled(self, factor: float) -> "Reads":
        return Reads(*(factor * value for value in astuple(self)))


@dataclass(frozen=True)
class StepTime:
    """How long a step takes. Fetching, reading and decoding the next steps' clips overlap with its computation."""

    compute: float  # seconds, on a GPU
    all_reduce: float  # seconds, of the gradients between the nodes, after the computation
    network: float  # seconds for the network to carry a step's clips and gradients
    disk: float
    decode: float

    @property
    def undisturbed(self) -> float:
        """Seconds if clips were always available."""
        return self.compute + self.all_reduce

    @property
    def limits(self) -> dict[str, float]:
        gpu = "GPU" if self.compute >= self.all_reduce else "all-reduce"
        return {gpu: self.undisturbed, "decoding": self.decode, "network": self.network, "disk": self.disk}

    @property
    def seconds(self) -> float:
        return max(self.limits.values())

    @property
    def limit(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])


@dataclass(frozen=True)
class Setting:
    """All that a step's time depends on, except its reads and the number of workers."""

    recipe: Recipe
    cluster: Cluster
    codec: str
    remote: bool  # whether the shards are in S3
    gradient_bytes: int  # of all parameters, in float32

    def step_time(self, reads: Reads, workers: int) -> StepTime:
        optim, cluster = self.recipe.optim, self.cluster
        line, disk = cluster.network_gbit_s / 8 * 1e9, cluster.disk_mb_s * 1e6
        # A ring sends all but one worker's share twice, through the single link of each node. The cost within a node
        # is assumed to be zero.
        spread = workers > cluster.gpus_per_node
        all_reduce = 2 * (workers - 1) / workers * self.gradient_bytes / line if spread else 0.0
        from_disk = reads.cache_bytes + reads.kept_bytes + (0.0 if self.remote else reads.origin_bytes)
        return StepTime(
            compute=micro_batches_per_rank(optim, workers) * optim.micro_batch / cluster.gpu_examples_per_s,
            all_reduce=all_reduce,
            network=all_reduce + (reads.origin_bytes / line if self.remote else 0.0),
            disk=from_disk / disk,
            decode=reads.decoded
            * (_WAV_DECODING if self.codec == "wav" else 1)
            / (cluster.core_clips_per_s * cluster.cores_per_node),
        )

    def reads(self, stretch: Stretch) -> list[Reads]:
        """The reads of each node."""
        cache = self.recipe.data.cache
        pcm = cache is not None and cache.format == "pcm"
        return [Reads.of(node, stretch.steps, pcm) for node in stretch.nodes]

    def slowest(self, stretch: Stretch, workers: int) -> tuple[Reads, StepTime]:
        """The node that the others wait for."""
        times = [(reads, self.step_time(reads, workers)) for reads in self.reads(stretch)]
        return max(times, key=lambda each: each[1].seconds)


def plan(recipe: Recipe, cluster: Cluster, segments: list[Path]) -> dict[str, Any]:
    """Plan the recipe's run, for AudioSet's segment lists if given. Raises UserError when there are no clips."""
    clips = _listed_clips(segments) if segments else load_sources(recipe.data.train)
    with bar("draw", recipe.steps(len(clips))) as progress:
        return reckon(recipe, clips, cluster, progress.update)


def _listed_clips(segments: list[Path]) -> Manifest:
    """The clips of the lists, as if all of them were already packed."""
    manifests = []
    with tempfile.TemporaryDirectory(prefix="erann-plan-") as folder, console.status("reading the segment lists"):
        for number, path in enumerate(segments):
            write_listed_set(path, Path(folder, str(number)))
            manifests.append(load_manifest(Path(folder, str(number))))
    return concatenate(manifests)


def reckon(recipe: Recipe, clips: Manifest, cluster: Cluster, progress: Callable[[int], None]) -> dict[str, Any]:
    """Draw all clips of the run and estimate its demands on the cluster.

    progress: called with the number of steps that have been drawn.
    """
    optim = recipe.optim
    steps, gpus = recipe.steps(len(clips)), cluster.nodes * cluster.gpus_per_node
    workers = min(gpus, optim.global_batch // optim.micro_batch)
    nodes = np.array_split(np.arange(workers), range(cluster.gpus_per_node, workers, cluster.gpus_per_node))
    simulation = Simulation(recipe, clips, [ranks.tolist() for ranks in nodes], np.zeros(len(clips), np.int64))
    stretches = []
    for stretch in simulation.stretches(_looks(steps, len(clips), optim.global_batch)):
        stretches.append(stretch)
        progress(sum(each.steps for each in stretches))

    with torch.device("meta"):
        parameters = build_model(recipe.model.variant, clips.num_classes).parameters()
    remote = any(source.url.startswith("s3://") for source in recipe.data.train)
    gradient_bytes = 4 * sum(parameter.numel() for parameter in parameters)
    setting = Setting(recipe, cluster, clips.info.codec, remote, gradient_bytes)
    over_time = _over_time(setting, stretches, workers, len(clips))
    reads, step = setting.slowest(stretches[-1], workers)
    fetched = sum(node.clips - node.hits for each in stretches for node in each.nodes)
    requests = fetched + 2 * workers * len(clips.tars)  # Each worker requests the size of each tar and opens it.
    origin_bytes = np.sum([[node.origin_bytes for node in each.nodes] for each in stretches], axis=0)
    result = {
        "recipe": recipe.run.name,
        "cluster": asdict(cluster),
        "gpus": gpus,
        "workers": workers,
        "steps": steps,
        "examples": steps * optim.global_batch,
        "train_clips": len(clips),
        "clips_drawn": int(simulation.counts.sum()),
        "epochs": steps * optim.global_batch / len(clips),
        "hours": over_time[-1]["hours"],
        "gpu_hours": over_time[-1]["hours"] * gpus,
        "classes": _classes(simulation, clips),
        "over_time": over_time,
        "step_ms": {name: 1000 * seconds for name, seconds in step.limits.items()},
        "all_reduce": {
            "mb": gradient_bytes / 1e6,
            "ms": 1000 * step.all_reduce,
            "share": step.all_reduce / step.undisturbed,
        },
        "node": {  # What the slowest node needs at the end of the run for its GPUs never to wait.
            "clips_per_s": reads.clips / step.undisturbed,
            "origin_mb_per_s": reads.origin_bytes / step.undisturbed / 1e6,
            "cache_mb_per_s": reads.cache_bytes / step.undisturbed / 1e6,
            "decoding_cores": step.decode / step.undisturbed * cluster.cores_per_node,
            "origin_bytes": int(origin_bytes.max()),
            "distinct_bytes": max(node.seen_bytes for node in stretches[-1].nodes),
        },
        "s3_requests": requests if remote else 0,
        "s3_usd": requests / 1e6 * cluster.usd_per_million_requests if remote else 0.0,
        **_scaling(setting, stretches, workers),
    }
    return result | {"advice": _advice(recipe, result)}


def _looks(steps: int, clips: int, global_batch: int) -> list[int]:
    """The steps at which to report: some shares of the run, and the ends of some of its epochs."""
    epochs = np.arange(1, steps * global_batch // clips + 1)
    epochs = epochs[:: -(-len(epochs) // _EPOCHS_SHOWN) or 1]
    ends = -(-epochs * clips // global_batch)
    return sorted({max(1, round(share * steps)) for share in _SHARES} | set(ends.tolist()))


def _over_time(setting: Setting, stretches: list[Stretch], workers: int, clips: int) -> list[dict[str, Any]]:
    """The run over time, a row for each stretch."""
    rows = []
    step, seconds, batch = 0, 0.0, setting.recipe.optim.global_batch
    for stretch in stretches:
        reads, each = setting.slowest(stretch, workers)
        step += stretch.steps
        seconds += each.seconds * stretch.steps
        rows.append(
            {
                "step": step,
                "epoch": step * batch / clips,
                "hours": seconds / 3600,
                "unique_clips": stretch.unique_clips,
                "cache_hits": sum(n.hits for n in stretch.nodes) / sum(n.clips for n in stretch.nodes),
                "origin_mb_per_s": reads.origin_bytes / each.seconds / 1e6,
                "examples_per_s": batch / each.seconds,
                "limit": each.limit,
            }
        )
    return rows


def _scaling(setting: Setting, stretches: list[Stretch], workers: int) -> dict[str, Any]:
    """The speed with other numbers of GPUs, assuming the same cache hit rate as on this cluster."""
    optim, per_node = setting.recipe.optim, setting.cluster.gpus_per_node

    def micro_batches_of_a_node(number: int) -> int:
        return min(number, per_node) * micro_batches_per_rank(optim, number)

    def at(full_node: Reads, number: int) -> StepTime:
        share = micro_batches_of_a_node(number) / micro_batches_of_a_node(workers)
        return setting.step_time(full_node.scaled(share), number)

    at_first, at_last = (setting.reads(stretch)[0] for stretch in (stretches[0], stretches[-1]))  # of a full node
    most = optim.global_batch // optim.micro_batch
    late = {number: at(at_last, number) for number in range(1, most + 1)}
    fastest = min(each.seconds for each in late.values())
    enough = min(number for number, each in late.items() if fastest >= _ENOUGH * each.seconds)
    shown = {2**i for i in range(most.bit_length())} | {workers, enough, most}
    return {
        "scaling": [
            {
                "gpus": number,
                "examples_per_s": optim.global_batch / late[number].seconds,
                "at_first": optim.global_batch / at(at_first, number).seconds,
                "efficiency": late[1].seconds / late[number].seconds / number,
                "limit": late[number].limit,
            }
            for number in sorted(shown)
        ],
        "limits_from": {
            limit: min(number for number, each in late.items() if each.limit == limit)
            for limit in sorted({each.limit for each in late.values()})
        },
        "enough_gpus": enough,
    }


def _classes(simulation: Simulation, clips: Manifest) -> dict[str, dict[str, Any]]:
    """The classes whose clips are drawn least often, in the median, and most often; empty if no clip has a label."""
    lists = class_lists(clips.label_values, clips.label_offsets, clips.num_classes)
    drawn = {number: simulation.counts[rows] for number, rows in enumerate(lists) if len(rows)}
    if not drawn:
        return {}
    ranked = sorted(drawn, key=lambda number: float(drawn[number].mean()))
    chosen = {"least": ranked[0], "median": ranked[len(ranked) // 2], "most": ranked[-1]}
    return {
        name: {
            "class": clips.info.label_names[number],
            "clips": len(drawn[number]),
            "seen": int(np.count_nonzero(drawn[number])),
            "repeats": float(drawn[number].mean()),
        }
        for name, number in chosen.items()
    }


def _advice(recipe: Recipe, result: dict[str, Any]) -> list[str]:
    """Suggestions for the user, one line each."""
    optim, cache, node = recipe.optim, recipe.data.cache, result["node"]
    gpus, workers = result["gpus"], result["workers"]
    first, last = result["over_time"][0]["limit"], result["over_time"][-1]["limit"]
    lines = on_workers(optim, workers, gpus, result["all_reduce"]["share"])
    if (enough := result["enough_gpus"]) < workers:
        lines.append(f"more than {enough} GPUs don't help: with {enough}, a step is within 5 % of the fastest")
    elif workers >= gpus:
        micro_batches = count(optim.global_batch // optim.micro_batch, "micro-batch")
        lines.append(f"up to {enough} GPUs help; a step has {micro_batches}, so more than that would be idle")
    if last == "decoding":
        lines.append(
            f"decoding is the limit: with {node['decoding_cores']:.0f} cores per node the GPUs would not wait; "
            "WAV shards or a data.cache with format pcm need few cores, but twice the bytes"
        )
    if last in ("network", "disk"):
        lines.append(
            f"the {last} is the limit: to keep its GPUs busy, a node needs {node['origin_mb_per_s']:.0f} MB/s "
            f"from the shards and {node['cache_mb_per_s']:.0f} MB/s from its cache"
        )
    if first != last:
        lines.append(f"at first the {first} is the limit, until the caches are full")
    if result["s3_requests"] and (cache is None or cache.max_bytes < node["distinct_bytes"]):
        has = f"data.cache.max_bytes is {size(cache.max_bytes)}" if cache else "there is no data.cache"
        lines.append(f"{has}; {size(node['distinct_bytes'])} would hold all the clips that a node reads")
    return lines
