"""What processes start with."""

import os
from pathlib import Path

import pytest

from erann_dist.environment import usable_cpus


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "3200000 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "nonsense\n"}, 8),
        # The limit of a group above, as of a Kubernetes pod or of systemd's slice.
        (
            {
                "proc/self/cgroup": "0::/pod/main\n",
                "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/pod/main/cpu.max": "max 100000\n",
            },
            2,
        ),
        # Version 1: the path is the host's, and in the container only the mount's own files are there.
        (
            {
                "proc/self/cgroup": "3:memory:/docker/0f\n2:cpu,cpuacct:/docker/0f\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "2:cpuacct,cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_cpus_are_those_of_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert usable_cpus(_write(tmp_path, files)) == cpus


def test_no_other_code_counts_cpus() -> None:
    root = Path(__file__).parents[2]
    sources = [
        path for package in ("erann_dist", "shards", "cluster", "jobs") for path in (root / package).rglob("*.py")
    ]
    counting = {path.relative_to(root).as_posix() for path in sources if _counts_cpus(path.read_text())}
    assert counting == {"erann_dist/environment.py"}


def _counts_cpus(text: str) -> bool:
    return any(name in text for name in ("sched_getaffinity", "cpu_count(", "process_cpu_count"))
