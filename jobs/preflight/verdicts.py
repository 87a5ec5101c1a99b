"""Preflight's verdicts: the state of each check, and a suggested fix for each problem."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.capacity import Bundle
from cluster.preflight.facts import Facts, Gpu, Offset
from cluster.preflight.probes import Node
from cluster.preflight.storage import Disk, Reading
from erann_dist.recipe import CacheSection, Recipe
from erann_dist.train.work_plan import micro_batches_per_rank
from erann_dist.words import count
from jobs.advice import on_workers
from jobs.terminal.progress import duration
from jobs.terminal.show import size
from jobs.training.probe_run import ProbeResult

State = Literal["ok", "warning", "failed", "not checked"]

_NODES_NAMED = 5
_WARN_CLOCK_S, _FAIL_CLOCK_S = 1.0, 60.0
_HELD = 0.1  # Share of a GPU's memory used by others, above which to warn; our own process alone takes 0.5 GB.
_DECODING = 0.7  # Share of the reading threads' time spent in decoding, above which decoding is the bottleneck.
_WAITING = 0.1  # Share of a step spent waiting for data, above which to warn.
_STALLED = 0.02  # Largest acceptable share of the time that checkpoints block training.
_WORTH = 0.95  # More workers are worthwhile if a step takes less than this share of its time now.

_SAME_VERSIONS = (
    "install the same versions on all nodes (one image, or the same pip install), then run ray start again there"
)


@dataclass(frozen=True)
class Problem:
    """What is wrong, where, and what to do about it."""

    text: str
    mend: str  # The suggested fix; the name is a key of the JSON result.
    fails: bool = True  # Otherwise it is a warning: the run can start anyway.


@dataclass(frozen=True)
class Verdict:
    """The result of a check."""

    check: str
    state: State
    found: str
    problems: list[Problem] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def judge(check: str, found: str, problems: list[Problem], **figures: Any) -> Verdict:
    state: State = "ok"
    if problems:
        state = "failed" if any(problem.fails for problem in problems) else "warning"
    return Verdict(check, state, found, problems, figures)


def by_node(problems: Mapping[Node, str], fix: str, fails: bool = True) -> list[Problem]:
    """Merge the same problem on several nodes into one."""
    nodes_of: dict[str, list[Node]] = {}
    for node, text in problems.items():
        nodes_of.setdefault(text, []).append(node)
    return [Problem(f"{names(nodes)}: {text}", fix, fails) for text, nodes in nodes_of.items()]


def names(nodes: list[Node]) -> str:
    named = ", ".join(str(node) for node in nodes[:_NODES_NAMED])
    return named + (f" and {len(nodes) - _NODES_NAMED} more" if len(nodes) > _NODES_NAMED else "")


def nodes_verdict(
    recipe: Recipe,
    bundle: Bundle,
    nodes: list[Node],
    crew: list[Node],
    no_capacity: str | None,
    facts: Mapping[Node, Facts],
    gpus: Mapping[int, Gpu],
    troubles: list[Problem],
) -> Verdict:
    """crew: the workers' nodes, by rank. no_capacity: why the workers could not be started. gpus: the workers' GPUs,
    by rank. troubles: problems already found on the nodes.
    """
    problems = list(troubles)
    each = " and ".join(count(amount, kind) for kind, amount in bundle.items())
    if no_capacity:
        fix = "add nodes or start fewer workers (run.workers); an autoscaling cluster must have its nodes up already"
        problems.append(Problem(no_capacity, fix))
    elif len(crew) < recipe.run.max_workers:
        text = f"there is capacity for {len(crew)} of up to {count(recipe.run.max_workers, 'worker')}"
        fix = "add nodes; or let the run start with these workers, and grow when nodes are added"
        problems.append(Problem(text, fix, fails=False))
    problems += [
        Problem(
            f"{crew[rank]}: {size(gpu.total - gpu.free)} of the {size(gpu.total)} of its {gpu.name} are already in use",
            "end the process that uses them (listed by nvidia-smi there)",
            fails=False,
        )
        for rank, gpu in gpus.items()
        if gpu.total - gpu.free > _HELD * gpu.total
    ]
    threads = recipe.data.loader_threads if "GPU" in bundle else recipe.run.threads
    key = "data.loader_threads" if "GPU" in bundle else "run.threads"
    for node in sorted(set(crew), key=crew.index):
        workers = crew.count(node)
        if node in facts and workers * threads > facts[node].cores:
            text = f"{node}: {count(workers, 'worker')} with {key}={threads} for {count(facts[node].cores, 'core')}"
            problems.append(Problem(text, f"lower {key}, or use fewer workers per node", fails=False))
    found = f"{count(len(nodes), 'node')}; {count(len(crew), 'worker')} with {each} each"
    if crew:
        found += f" on {count(len(set(crew)), 'node')}"
    if gpus:
        names = ", ".join(sorted({gpu.name for gpu in gpus.values()}))
        found += f": {names}, {_range([gpu.free / 1e9 for gpu in gpus.values()], 'GB')} free"
    figures = {
        "nodes": [
            {"address": n.address, "hostname": n.hostname, "workers": crew.count(n), "resources": n.resources}
            for n in nodes
        ],
        "workers": len(crew),
        "cores": {str(node): there.cores for node, there in facts.items()},
        "gpus": [
            {"node": str(crew[rank]), "name": gpu.name, "free": gpu.free, "total": gpu.total}
            for rank, gpu in gpus.items()
        ],
    }
    return judge("nodes", found, problems, **figures)


def versions_verdict(here: Facts, facts: Mapping[Node, Facts], silent: Mapping[Node, str]) -> Verdict:
    """here: of the command's host. silent: by node, why this program can't be started there."""
    problems = by_node(
        {node: f"this program can't be started there: {text}" for node, text in silent.items()}, _SAME_VERSIONS
    )
    for fails in (True, False):
        differing = {node: "; ".join(_differences(here, there)[not fails]) for node, there in facts.items()}
        problems += by_node({node: text for node, text in differing.items() if text}, _SAME_VERSIONS, fails)
    libraries = ", ".join(f"{name} {version}" for name, version in here.versions.items())
    found = f"Python {here.python}, {libraries}, CUDA {here.cuda or 'none'}, erann-dist {here.source[:12]}"
    figures = {"here": _version_figures(here), "nodes": {str(n): _version_figures(f) for n, f in facts.items()}}
    return judge("versions", found, problems, **figures)


def _version_figures(facts: Facts) -> dict[str, Any]:
    return {"python": facts.python, "cuda": facts.cuda, "erann-dist": facts.source} | facts.versions


def _differences(here: Facts, there: Facts) -> tuple[list[str], list[str]]:
    """Differences that would break a run, and those that may be fine: a head without GPUs has another torch build."""
    wrong: list[str] = []
    doubtful: list[str] = []
    if here.python.split(".")[:2] != there.python.split(".")[:2]:
        wrong.append(f"Python {there.python}, here {here.python}")
    for name, version in here.versions.items():
        other = there.versions[name]
        if other != version:
            is_other_build = other.partition("+")[0] == version.partition("+")[0]
            may_be_right = is_other_build or name == "torchaudio"
            (doubtful if may_be_right else wrong).append(f"{name} {other}, here {version}")
    if here.cuda != there.cuda:
        doubtful.append(f"torch for CUDA {there.cuda or 'none'}, here {here.cuda or 'none'}")
    files = here.files.keys() | there.files.keys()
    if differing := sorted(name for name in files if here.files.get(name) != there.files.get(name)):
        more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
        wrong.append(
            f"a different version of erann-dist: {there.source[:12]} in {there.folder}, here {here.source[:12]} in "
            f"{here.folder}; {differing[0]}{more} differ{'' if more else 's'}"
        )
    return wrong, doubtful


def clocks_verdict(offsets: Mapping[Node, Offset], silent: list[Node]) -> Verdict:
    fix = "synchronise its clock (chrony, systemd-timesyncd): S3 rejects requests signed more than 15 minutes off"
    problems = by_node(dict.fromkeys(silent, "did not report its time"), "check whether the node is still up")
    for node, offset in offsets.items():
        least = abs(offset.seconds) - offset.within
        if least > _WARN_CLOCK_S:
            side = "ahead" if offset.seconds > 0 else "behind"
            text = f"{node}: its clock is {abs(offset.seconds):,.1f} s {side}"
            problems.append(Problem(text, fix, fails=least > _FAIL_CLOCK_S))
    worst = max((abs(offset.seconds) + offset.within for offset in offsets.values()), default=0.0)
    found = f"all within {_seconds(worst)}"
    figures = {"offset_s": {str(n): o.seconds for n, o in offsets.items()}}
    figures["within_s"] = {str(n): o.within for n, o in offsets.items()}
    return judge("clocks", found, problems, **figures)


_SLOW = (
    "the run works anyway; check endpoint, region, proxy and certificates there (AWS_ENDPOINT_URL, AWS_REGION, "
    "HTTPS_PROXY, AWS_CA_BUNDLE)"
)


def shards_verdict(clips: int, eval_clips: int, tars: int, readings: Mapping[Node, list[Reading]]) -> Verdict:
    """readings: by node, of each of its processes; all of them read at the same time."""
    clips_per_s = {node: sum(r.clips_per_s for r in each) for node, each in readings.items()}
    bytes_per_s = {node: sum(r.bytes_per_s for r in each) for node, each in readings.items()}
    found = (
        f"{clips:,} clips in {count(tars, 'tar')} to train on, {eval_clips:,} to evaluate; "
        f"{count(len(readings), 'node')} read {_range(list(clips_per_s.values()), 'clips/s')}, "
        f"{_range([value / 1e6 for value in bytes_per_s.values()], 'MB/s')} each, all at the same time"
    )
    figures = {
        "clips_per_s": {str(node): value for node, value in clips_per_s.items()},
        "mb_per_s": {str(node): value / 1e6 for node, value in bytes_per_s.items()},
    }
    slow = {node: each.slow for node, of_node in readings.items() for each in of_node if each.slow}
    return judge("shards", found, by_node(slow, _SLOW, fails=False), **figures)


def cache_verdict(cache: CacheSection, disks: Mapping[Node, Disk], silent: Mapping[Node, str]) -> Verdict:
    problems = by_node(dict(silent), "set data.cache.dir to a folder on a local disk of the node, or omit data.cache")
    for node, disk in disks.items():
        if (space := disk.free + disk.kept) < cache.max_bytes:
            text = f"{node}: {size(space)} free for data.cache in {cache.dir}, {size(cache.max_bytes)} requested"
            problems.append(Problem(text, f"free space there, or lower data.cache.max_bytes to {size(space)} or less"))
    least = min((disk.free + disk.kept for disk in disks.values()), default=0)
    found = (
        f"{cache.dir}: {size(cache.max_bytes)} requested, at least {size(least)} free on {count(len(disks), 'node')}"
    )
    figures = {"free": {str(n): d.free for n, d in disks.items()}, "kept": {str(n): d.kept for n, d in disks.items()}}
    return judge("cache", found, problems, asked=int(cache.max_bytes), **figures)


def all_reduce_verdict(workers: int, gradient_bytes: int, seconds: float) -> Verdict:
    bandwidth = bus_bandwidth(workers, gradient_bytes, seconds)
    found = (
        f"{size(gradient_bytes)} of gradients over {count(workers, 'worker')} in {_seconds(seconds)}, "
        f"bus bandwidth {bandwidth / 1e9:.2f} GB/s"
    )
    return judge("all-reduce", found, [], seconds=seconds, bytes=gradient_bytes, bus_gb_per_s=bandwidth / 1e9)


def bus_bandwidth(workers: int, number_of_bytes: int, seconds: float) -> float:
    """Bytes/s that each worker sends and receives in a ring.

    As defined by nccl-tests: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
    """
    return 2 * (workers - 1) / workers * number_of_bytes / seconds


def step_verdict(recipe: Recipe, trial: ProbeResult, all_reduce_s: float, gpus: list[Gpu]) -> Verdict:
    problems = [
        Problem(text, "see docs/reference/faults.md for its consequences", fails=False) for text in trial.incidents
    ]
    if trial.data_wait > _WAITING:
        text = f"the first worker waits for data during {trial.data_wait:.0%} of a step"
        problems.append(Problem(text, "see the check supply below", fails=False))
    examples_per_s = recipe.optim.global_batch / trial.step_s
    found = (
        f"{_seconds(trial.step_s)} a step (median of {trial.steps}) on {count(trial.workers, 'worker')}, "
        f"{trial.device.partition(':')[0]}: {examples_per_s:,.1f} examples/s; waiting for data {trial.data_wait:.1%}"
    )
    if all_reduce_s:
        found += f", all-reduce {all_reduce_s / trial.step_s:.1%}"
    if trial.peak_gpu_bytes:
        found += f"; at most {size(max(trial.peak_gpu_bytes))} of {size(gpus[0].total)} of a GPU"
    found += f"; a checkpoint takes {_seconds(trial.checkpoint_s)}"
    figures = {
        "step_s": trial.step_s,
        "examples_per_s": examples_per_s,
        "data_wait": trial.data_wait,
        "all_reduce_share": all_reduce_s / trial.step_s,
        "peak_gpu_bytes": trial.peak_gpu_bytes,
        "checkpoint_s": trial.checkpoint_s,
        "hosts": trial.hosts,
    }
    return judge("step", found, problems, **figures)


@dataclass(frozen=True)
class Demand:
    """How fast the run's nodes must read."""

    clips_per_s: float  # Needed by each worker, at the speed of the measured steps.
    clip_bytes: float  # Mean size of a clip in its tar.
    set_bytes: int
    is_remote: bool  # Whether the shards are in S3.
    hits: float | None  # Share of the reads that the cache will serve once it is full; None without a cache.


