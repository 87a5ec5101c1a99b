"""Facts about a node: versions, cores, GPUs, clock."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from erann_dist.environment import usable_cpus
from erann_dist.errors import UserError
from erann_dist.versions import LIBRARIES

K = TypeVar("K")

_PACKAGES = ("erann_dist", "shards", "cluster", "jobs")
_PINGS = 5


@dataclass(frozen=True)
class Facts:
    """Versions and cores of a node."""

    python: str
    versions: dict[str, str]  # of libraries
    cuda: str | None  # version that torch was built with
    folder: str  # from which this program was imported
    files: dict[str, str]  # SHA-256 of its source files
    cores: int  # usable cores

    @property
    def source(self) -> str:
        """SHA-256 over the program's source files."""
        lines = [f"{name} {digest}\n" for name, digest in sorted(self.files.items())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True)
class Gpu:
    """A worker's GPU."""

    name: str
    free: int  # bytes
    total: int
    has_bf16: bool


@dataclass(frozen=True)
class Offset:
    """The offset of a node's clock from this host's."""

    seconds: float  # positive: the node is ahead
    within: float  # uncertainty in seconds


def enter(cwd: str) -> None:
    """Change to the folder where the command was started. Raises UserError if there is no such folder."""
    try:
        os.chdir(cwd)
    except OSError as error:
        raise UserError(f"{cwd}, where the command was started, does not exist there ({error.strerror})") from error


def facts() -> Facts:
    """The facts of this node."""
    roots = {name: Path(_origin(name)).parent for name in _PACKAGES}
    files = {
        f"{name}/{path.relative_to(root).as_posix()}": hashlib.sha256(path.read_bytes()).hexdigest()
        for name, root in roots.items()
        for path in sorted(root.rglob("*.py"))
    }
    return Facts(
        python=platform.python_version(),
        versions={name: importlib.metadata.version(name) for name in LIBRARIES},
        cuda=torch.version.cuda,
        folder=str(roots["erann_dist"].parent),
        files=files,
        cores=usable_cpus(),
    )


def _origin(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec
    assert spec.origin
    return spec.origin


def gpu() -> Gpu:
    """The GPU of this worker, before anything is computed on it."""
    free, total = torch.cuda.mem_get_info(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(torch.cuda.get_device_name(0), free, total, bf16)


def offsets(probes: Mapping[K, Any]) -> tuple[dict[K, Offset], list[K]]:
    """The offsets of the nodes' clocks, and the nodes that do not answer."""
    found, silent = {}, []
    for key, probe in probes.items():
        pings = []
        for _ in range(_PINGS):
            asked, began = time.time(), time.perf_counter()
            try:
                there = ray.get(probe.do.remote(time.time), timeout=10)
            except ray.exceptions.RayError:
                silent.append(key)
                break
            half = (time.perf_counter() - began) / 2
            pings.append(Offset(there - asked - half, half))
        else:
            found[key] = min(pings, key=lambda ping: ping.within)
    return found, silent
