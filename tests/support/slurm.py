"""A Slurm of several nodes on one machine: each node is a host of tests.support.hosts, with Slurm's real daemons in it.

with slurm(tmp_path, "node-1", "node-2") as cluster:
    number = cluster.run("sbatch", "--parsable", "job.sh", cwd=tmp_path).strip()
    cluster.wait_for("end of the job", lambda: cluster.job(number)["JobState"] == "COMPLETED")

Ray's `ray stop`, which a job on whole nodes may use, sees only the processes of its own host.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.hosts import Host, hosts

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")

# Without systemd, cgroups and a user of Slurm's own. A requeued job waits until its old credential has expired, and a
# job that is past its limit gets the time that a slow machine needs.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost=control({control})
SlurmctldPort=6817
SlurmdPort=6818
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2
ReturnToService=2
MpiDefault=none
KillWait=10
OverTimeLimit=10
SlurmdParameters=config_overrides
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
"""


@dataclass(frozen=True)
class Slurm:
    login: Host
    nodes: list[Host]
    folder: Path  # configuration, logs and state

    def run(self, *command: object, cwd: Path | None = None) -> str:
        """One of Slurm's commands, on the login host; what it wrote to stdout."""
        return self.login.run("env", f"--chdir={cwd or self.folder}", *command)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(
        self, what: str, look: Callable[[], object], tell: Callable[[], str] = lambda: "", seconds: float = 600
    ) -> None:
        """Until it sees something; tell: what else to say when it does not."""
        deadline = time.monotonic() + seconds
        while not look():
            assert time.monotonic() < deadline, f"no {what} in {seconds:g} s\n{tell()}\n{self.logs()}"
            time.sleep(0.5)

    def logs(self) -> str:
        """The end of each daemon's log."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def slurm(folder: Path, *names: str, **environment: str) -> Iterator[Slurm]:
    """A Slurm with nodes of these names and one CPU each. Skips the test where that can't be.

    environment: of all its processes and jobs, besides the test's.
    """
    path = f"{environment.get('PATH', os.environ['PATH'])}:/usr/sbin:/sbin"
    for program in _PROGRAMS:
        if not shutil.which(program, path=path):
            pytest.skip(f"Slurm needs the program {program} (Debian's packages slurm-wlm and munge)")
    (folder / "state").mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment |= {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    with hosts("control", *names, **environment) as network:
        control, *nodes = network.hosts
        lines = [f"NodeName={node.name} NodeAddr={node.address} CPUs=1 RealMemory=2000" for node in nodes]
        text = _CONFIGURATION.format(folder=folder, control=control.address, nodes="\n".join(lines))
        (folder / "slurm.conf").write_text(text)
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in network.hosts)
        )
        for host in network.hosts:
            host.run("mount", "--bind", folder / "hosts", "/etc/hosts")
        files = [f"--{kind}-file={folder}/munge.{kind}" for kind in ("key", "seed", "pid")]
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files]
        control.popen(*munged, log=folder / "munged.log")
        control.popen("slurmctld", "-D", log=folder / "slurmctld.log")
        for node in nodes:
            node.popen("slurmd", "-D", "-N", node.name, log=folder / f"{node.name}.log")
        cluster = Slurm(control, nodes, folder)
        ask = "sinfo --noheader --format='%T %D' || true"
        cluster.wait_for("Slurm with all nodes", lambda: cluster.run("sh", "-c", ask).strip() == f"idle {len(nodes)}")
        yield cluster
