"""The job for Slurm's sbatch: a Ray cluster on whole nodes, for as long as one `erann` command takes.

What was asked for becomes the head of a shell script; the rest of it, slurm_job.sh, is the same in all. What the user
typed stands in the head quoted, or is refused where sbatch reads it, which knows no quotes.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster.render.checks import require
from erann_dist.errors import UsageError

# A socket's path may have 107 bytes, and Ray's take 70 of them behind its folder.
_SCRATCH_BYTES = 107 - 70 - len("/erann-1234567890")


@dataclass(frozen=True)
class SlurmJob:
    command: list[str]  # erann and its arguments
    name: str
    nodes: int
    gpus_per_node: str  # their number, or type:number
    time: str  # the limit, in one of sbatch's forms
    notice: int  # seconds before the limit
    requeue: bool
    partition: str | None
    account: str | None
    modules: list[str]
    setup: list[str]  # lines of shell
    container: str | None  # an image for Apptainer
    binds: list[str]  # what it sees of a node: SOURCE[:TARGET[:OPTIONS]]
    scratch: str  # a folder on each node's own disk


def render_slurm(job: SlurmJob) -> str:
    """The script. Raises UsageError for what Slurm, the shell or Ray would not take."""
    _check(job)
    gpus = int(job.gpus_per_node.rpartition(":")[2])
    options = {
        "job-name": job.name,
        "partition": job.partition,
        "account": job.account,
        "time": job.time,
        "nodes": str(job.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": job.gpus_per_node if gpus else None,
        "mem": "0",  # all that a node has
        "signal": f"B:USR1@{job.notice}",  # B: to the script, not to Ray's processes
        "open-mode": "append",
        "output": "%x-%j.log",
    }
    flags = ["exclusive", "requeue" if job.requeue else "no-requeue"]
    environment = [*(f"module load {shlex.quote(module)}" for module in job.modules), *job.setup]
    head = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None),
        *(f"#SBATCH --{flag}" for flag in flags),
        "",
        *(["# All nodes get it from here.", "set -e", *environment, "set +e", ""] if environment else []),
        f"command=({shlex.join(job.command)})",
        f"container=({_container(job, gpus)})",
        f"gpus={gpus}",
        f"scratch={shlex.quote(job.scratch)}",
        f"requeue={int(job.requeue)}",
    ]
    return "\n".join(head) + "\n" + Path(__file__).with_name("slurm_job.sh").read_text()


def _container(job: SlurmJob, gpus: int) -> str:
    """The words before each command that runs in the container."""
    if not job.container:
        return ""
    binds = " ".join(f"--bind {shlex.quote(bind)}" for bind in [job.scratch, *job.binds])
    return f'apptainer exec{" --nv" * (gpus > 0)} --bind "$PWD" {binds} --pwd "$PWD" {shlex.quote(job.container)}'


def _check(job: SlurmJob) -> None:
    if job.command[0] != "erann":
        raise UsageError(
            f"{job.command[0]!r} is no command of erann; give the job's behind --, as in: -- erann pretrain RECIPE"
        )
    plain = r"[^-\0-\x1f\x7f][^\0-\x1f\x7f]*", "printable, or begins with -"
    for option, value, (pattern, what) in [
        ("--job-name", job.name, (r"[A-Za-z0-9][\w.+-]*", "of letters, digits and _ . + - alone, for names of files")),
        ("--partition", job.partition, (r"[A-Za-z0-9][\w.,+-]*", "the name of a partition, or several with commas")),
        ("--account", job.account, (r"[A-Za-z0-9][\w.@+-]*", "the name of an account")),
        ("--gpus-per-node", job.gpus_per_node, (r"([\w.-]+:)?[0-9]{1,3}", "a number or TYPE:NUMBER")),
        ("--time", job.time, (r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}", "MINUTES, HH:MM:SS or DAYS-HH:MM:SS")),
        ("--scratch", job.scratch, (r"/[^\0-\x1f\x7f]*", "an absolute path")),
        ("--container", job.container, plain),
        *(("--bind", bind, plain) for bind in job.binds),
        *(("--module", module, plain) for module in job.modules),
    ]:
        if value is not None:
            require(option, value, pattern, what)
    if _seconds(job.time) < 2 * job.notice:
        raise UsageError(
            f"--time {job.time}: too short, as the run is to end {job.notice} s before it (--notice); "
            f"give at least {-(-2 * job.notice // 60)} minutes"
        )
    if (length := len(job.scratch.encode())) > _SCRATCH_BYTES:
        raise UsageError(
            f"--scratch {job.scratch}: {length} bytes long, and the paths of Ray's sockets allow {_SCRATCH_BYTES}; "
            "give a shorter path on each node's own disk"
        )


def _seconds(limit: str) -> int:
    """Of a time limit, in one of sbatch's forms: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
