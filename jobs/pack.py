"""Packing on a Ray cluster: one shard a task."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from cluster.embedded import ray_cluster
from erann_dist.errors import UserError
from erann_dist.manifest import REPORT, load_manifest
from jobs.progress import bar, console
from shards import build
from shards.build import ShardResult, ShardTask
from shards.sources.rows import Source


def pack(source: Source, out: Path, clips_per_shard: int, address: str | None = None) -> dict[str, Any]:
    """Pack a source into the folder `out`, or go on with that. Returns what is in it now.

    Raises UserError when the folder holds something else.
    """
    digest = build.source_hash(source, clips_per_shard)
    if not build.start(out, digest):
        console.print(f"{out}: these rows are packed already")
        return summary(out)
    tasks = build.plan(source, out.absolute(), clips_per_shard)  # the cluster's workers start in folders of their own
    results = {task.shard: result for task in tasks if (result := build.finished_result(task))}
    if results:
        console.print(f"{out}: going on, {len(results)} of {len(tasks)} shards are there")
    todo = [task for task in tasks if task.shard not in results]
    if todo:
        with ray_cluster(address), bar(f"pack {source.name}", len(source.rows)) as progress:
            began, packed_before = time.monotonic(), sum(_rows(r) for r in results.values())
            for task, result in _build_all(todo):
                build.keep_result(task, result)
                results[task.shard] = result
                done = sum(_rows(r) for r in results.values())
                rate = (done - packed_before) / (time.monotonic() - began)
                bad = sum(len(r.report) for r in results.values())
                progress.update(done, f"{rate:.0f} clips/s  {bad} not packed")
    build.finish(out, source, [results[task.shard] for task in tasks], digest)
    return summary(out)


def summary(out: Path) -> dict[str, Any]:
    """What a finished shard set holds."""
    import pyarrow.parquet as pq

    manifest = load_manifest(out)
    report = pq.read_table(out / REPORT).to_pylist()
    return {
        "shards": str(out),
        "tars": len(manifest.shard_paths),
        "clips": len(manifest),
        "hours": round(float(manifest.samples.sum()) / manifest.info.sample_rate / 3600, 3),
        "bytes": sum(path.stat().st_size for path in manifest.shard_paths),
        "not_packed": dict(Counter(row["reason"] for row in report)),
        "content_hash": manifest.info.content_hash,
    }


def _rows(result: ShardResult) -> int:
    return len(result.clips) + len(result.report)


def _build_all(tasks: list[ShardTask]) -> Any:
    """Each task with its result, as they get done; no more are under way than the cluster can work on at once."""
    import ray

    remote = ray.remote(num_cpus=1)(build.build_shard)
    waiting = list(reversed(tasks))
    running: dict[Any, ShardTask] = {}
    slots = int(ray.cluster_resources().get("CPU", 1)) + 1
    while waiting or running:
        while waiting and len(running) < slots:
            task = waiting.pop()
            running[remote.remote(task)] = task
        (ready,), _ = ray.wait(list(running), num_returns=1)
        task = running.pop(ready)
        try:
            yield task, ray.get(ready)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)
            raise UserError(f"{task.path}: {type(cause).__name__}: {str(cause).splitlines()[0]}") from error
