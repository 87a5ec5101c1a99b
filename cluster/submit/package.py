"""What a submitted job brings to the cluster: this program's source, and the files that its command reads."""

import hashlib
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from erann_dist.errors import UserError
from erann_dist.versions import installed, pinned_requirements

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("erann_dist", "shards", "cluster", "jobs")
_SUFFIXES = {
    ".py",
    ".yaml",
    ".csv",
    ".sh",
    ".html",
    ".css",
    ".js",
}  # of source and package data: whatever else lies there is not sent
_LIMIT = 100 * 2**20  # bytes: Ray takes no larger package
# Of which the cluster has to have the versions that are here, since results and checkpoints depend on them. pip can
# bring them along with a job, but not Python and Ray, whose versions matter too.
BY_PIP = ("torch", "torchaudio", "deepspeed")


@dataclass(frozen=True)
class Package:
    """A working directory in the making: each file's name in it, and where it is here."""

    source: dict[str, Path]  # of this program
    read: dict[str, Path]  # what the command reads

    @property
    def files(self) -> dict[str, Path]:
        return self.source | self.read

    @property
    def read_sha256(self) -> str:
        """Of the files that the command reads, and their names: by it two commands are the same."""
        digests = [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for name, path in self.read.items()]
        return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        """In bytes, the largest first."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return dict(sorted(sizes.items(), key=lambda each: -each[1]))

    def write(self, folder: Path) -> None:
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def make_package(files: dict[str, Path]) -> Package:
    """The source, and these files beside it. Raises UserError when that is more than Ray takes."""
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
            f"the package is {sum(sizes.values()) / 2**20:,.0f} MiB, and Ray takes {_LIMIT / 2**20:.0f}; "
            f"the largest: {largest}; put large files where all nodes can read them"
        )
    return package


def versions() -> dict[str, str]:
    """Of Python and Ray (major.minor), and of the libraries, that client and cluster need to have alike."""
    found = {name: installed(name) or "none" for name in ("ray", *BY_PIP)}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python} | found | {"ray": ".".join(found["ray"].split(".")[:2])}


def pins() -> list[str]:
    """This program's requirements at the versions that are installed here, for pip; without Ray, which is there."""
    return [pin for pin in pinned_requirements() if not pin.startswith("ray[")]
