"""Verify, repair, index and copy shard sets, showing progress."""

import time
from typing import Any

from cluster.embedded import ray_cluster
from erann_dist.data.manifest import MANIFEST, SHARDS, read_table
from erann_dist.errors import UserError
from erann_dist.storage.folder import Folder, LocalFolder
from jobs.shard_sets.pack import build_all, summary
from jobs.terminal.progress import bar, console
from shards.index import index as index_tars
from shards.repair import repair_tasks, why_different
from shards.sources.class_lists import ClassList
from shards.sources.rows import Source
from shards.sources.samples import Fields
from shards.stage import Staging, copy, staging
from shards.verify import Problem
from shards.verify import verify as verify_shards


def verify(folder: Folder, quick: bool = False) -> dict[str, Any]:
    """Check a shard set, printing a line for each problem. Raises UserError if there is any."""
    clips = len(read_table(folder, MANIFEST, ["key"]))
    problems = _problems(folder, clips, quick)
    if problems:
        advice = "erann repair rebuilds the affected shards" if all(p.shard is not None for p in problems) else ""
        raise UserError(f"{folder}: {_count(problems)}; {advice or 'pack the set again or restore it'}")
    return {"shards": str(folder), "clips": clips, "tars": len(read_table(folder, SHARDS, ["name"])), "quick": quick}


def repair(folder: Folder, source: Source, quick: bool = False, address: str | None = None) -> dict[str, Any]:
    """Find the shards that don't match the manifest and rebuild them. Raises UserError when one can't be rebuilt."""
    problems = _problems(folder, len(read_table(folder, MANIFEST, ["key"])), quick)
    concerned = sorted({problem.shard for problem in problems if problem.shard is not None})
    tasks = repair_tasks(folder, source, concerned)
    failed = []
    if tasks:
        folder.discard_unfinished()
        with ray_cluster(address), bar("repair", sum(len(task.rows) for task in tasks)) as progress:
            for task, outcomes in build_all(iter(tasks), lambda now: progress.update(now.rows), keep=False):
                if outcomes is not None:
                    failed.append(why_different(folder, task, outcomes))
    for line in failed:
        console.print(line, markup=False)
    left = [problem for problem in problems if problem.shard is None]
    if failed or left:
        raise UserError(f"{folder}: {len(failed)} shards and {len(left)} other problems could not be repaired")
    return {"shards": str(folder), "rebuilt": [task.name for task in tasks]}


def index(folder: Folder, classes: ClassList | None, fields: Fields) -> dict[str, Any]:
    """Write a manifest for existing tars. Raises UserError."""
    with console.status("indexing") as status:
        for number, _ in enumerate(index_tars(folder, classes, fields)):
            status.update(f"indexing tar {number}")
    return summary(folder)


def stage(source: Folder, folder: LocalFolder) -> dict[str, Any]:
    """Copy a shard set to a local folder, resuming an interrupted copy. Raises UserError as staging and copy do."""
    with staging(source, folder) as plan:
        began = time.monotonic()
        if plan.is_finished:
            console.print(f"{folder}: already complete", markup=False)
        else:
            _copy(plan)
        return {
            "shards": str(folder),
            "source": str(source),
            "clips": sum(tar["clips"] for tar in plan.tars),
            "tars": len(plan.tars),
            "copied_tars": len(plan.missing),
            "copied_bytes": plan.bytes,
            "mb_per_s": round(plan.bytes / (time.monotonic() - began) / 1e6, 1),
        }


def _copy(plan: Staging) -> None:
    """Copy what is missing, showing progress."""
    if there := len(plan.tars) - len(plan.missing):
        console.print(f"{plan.target}: resuming, {there} of {len(plan.tars)} tars are complete", markup=False)
    began = time.monotonic()
    with bar("stage, MB", plan.bytes // 10**6) as progress:

        def show(done: int) -> None:
            progress.update(done // 10**6, f"{done / (time.monotonic() - began) / 1e6:.1f} MB/s")

        copy(plan, show)


def _problems(folder: Folder, clips: int, quick: bool) -> list[Problem]:
    """All problems; each is printed on a line."""
    problems: list[Problem] = []
    with bar("verify", clips) as progress:
        done = 0
        for count, found in verify_shards(folder, quick):
            done += count
            problems += found
            progress.update(done)
    for problem in problems:
        console.print(problem.text, markup=False)
    return problems


def _count(problems: list[Problem]) -> str:
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}"
