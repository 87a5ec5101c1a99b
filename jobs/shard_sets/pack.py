"""Packing on a Ray cluster, one task per shard."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.embedded import opening, ray_cluster
from erann_dist.data.manifest import REPORT, SHARDS, read_manifest, read_table
from erann_dist.errors import UserError
from erann_dist.storage.folder import Folder, LocalFolder
from jobs.outputs import packing_into
from jobs.terminal.progress import bar, console
from shards import build
from shards.build import Plan, Progress, ShardTask
from shards.clip import Packing
from shards.sources.rows import Source
from shards.statistics import CONDITION, condition, low_rate

_REFRESH_SECONDS = 0.5


def pack(source: Source, folder: Folder, packing: Packing, address: str | None = None) -> dict[str, Any]:
    """Pack a source into the folder, resuming interrupted packing. Returns the set's summary.

    Raises UserError if the folder holds something else or can't be written.
    """
    for note in source.notes:
        console.print(note, markup=False)
    plan = Plan(source, packing, folder)
    with packing_into(folder):
        if build.start(plan):
            there = build.finished(plan)
            if there:
                console.print(
                    f"{folder}: resuming, {len(there)} of {plan.num_shards} shards are complete", markup=False
                )
            if len(there) < plan.num_shards:
                console.print(opening(address), markup=False)
                with ray_cluster(address):
                    _build_missing(plan, there)
            build.finish(plan)
        else:
            console.print(f"{folder}: these rows are already packed", markup=False)
        return summary(folder)


def require_coverage(packed: dict[str, Any], max_missing: float) -> None:
    """Raise UserError if more than max_missing of the listed clips, as a fraction, are not in the set."""
    if packed["missing_share"] > max_missing:
        raise UserError(
            f"{packed['shards']}: {packed['missing_share']:.1%} of the listed clips are not in it, more than "
            f"--max-missing {max_missing:g}; the set is complete and usable, and {REPORT} lists why each is missing"
        )


def summary(folder: Folder) -> dict[str, Any]:
    """What a finished shard set holds."""
    info, clips = read_manifest(folder, ["samples", "format", *CONDITION])
    samples = clips["samples"]
    tars = read_table(folder, SHARDS)
    reasons = Counter(read_table(folder, REPORT)["reason"].to_pylist())
    absent = reasons.total() - reasons["duplicate"]  # A duplicate is not a missing clip.
    return {
        "shards": str(folder),
        "tars": len(tars),
        "clips": len(samples),
        "hours": round(pc.sum(samples).as_py() / info.sample_rate / 3600, 3),
        "bytes": pc.sum(tars["size"]).as_py(),
        "not_packed": dict(sorted(reasons.items())),
        "low_rate": low_rate(info, clips["format"]),
        "missing_share": round(absent / (len(samples) + absent), 6),
        **condition(clips),
        "content_hash": info.content_hash,
    }


def _build_missing(plan: Plan, there: set[int]) -> None:
    """Build the missing shards, showing progress."""
    before = _total(map(build.progress_of, build.kept(plan, there)))
    began = time.monotonic()
    with bar(f"pack {plan.source.name}", plan.num_rows) as progress:

        def show(now: Progress) -> None:
            seconds = time.monotonic() - began
            speed = f"{now.rows / seconds:.0f} clips/s  {now.bytes / seconds / 1e6:.1f} MB/s"
            progress.update(before.rows + now.rows, f"{speed}  {before.rejected + now.rejected} not packed")

        tasks = (plan.task(shard) for shard in range(plan.num_shards) if shard not in there)
        for _ in build_all(tasks, show, keep=True):
            pass


def build_all(
    tasks: Iterator[ShardTask], show: Callable[[Progress], None], *, keep: bool
) -> Iterator[tuple[ShardTask, pa.Table | None]]:
    """Build shards on the cluster, one task each. Yields each finished task, with the clips' outcomes if they differ
    from what was expected.

    At most one task more is submitted than the cluster can run at once. With `keep`, each result is recorded in the
    folder. Raises UserError when a task fails.
    """
    import ray

    tally = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Tally).remote()
    remote = ray.remote(num_cpus=1)(_build)
    running: dict[Any, ShardTask] = {}
    finished = Progress()
    task = next(tasks, None)
    while task is not None or running:
        slots = int(ray.cluster_resources().get("CPU", 1)) + 1  # Read again each time, as nodes join and leave.
        while task is not None and len(running) < slots:
            absolute = replace(task, folder=_absolute(task.folder))
            running[remote.remote(absolute, keep, tally)] = task
            task = next(tasks, None)
        ready, _ = ray.wait(list(running), num_returns=1, timeout=_REFRESH_SECONDS)
        try:
            for reference in ready:
                progress, outcomes = ray.get(reference)
                finished = _total([finished, progress])
                yield running.pop(reference), outcomes
            under_way = ray.get(tally.of.remote([task.shard for task in running.values()]))
        except ray.exceptions.RayError as error:
            raise _cause(error) from error
        show(_total([finished, *under_way]))


def _cause(error: Exception) -> Exception:
    """The error of a task, as an error for the user."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, UserError | OSError):
        return cause
    return UserError(f"a packing task failed: {type(cause).__name__}: {' '.join(str(cause).split())[:300]}")


def _absolute(folder: Folder) -> Folder:
    """The folder with an absolute path: the cluster's workers have other working directories."""
    return LocalFolder(os.path.abspath(folder.url)) if isinstance(folder, LocalFolder) else folder


def _build(task: ShardTask, keep: bool, tally: Any) -> tuple[Progress, pa.Table | None]:
    """Build one shard, in a worker. The worker itself records the result, so that none is lost with the driver."""
    shown = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal shown
        if time.monotonic() - shown >= _REFRESH_SECONDS:
            shown = time.monotonic()
            tally.note.remote(task.shard, progress)

    try:
        result = build.build_shard(task, show)
    except build.Differs as difference:
        return Progress(len(task.rows)), difference.args[0]
    if keep:
        build.keep(task, result)
    return build.progress_of(result), None


class _Tally:
    """An actor that holds each shard's progress. A task that Ray restarts overwrites its earlier progress."""

    def __init__(self) -> None:
        self._shards: dict[int, Progress] = {}

    def note(self, shard: int, progress: Progress) -> None:
        self._shards[shard] = progress

    def of(self, shards: list[int]) -> list[Progress]:
        return [self._shards[shard] for shard in shards if shard in self._shards]


def _total(parts: Iterable[Progress]) -> Progress:
    parts = list(parts)
    return Progress(sum(p.rows for p in parts), sum(p.bytes for p in parts), sum(p.rejected for p in parts))
