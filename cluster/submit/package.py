"""The package that a submitted job sends to the cluster: this program's source, and the files its command reads."""

import hashlib
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from erann_dist.errors import UserError
from erann_dist.versions import installed, pinned_requirements

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("erann_dist", "shards", "cluster", "jobs")
# Suffixes of source and package data; other files are not sent.
_SUFFIXES = {".py", ".yaml", ".csv", ".sh", ".html", ".css", ".js"}
_LIMIT = 100 * 2**20  # Ray's maximum size of a package, in bytes.
# The cluster must have the same versions of these, since results and checkpoints depend on them. pip can install them
# for a job, but not Python and Ray, whose versions matter too.
BY_PIP = ("torch", "torchaudio", "deepspeed")


@dataclass(frozen=True)
class Package:
    """The files of a job's working directory: for each name in it, the local file."""

    source: dict[str, Path]  # this program's source
    read: dict[str, Path]  # files that the command reads

    @property
    def files(self) -> dict[str, Path]:
        return self.source | self.read

    @property
    def read_sha256(self) -> str:
        """SHA-256 over the names and contents of the files that the command reads; equal for equal commands."""
        digests = [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in self.read.items()]
        return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        """The files' sizes in bytes, the largest first."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted(sizes.items(), key=lambda each: -each[1]))

    def write(self, folder: Path) -> None:
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def make_package(files: dict[str, Path]) -> Package:
    """The source together with these files. Raises UserError if that is larger than Ray allows."""
    source = {
        path.relative_to(_ROOT).as_posix(): path
        for name in _PACKAGES
        for path in sorted((_ROOT / name).rglob("*"))
        if path.suffix in _SUFFIXES and path.is_file()
    }
    package = Package(source, files)
    sizes = package.sizes
    if sum(sizes.values()) > _LIMIT:
        largest = ", ".join(f"{name} ({size / 2**20:,.0f} MiB)" for name, size in list(sizes.items())[:3])
        raise UserError(
            f"the package is {sum(sizes.values()) / 2**20:,.0f} MiB, but Ray's limit is {_LIMIT / 2**20:.0f}; "
            f"largest files: {largest}; put large files where all nodes can read them"
        )
    return package


def versions() -> dict[str, str]:
    """The versions that client and cluster must have in common: of Python and Ray (major.minor), and of libraries."""
    found = {name: installed(name) or "none" for name in ("ray", *BY_PIP)}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python} | found | {"ray": ".".join(found["ray"].split(".")[:2])}


def pins() -> list[str]:
    """This program's requirements at the versions installed here, for pip; without Ray, which the cluster has."""
    return [pin for pin in pinned_requirements() if not pin.startswith("ray[")]
