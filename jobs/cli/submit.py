"""The commands that submit jobs to a cluster and manage them."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from erann_dist.errors import UserError
from jobs.cli.options import Json, examples
from jobs.terminal.progress import console
from jobs.terminal.show import show

_EXIT_OF_STOPPED = 143

Address = Annotated[
    str | None,
    typer.Option(help="The cluster's dashboard, http://HEAD:8265, or ray://HEAD:10001. Default: RAY_ADDRESS."),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's ID, as listed by erann jobs list.")]

jobs_app = typer.Typer(no_args_is_help=True, help="Manage submitted jobs.", rich_markup_mode="markdown")


def add_to(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command(
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True},
        help="Submit erann pretrain, finetune, study or pipeline to a Ray cluster, and show its log until it ends.\n\n"
        "Ctrl-C leaves the job running. A run that is already in progress is not submitted again, but followed. Paths "
        "in the recipe are those of the cluster: paths shared by all nodes, or s3:// URLs. From this machine's "
        "environment only the S3 endpoint and region are sent."
        + examples(
            "erann submit pretrain audioset_fast.yaml data.train=s3://bucket/train data.eval=s3://bucket/eval "
            "run.dir=s3://bucket/runs run.workers=8 --address http://HEAD:8265",
            "erann submit pipeline mine.yaml --detach",
        ),
        rich_help_panel="Clusters",
    )(submit)
    app.add_typer(jobs_app, name="jobs", rich_help_panel="Clusters")


def submit(
    context: typer.Context,
    command: Annotated[list[str], typer.Argument(metavar="COMMAND RECIPE [KEY.PATH=VALUE]...", show_default=False)],
    address: Address = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return without waiting for the job to end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be sent and run, without sending it.")
    ] = False,
    dependencies: Annotated[
        Literal["image", "pip"],
        typer.Option(help="image: use what is installed on the nodes. pip: install this machine's versions there."),
    ] = "image",
    as_json: Json = False,
) -> None:
    from cluster.submit import ray_jobs
    from jobs.submission.page import package_page, submitted_page
    from jobs.submission.submit import prepare

    work = prepare(context, command, dependencies)
    if dry_run:
        show(_plan(work), as_json, package_page)
        return
    cluster = ray_jobs.connect(address)
    _report_package(work)
    job, is_new = ray_jobs.submit(cluster, work)
    console.print(f"{job}: {'submitted' if is_new else 'already in progress; not submitted again'}", markup=False)
    result = {"job": job, "new": is_new, "run": work.run, "address": cluster.address}
    if detach:
        show(result | {"status": str(ray_jobs.find(cluster, job).status.value)}, as_json, submitted_page)
        return
    facts = _follow(cluster, job, as_json)
    if as_json:
        show(result | facts, as_json, lambda _: None)
    _end_as(facts)


def submit_preflight(context: typer.Context, recipe: Path, overrides: list[str], address: str, as_json: bool) -> None:
    """Run erann preflight as a job on the cluster, and exit with the job's exit code."""
    from cluster.submit import ray_jobs
    from jobs.submission.submit import prepare

    work = prepare(context, ["preflight", str(recipe), *overrides, *(["--json"] if as_json else [])], "image")
    cluster = ray_jobs.connect(address)
    _report_package(work)
    job, _ = ray_jobs.submit(cluster, work)
    console.print(f"{job}: submitted to {address}", markup=False)
    facts = _follow(cluster, job, as_json)
    if as_json:
        *_, last = ["", *ray_jobs.logs(cluster, job).splitlines()]
        if last.startswith("{"):  # Otherwise the job ended before it had a result.
            print(last)
    _end_as(facts)


@jobs_app.command(
    "list",
    help="List the cluster's submitted jobs, the newest last."
    + examples(
        "erann jobs list",
    ),
)
def list_all(address: Address = None, as_json: Json = False) -> None:
    from cluster.submit import ray_jobs
    from jobs.submission.page import job_facts, jobs_page

    cluster = ray_jobs.connect(address)
    jobs = [job_facts(job, ray_jobs.run_of(job)) for job in ray_jobs.list_jobs(cluster)]
    show({"jobs": jobs}, as_json, jobs_page)