def supply_verdict(
    recipe: Recipe, demand: Demand, readings: Mapping[Node, list[Reading]], cores: Mapping[Node, int]
) -> Verdict:
    """Whether the nodes read as fast as their workers train. readings: by node, of each of its workers."""
    node, each = max(readings.items(), key=lambda item: _shortness(demand, item[1]))
    need, short = demand.clips_per_s * len(each), _shortness(demand, each)
    read = sum(reading.clips_per_s for reading in each)
    found = (
        f"a node with {count(len(each), 'worker')} needs {need:,.1f} clips/s, "
        f"{need * demand.clip_bytes / 1e6:,.2f} MB/s; "
        f"{'it' if len(readings) == 1 else 'the slowest'} reads {read:,.1f} clips/s"
    )
    decodes = sum(r.computing for r in each) > _DECODING * sum(r.seconds * r.threads for r in each)
    cache = recipe.data.cache
    helped = demand.hits is not None and (not decodes or (cache is not None and cache.format == "pcm"))
    late = short * (1 - (demand.hits or 0.0)) if helped else short  # Once the cache is full.
    if demand.hits is not None:
        found += f"; the cache will serve {demand.hits:.0%}"
    problems = []
    if short > 1 and late <= 1:
        found += f", until then steps take {short:.1f} times as long"
    elif late > 1:
        text = f"{node}: {'decoding' if decodes else 'reading'} is too slow, steps will take {late:.1f} times as long"
        fix = _more_decoding(recipe, late, len(each), cores[node]) if decodes else _more_reading(recipe, demand)
        problems.append(Problem(text, fix, fails=False))
    figures: dict[str, Any] = {
        "needed_clips_per_s": need,
        "needed_mb_per_s": need * demand.clip_bytes / 1e6,
        "read_clips_per_s": read,
        "decoding_is_the_limit": decodes,
        "cache_hits": demand.hits,
        "times_as_long": late,
    }
    return judge("supply", found, problems, **figures)


