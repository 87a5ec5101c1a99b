"""A fresh clone, set up by nothing but `make setup`, runs the demo. `make test-install` runs this."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_lock import ROOT, locked

pytestmark = pytest.mark.install


@pytest.fixture(scope="module", params=["uv", pytest.param("pip", marks=pytest.mark.slow)])
def clone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commit that is checked out, in a new folder, set up."""
    folder = tmp_path_factory.mktemp("fresh") / "clone"
    if subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], capture_output=True).returncode:
        pytest.skip("this is not a git checkout")
    # What this machine's pip is configured to do is not the subject, nor are the tests' own variables.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PIP_CONFIG_FILE": os.devnull}
    subprocess.run(["make", "setup", f"INSTALLER={request.param}"], cwd=folder, env=environment, check=True)
    return folder


def command(clone: Path, *arguments: str) -> str:
    """An `erann` command's standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    erann = [str(clone / ".venv" / "bin" / "erann"), *arguments]
    done = subprocess.run(erann, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_installed_is_the_lock(clone: Path) -> None:
    script = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    python = str(clone / ".venv" / "bin" / "python")
    found = json.loads(subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout)
    installed = {name.lower().replace("_", "-").replace(".", "-"): version for name, version in found.items()}
    version = subprocess.run([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True)
    expected = {**locked("dev", version.stdout.decode().strip()), **locked("setup", version.stdout.decode().strip())}
    assert {name: installed.get(name) for name in expected} == {name: str(each) for name, each in expected.items()}
    assert installed.keys() - expected.keys() == {"erann-dist", "pip"}
    subprocess.run([str(clone / ".venv" / "bin" / "uv"), "pip", "check", "--python", python], check=True)


def test_the_demo_runs(clone: Path) -> None:
    """The product's first impression: it must run as it is, and the model must have learnt."""
    result = json.loads(command(clone, "demo", "--json"))
    train, evaluation = result["packed"].values()
    assert train["not_packed"] == {"missing": 1, "unreadable": 1}
    assert (train["clips"], evaluation["clips"], evaluation["not_packed"]) == (398, 160, {})
    assert result["mAP"] >= 0.80
    assert result["chance_mAP"] < 0.25
    assert len(result["tags"]) == 5
    assert f"mAP {result['mAP']:.3f}" in command(clone, "demo")  # again: nothing is trained twice


def test_another_python_is_told_which_are_supported(tmp_path: Path) -> None:
    """In one line, before anything is made or installed."""
    python = next(filter(None, map(shutil.which, ("python3.10", "python3.9", "python3.15"))), None)
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip("no unsupported Python here")
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "erann-dist needs CPython 3.11 to 3.14, this is CPython 3." in done.stderr
    assert not (tmp_path / ".venv").exists()