@jobs_app.command(
    help="Show a job's status and, if it failed, why."
    + examples(
        "erann jobs status pretrain-audioset-1",
    ),
)
def status(job: JobId, address: Address = None, as_json: Json = False) -> None:
    from cluster.submit import ray_jobs
    from jobs.submission.page import job_facts, job_page

    found = ray_jobs.find(ray_jobs.connect(address), job)
    show(job_facts(found, ray_jobs.run_of(found)), as_json, job_page)


@jobs_app.command(
    help="Print a job's log; with --follow, until the job ends. Ctrl-C leaves the job running."
    + examples(
        "erann jobs logs pretrain-audioset-1 --follow",
    ),
)
def logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", help="Follow the log until the job ends.")] = False,
    address: Address = None,
) -> None:
    from cluster.submit import ray_jobs

    cluster = ray_jobs.connect(address)
    found = str(ray_jobs.find(cluster, job).submission_id)
    if follow:
        _end_as(_follow(cluster, found, as_json=False))
    else:
        sys.stdout.write(ray_jobs.logs(cluster, found))


@jobs_app.command(
    help="Stop a job; its runs save a checkpoint first.\n\nSubmit the same command again to resume from it."
    + examples(
        "erann jobs stop pretrain-audioset-1",
    ),
)
def stop(job: JobId, address: Address = None, as_json: Json = False) -> None:
    from cluster.submit import ray_jobs
    from jobs.submission.page import job_facts, job_page

    cluster = ray_jobs.connect(address)
    found = ray_jobs.find(cluster, job)
    if not found.status.is_terminal():
        with console.status(f"{job}: stop requested, saving a checkpoint"):
            ray_jobs.stop(cluster, str(found.submission_id))
        found = ray_jobs.find(cluster, job)
    show(job_facts(found, ray_jobs.run_of(found)), as_json, job_page)


def _follow(cluster: Any, job: str, as_json: bool) -> dict[str, Any]:
    """Show the job's log until it ends. Returns the job's facts (`job_facts`)."""
    from cluster.submit import ray_jobs
    from jobs.submission.page import job_facts

    out = sys.stderr if as_json else sys.stdout  # With --json, stdout holds only the JSON object.

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    try:
        ray_jobs.follow(cluster, job, write, lambda text: console.print(text, markup=False))
    except KeyboardInterrupt:
        where = f"{shlex.quote(job)} --address {shlex.quote(cluster.address)}"
        console.print(
            f"detached; the job is still running\n  erann jobs logs {where} --follow   follows it again\n"
            f"  erann jobs stop {where}   stops it",
            markup=False,
        )
        raise
    ended = ray_jobs.find(cluster, job)
    facts = job_facts(ended, ray_jobs.run_of(ended))
    line = f"{job}: {facts['status'].lower()}"
    if (
        facts["status"] == "FAILED" and facts["exit_code"] is None
    ):  # It never started, or was lost: the log does not show why.
        line += f": {facts['message']}"
    console.print(line, markup=False)
    return facts


def _end_as(facts: dict[str, Any]) -> None:
    """Exit with the job's exit code."""
    if facts["status"] == "STOPPED":
        raise typer.Exit(_EXIT_OF_STOPPED)
    if facts["status"] != "SUCCEEDED":
        raise typer.Exit(facts["exit_code"] or UserError.exit_code)


def _plan(work: Any) -> dict[str, Any]:
    return {
        "run": work.what,
        "entrypoint": work.entrypoint,
        "dependencies": work.dependencies,
        "runtime_env": work.runtime_env,
        "not_sent": work.kept_here,
        "files": work.package.sizes,
    }


def _report_package(work: Any) -> None:
    sizes = work.package.sizes
    largest = ", ".join(f"{name} {size / 1e3:,.0f} kB" for name, size in list(sizes.items())[:3])
    console.print(f"package: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB; largest: {largest}", markup=False)
    if work.kept_here:
        console.print(f"not sent: {', '.join(work.kept_here)}; the nodes need credentials of their own", markup=False)