def _shortness(demand: Demand, each: list[Reading]) -> float:
    return demand.clips_per_s * len(each) / sum(reading.clips_per_s for reading in each)


def _more_decoding(recipe: Recipe, times: float, workers: int, cores: int) -> str:
    threads = recipe.data.loader_threads
    if (possible := min(cores // workers, math.ceil(threads * times))) > threads:
        return f"set data.loader_threads={possible}, for which the node has enough cores"
    return "use data.cache with format pcm or WAV shards, which need little decoding; or nodes with more cores per GPU"


def _more_reading(recipe: Recipe, demand: Demand) -> str:
    if recipe.data.cache:
        return f"raise data.cache.max_bytes: the training clips have {size(demand.set_bytes)}"
    from_where = "S3" if demand.is_remote else "the shards' disk"
    return (
        f"set data.cache={{dir: a disk of the node, max_bytes: {size(demand.set_bytes)} or less}}, to read each clip "
        f"from {from_where} only once; or copy the set beforehand with erann stage"
    )


def estimate_verdict(trial: ProbeResult, steps: int, done: int) -> Verdict:
    """steps: of the whole run. done: of these, the steps that are in its last checkpoint."""
    seconds = (steps - done) * trial.step_s
    found = f"{steps - done:,} {'remaining ' * bool(done)}steps of {_seconds(trial.step_s)}: {duration(seconds)}"
    unit = "GPU-hours" if trial.device.startswith("cuda") else "worker-hours"
    hours = seconds / 3600 * trial.workers
    found += f", {hours:,.3g} {unit}, without start-up, evaluations and checkpoints"
    return judge("estimate", found, [], steps=steps - done, seconds=seconds, **{unit.replace("-", "_").lower(): hours})


def advice(recipe: Recipe, trial: ProbeResult, all_reduce_s: float, capacity: int, gpus: list[Gpu]) -> list[str]:
    """Changes of the recipe that the measurements suggest. capacity: how many workers fit on the cluster."""
    optim, workers, every = recipe.optim, trial.workers, recipe.checkpoint.every
    most = optim.global_batch // optim.micro_batch
    lines = on_workers(optim, workers, capacity, all_reduce_s / trial.step_s)
    if (more := min(capacity, most)) > workers:
        share = micro_batches_per_rank(optim, more) / micro_batches_per_rank(optim, workers)
        seconds = (trial.step_s - all_reduce_s) * share + all_reduce_s
        if seconds < _WORTH * trial.step_s:
            lines.append(f"run.workers={more} uses the cluster's full capacity: about {_seconds(seconds)} a step")
    if gpus and all(gpu.has_bf16 for gpu in gpus) and optim.precision in ("fp32", "tf32"):
        lines.append("optim.precision=bf16 is faster on these GPUs (but makes it a different run)")
    # A checkpoint blocks training during its copy, and until the previous checkpoint is written.
    least = math.ceil(max(trial.stall_s / _STALLED, trial.checkpoint_s) / trial.step_s)
    if every < least:
        lines.append(
            f"checkpoint.every={least} or more: a checkpoint takes {_seconds(trial.checkpoint_s)} and blocks training "
            f"for {_seconds(trial.stall_s)}"
        )
    return lines


def _seconds(value: float) -> str:
    if value >= 10:
        return f"{value:,.0f} s"
    return f"{value:.2f} s" if value >= 0.1 else f"{1000 * value:.1f} ms"


def _range(values: list[float], unit: str) -> str:
    low, high = (f"{value:,.1f}" for value in (min(values), max(values)))
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"
