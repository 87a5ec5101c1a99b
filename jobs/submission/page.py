"""Submissions and jobs on the terminal."""

import time
from datetime import datetime
from typing import Any

from rich.table import Table

from jobs.terminal.progress import duration
from jobs.terminal.show import console


def job_facts(job: Any, run: str | None) -> dict[str, Any]:
    """The facts of a job (Ray's JobDetails). Times are in seconds since 1970."""
    lines = (job.message or "").strip().splitlines()
    return {
        "job": job.submission_id,
        "status": str(job.status.value),
        "run": run,
        "entrypoint": job.entrypoint,
        "started": job.start_time / 1000 if job.start_time else None,
        "ended": job.end_time / 1000 if job.end_time else None,
        "exit_code": job.driver_exit_code,
        "message": lines[-1] if lines else None,
    }


def jobs_page(result: dict[str, Any]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("job", "status", "started", "took", "run"):
        table.add_column(name)
    for job in result["jobs"]:
        table.add_row(job["job"], job["status"].lower(), _started(job), _took(job), job["run"] or job["entrypoint"])
    console.print(table)


def job_page(job: dict[str, Any]) -> None:
    console.print(f"job      {job['job']}")
    console.print(f"status   {job['status'].lower()}, started {_started(job)}, took {_took(job)}")
    if job["run"]:
        console.print(f"run      {job['run']}")
    console.print(f"command  {job['entrypoint']}")
    if job["message"]:
        console.print(f"message  {job['message']}")


def submitted_page(result: dict[str, Any]) -> None:
    where = f"{result['job']} --address {result['address']}"
    console.print(f"erann jobs logs {where} --follow   shows its log")
    console.print(f"erann jobs stop {where}   stops it")


def package_page(plan: dict[str, Any]) -> None:
    """What would be sent: all of the user's files, and the largest of the source."""
    console.print(f"run           {plan['run']}")
    console.print(f"would run     {plan['entrypoint']}")
    needs = plan["runtime_env"].get("pip", {}).get("packages")
    console.print(f"dependencies  {'as installed on the nodes' if needs is None else 'by pip: ' + ' '.join(needs)}")
    for name, value in plan["runtime_env"]["env_vars"].items():
        console.print(f"environment   {name}={value}")
    if plan["not_sent"]:
        console.print(f"not sent      {', '.join(plan['not_sent'])}: the nodes need credentials of their own")
    sizes = plan["files"]
    console.print(f"package       {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB; largest:")
    for name, size in list(sizes.items())[:10]:
        console.print(f"              {size / 1e3:7,.0f} kB  {name}")
    source = ("erann_dist/", "shards/", "cluster/", "jobs/")
    for name in sizes:
        if not name.startswith(source):
            console.print(f"              {sizes[name] / 1e3:7,.0f} kB  {name}")


def _started(job: dict[str, Any]) -> str:
    return datetime.fromtimestamp(job["started"]).strftime("%m-%d %H:%M:%S") if job["started"] else "not yet"


def _took(job: dict[str, Any]) -> str:
    return duration((job["ended"] or time.time()) - job["started"]) if job["started"] else "–"
