"""The lock files: they fit pyproject.toml and each other, and name nothing but versions and hashes."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
LOCKS = ["dev", "image", "setup", "docs"]


def lines(lock: str) -> Iterator[str]:
    """The requirements, each with its hashes, as one line."""
    for line in (ROOT / "requirements" / f"{lock}.txt").read_text().replace("\\\n", " ").splitlines():
        if not line.startswith("#"):
            yield line


def locked(lock: str, python: str) -> dict[str, Version]:
    """Each package's version on Linux, x86-64, with this Python."""
    environment: Any = default_environment() | {"sys_platform": "linux", "platform_machine": "x86_64"}
    environment |= {"python_version": python, "python_full_version": f"{python}.1"}
    found: dict[str, Version] = {}
    for line in lines(lock):
        requirement = Requirement(line.partition(" --hash")[0].strip())
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (version,) = requirement.specifier
            assert version.operator == "=="
            assert canonicalize_name(requirement.name) not in found
            found[canonicalize_name(requirement.name)] = Version(version.version)
    return found


def asked(lock: str) -> list[str]:
    """What pyproject.toml asks for in the environment that a lock is for."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    return {
        "dev": [*project["dependencies"], *(each for extra in extras.values() for each in extra)],
        "image": [*project["dependencies"], *extras["aws"]],
        **PROJECT["dependency-groups"],
    }[lock]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_it_is_not_stale(lock: str, python: str) -> None:
    versions = locked(lock, python)
    for requirement in map(Requirement, asked(lock)):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements/{lock}.txt: run make lock"
        assert version in requirement.specifier, f"{requirement} is {version} in requirements/{lock}.txt: run make lock"


@pytest.mark.parametrize("python", PYTHONS)
def test_all_hold_the_same_versions(python: str) -> None:
    dev = locked("dev", python)
    assert locked("image", python).items() <= dev.items()
    assert locked("setup", python)["setuptools"] == dev["setuptools"]
    docs = locked("docs", python)
    assert {name: docs[name] for name in docs.keys() & dev.keys()}.items() <= dev.items()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_hashes_and_none_an_address(lock: str) -> None:
    for line in lines(lock):
        assert re.search(r" --hash=sha256:[0-9a-f]{64}", line), line
    text = (ROOT / "requirements" / f"{lock}.txt").read_text()
    assert not re.search(r"://|--index|--find-links", text)


def test_the_pythons_are_named_alike() -> None:
    """In the package's metadata, in its classifiers, by `make setup` and here."""
    project = PROJECT["project"]
    first, last = PYTHONS[0], PYTHONS[-1]
    assert project["requires-python"] == f">={first},<3.{int(last.split('.')[1]) + 1}"
    names = [each.rpartition(" ")[2] for each in project["classifiers"] if " :: Python :: 3" in each]
    assert names == PYTHONS
    check = (ROOT / "requirements" / "check_machine.py").read_text()
    oldest, newest = (tuple(map(int, python.split("."))) for python in (first, last))
    assert f"OLDEST, NEWEST = {oldest}, {newest}" in check
