"""The job script for Slurm's sbatch: a Ray cluster on whole nodes, for the duration of one `erann` command.

The options become the head of a shell script; the rest, slurm_job.sh, is the same for all jobs. User input is quoted in
the head, or restricted where sbatch reads it, which does not support quotes.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from cluster.render.checks import require
from erann_dist.errors import UsageError

# A socket's path may have 107 bytes, of which Ray's sockets take 70 below its folder.
_SCRATCH_BYTES = 107 - 70 - len("/erann-1234567890")


@dataclass(frozen=True)
class SlurmJob:
    command: list[str]  # erann and its arguments
    name: str
    nodes: int
    gpus_per_node: str  # a number, or type:number
    time: str  # the limit, in one of sbatch's formats
    notice: int  # seconds before the limit
    requeue: bool
    partition: str | None
    account: str | None
    modules: list[str]
    setup: list[str]  # lines of shell
    container: str | None  # an image for Apptainer
    binds: list[str]  # folders of the node mounted in it: SOURCE[:TARGET[:OPTIONS]]
    scratch: str  # a folder on each node's local disk


def render_slurm(job: SlurmJob) -> str:
    """The script. Raises UsageError for options that Slurm, the shell or Ray would reject."""
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
        "signal": f"B:USR1@{job.notice}",  # B: only to the script, not to Ray's processes
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
        *(["# All nodes inherit this environment.", "set -e", *environment, "set +e", ""] if environment else []),
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
            f"{job.command[0]!r} is not erann; give the job's command after --, such as -- erann pretrain RECIPE"
        )
    plain = r"[^-\0-\x1f\x7f][^\0-\x1f\x7f]*", "printable, or begins with -"
    for option, value, (pattern, what) in [
        ("--job-name", job.name, (r"[A-Za-z0-9][\w.+-]*", "only letters, digits and _ . + -, as in file names")),
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
            f"--time {job.time}: too short, as the run stops {job.notice} s before the limit (--notice); "
            f"give at least {-(-2 * job.notice // 60)} minutes"
        )
    if (length := len(job.scratch.encode())) > _SCRATCH_BYTES:
        raise UsageError(
            f"--scratch {job.scratch}: {length} bytes long, but the paths of Ray's sockets allow {_SCRATCH_BYTES}; "
            "give a shorter path on each node's local disk"
        )


def _seconds(limit: str) -> int:
    """The seconds of a time limit in one of sbatch's formats: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86_400 + sum(part * unit for part, unit in zip(parts, units, strict=False))
