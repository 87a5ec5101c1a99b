"""The environment that worker processes start with, and how many CPUs they may use."""

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

# glibc returns large buffers to the system when they are freed and requests them again for the next clip or step. That
# costs up to a tenth of packing and a fifth of a training step on CPU. glibc reads these variables at process start.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent is killed; otherwise it would keep working for nobody."""
    prctl_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(prctl_set_pdeathsig, signal.SIGKILL)


def usable_cpus(root: Path = Path("/")) -> int:
    """How many CPUs this process may use: the smaller of its affinity and its containers' quotas, at least 1.

    A quota (cgroups v1 and v2) limits the time on all CPUs together; a fraction of a CPU is rounded down. root: where
    /proc and /sys are.
    """
    quotas = _cpu_quotas(root)
    return max(1, int(min([len(os.sched_getaffinity(0)), *quotas])))


def _cpu_quotas(root: Path) -> list[float]:
    """The CPU limits of this process's control group and its ancestors, where they have one."""
    quotas = []
    mount = root / "sys/fs/cgroup"
    with suppress(OSError):  # not on Linux, or /proc is not mounted
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                quotas += [_quota_v2(folder) for folder in _with_ancestors(mount, group)]
            elif "cpu" in controllers.split(","):
                quotas += [
                    _quota_v1(folder)
                    for name in (controllers, "cpu")
                    for folder in _with_ancestors(mount / name, group)
                ]
    return [quota for quota in quotas if quota is not None]


def _with_ancestors(mount: Path, group: str) -> list[Path]:
    """The folders of a control group and its ancestors. In a container only the last one may exist."""
    path = mount / group.lstrip("/")
    return [path, *(parent for parent in path.parents if parent.is_relative_to(mount))]


def _quota_v2(folder: Path) -> float | None:
    """cpu.max: microseconds of CPU time and of the period, "200000 100000", or "max 100000"."""
    with suppress(OSError, ValueError, ZeroDivisionError):  # no such file; or "max"
        quota, period = (folder / "cpu.max").read_text().split()
        return int(quota) / int(period)
    return None


def _quota_v1(folder: Path) -> float | None:
    """The same in two files; -1 means no limit."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None
