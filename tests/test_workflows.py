"""The public repository's continuous integration calls the Makefile's targets, on the Pythons that are locked."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_lock import PYTHONS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
RUN = re.compile(r"(?:sudo --preserve-env=PATH )?make ([a-z-]+)( SHARD=\$\{\{ matrix\.shard \}\}/(\d+))?")


def jobs() -> dict[str, dict[str, Any]]:
    return {name: job for path in WORKFLOWS for name, job in yaml.safe_load(path.read_text())["jobs"].items()}


def targets(job: dict[str, Any]) -> list[str]:
    """The Makefile's targets that a job runs. Each of its commands is one."""
    found = [RUN.fullmatch(step["run"]) for step in job["steps"] if "run" in step]
    assert all(found), job
    return [match[1] for match in found if match]


def test_every_target_is_in_the_makefile() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {target for job in jobs().values() for target in targets(job)} <= set(phony.split())


def test_all_that_can_run_there_does() -> None:
    ran = {target for job in jobs().values() for target in targets(job)}
    assert ran >= {"lint", "test", "test-cluster", "test-install", "test-slow", "test-newest"}


def test_the_tests_run_on_every_python_that_is_locked() -> None:
    assert jobs()["test"]["strategy"]["matrix"]["python"] == PYTHONS
    for name, job in jobs().items():
        pythons = job.get("strategy", {}).get("matrix", {}).get("python", [])
        (setup,) = [step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
        assert setup == ("${{ matrix.python }}" if pythons else PYTHONS[0]), name
        assert set(pythons) <= set(PYTHONS)


def test_the_shards_are_all_of_the_cluster_tests() -> None:
    job = jobs()["cluster"]
    shards = job["strategy"]["matrix"]["shard"]
    (count,) = {match[3] for step in job["steps"] if (match := RUN.fullmatch(step.get("run", ""))) and match[3]}
    assert shards == list(range(1, int(count) + 1))
    found: list[str] = []
    for shard in shards:
        command = ["make", "--dry-run", "--assume-old=setup", "test-cluster", f"SHARD={shard}/{count}"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found += re.findall(r"tests/cluster/test_\w+\.py", printed)
    assert sorted(found) == sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/cluster/test_*.py"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_it_may_read_only(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
